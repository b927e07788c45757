"""In XLA: on CPUs jaxlib's kernel for compressed rows; elsewhere, and for gradients, entry by entry as long as that
needs no more memory than the dense weight, and with the dense weight beyond.

A gather and a sum over segments cost a CPU about as much per stored weight as a dense product costs per 50 of them, so
that only small batches gain from it.
"""

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from pallas_kernels.csr_matmul import reference
from pallas_kernels.csr_matmul.reference import outputs_of
from pallas_kernels.rows import call

FEWEST = 16  # rows: the kernel takes three times as long for one


def matmul(x, data, indices, indptr):
    """`x @ W`."""
    if jax.default_backend() == "cpu" and data.size and x.size:
        return call("jaxlib", _compressed, "mk e e i -> mn", x, data, indices, indptr)
    if not _is_small(x.shape[0], data, x.shape[1], indptr.shape[0] - 1):
        return reference.matmul(x, data, indices, indptr)
    products = x.T[indices] * data[:, None]
    outputs = outputs_of(indices, indptr)
    return jax.ops.segment_sum(products, outputs, indptr.shape[0] - 1, indices_are_sorted=True).T


def matmul_transposed(g, data, indices, indptr, inputs: int):
    """`g @ W.T`."""
    if not _is_small(g.shape[0], data, inputs, g.shape[1]):
        return reference.matmul_transposed(g, data, indices, indptr, inputs)
    return jax.ops.segment_sum(g.T[outputs_of(indices, indptr)] * data[:, None], indices, inputs).T


def sampled(x, g, indices, indptr):
    """`x.T @ g` at the stored entries."""
    if not _is_small(x.shape[0], indices, x.shape[1], g.shape[1]):
        return reference.sampled(x, g, indices, indptr)
    return (x.T[indices] * g.T[outputs_of(indices, indptr)]).sum(axis=1)


def _compressed(x, data, indices, indptr):
    indices = jnp.clip(indices, 0, x.shape[1] - 1)  # the kernel would read memory that is not x
    weight = sparse.BCSR((data, indices, indptr), shape=(indptr.shape[0] - 1, x.shape[1]))
    padded = jnp.pad(x, ((0, max(0, FEWEST - x.shape[0])), (0, 0)))
    return (weight @ padded.T).T[: x.shape[0]]


def _is_small(batch: int, data, inputs: int, outputs: int) -> bool:
    return batch * data.shape[0] <= inputs * outputs
