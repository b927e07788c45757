"""In XLA: entry by entry as long as that needs no more memory than the dense weight, else with the dense weight.

A gather and a sum over segments cost XLA about as much per stored weight as a dense product costs per 50 of them on
a CPU, so that only small batches gain.
"""

import jax

from pallas_kernels.csr_matmul import reference
from pallas_kernels.csr_matmul.reference import rows_of


def _is_small(batch: int, data, rows: int, columns: int) -> bool:
    return batch * data.shape[0] <= rows * columns


def matmul(x, data, indices, indptr, columns: int):
    """`x @ W`."""
    if not _is_small(x.shape[0], data, x.shape[1], columns):
        return reference.matmul(x, data, indices, indptr, columns)
    products = x.T[rows_of(indices, indptr)] * data[:, None]
    return jax.ops.segment_sum(products, indices, columns).T


def matmul_transposed(g, data, indices, indptr):
    """`g @ W.T`."""
    rows = indptr.shape[0] - 1
    if not _is_small(g.shape[0], data, rows, g.shape[1]):
        return reference.matmul_transposed(g, data, indices, indptr)
    products = g.T[indices] * data[:, None]
    return jax.ops.segment_sum(products, rows_of(indices, indptr), rows, indices_are_sorted=True).T


def sampled(x, g, indices, indptr):
    """`x.T @ g` at the stored entries."""
    if not _is_small(x.shape[0], indices, x.shape[1], g.shape[1]):
        return reference.sampled(x, g, indices, indptr)
    return (x.T[rows_of(indices, indptr)] * g.T[indices]).sum(axis=1)
