"""Products of dense matrices at sampled positions (SDDMM): single entries, or the blocks of a block-ELL weight.

With `sum(g * values)` linear in each of `a`, `b` and `g`, the gradients are products with the sparse matrix that
holds g at the positions: `g b.T` for `a`, and `a.T g` for `b`. For blocks see `pallas_kernels.block_sparse_matmul`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_matmul import sampled as sampled_blocks
from pallas_kernels.block_sparse_matmul import sampled_reasons
from pallas_kernels.meshes import on_mesh
from pallas_kernels.rows import call

OP = "sampled_matmul"


def sampled_matmul(a, b, rows, cols, *, implementation: str | None = None):
    """`(a @ b)[rows, cols]` without the other entries, differentiable with respect to `a` and `b`.

    Args:
      a: `(M, K)`, of a float dtype.
      b: `(K, N)`, of a float dtype.
      rows, cols: `(nnz,)` integers, the positions, inside `(M, N)`; they need no order and may repeat.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(nnz,)` in the promoted dtype of `a` and `b`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together or the named implementation cannot run here.
    """
    a, b, rows, cols = (jnp.asarray(array) for array in (a, b, rows, cols))
    _check_factors(a, b)
    if rows.ndim != 1 or rows.shape != cols.shape:
        raise ValueError(
            f"rows and cols must be two vectors of one length, got shapes {rows.shape} and {cols.shape}"
        )
    if not all(jnp.issubdtype(array.dtype, jnp.integer) for array in (rows, cols)):
        raise ValueError(f"rows and cols must be integers, got {rows.dtype} and {cols.dtype}")
    dtype = jnp.result_type(a, b)

    def run(a, b, rows, cols):
        a, b = a.astype(dtype), b.astype(dtype)
        return _sampled(a, b, rows, cols, dispatch.pick(OP, implementation, _reasons(a, b)))

    return on_mesh(run, lambda *specs: specs[2], a, b, rows, cols)


def block_sampled_matmul(a, b, indices, block: tuple[int, int], *, implementation: str | None = None):
    """The blocks of `a @ b` that a block-ELL weight stores, differentiable with respect to `a` and `b`.

    Args:
      a: `(M, K)`, of a float dtype.
      b: `(K, N)`, of a float dtype.
      indices: `(N / bn, L)` integers: the row block of each block, -1 for padding.
      block: `(bm, bn)`, dividing M and N.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(N / bn, L, bm, bn)` in the promoted dtype of `a` and `b`, zero in padding; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together or the named implementation cannot run here.
    """
    a, b, indices = (jnp.asarray(array) for array in (a, b, indices))
    _check_factors(a, b)
    block = tuple(block)
    if len(block) != 2 or min(block) < 1 or a.shape[0] % block[0] or b.shape[1] % block[1]:
        raise ValueError(
            f"the block's sides must divide the product's shape ({a.shape[0]}, {b.shape[1]}), got {block}"
        )
    if indices.ndim != 2 or indices.shape[0] != b.shape[1] // block[1] or 0 in indices.shape:
        raise ValueError(
            f"indices must have a row of at least one for each of the {b.shape[1] // block[1]} block columns, at least "
            f"one, got shape {indices.shape}"
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    dtype = jnp.result_type(a, b)

    def run(a, b, indices):
        x, g = a.T.astype(dtype), b.astype(dtype)
        name = dispatch.pick("block_sampled_matmul", implementation, sampled_reasons(x, block))
        return sampled_blocks(x, g, indices, block, name)

    return on_mesh(run, lambda *specs: PartitionSpec(*specs[2], None, None), a, b, indices)


def _check_factors(a, b):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a and b must be matrices with a common inner size, got shapes {a.shape} and {b.shape}"
        )
    if not all(jnp.issubdtype(array.dtype, jnp.floating) for array in (a, b)):
        raise ValueError(f"a and b must be floats, got {a.dtype} and {b.dtype}")


def _reasons(a, b):
    return {
        "pallas_gpu": dispatch.gpu_reason(9, at=a)
        or dispatch.module(OP, "pallas_gpu").reason(a.shape, b.shape, a.dtype),
        "pallas_tpu": dispatch.tpu_reason(at=a)
        or dispatch.module(OP, "pallas_tpu").reason(a.shape, b.shape, a.dtype),
        "xla": None,
        "reference": None,
    }


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sampled(a, b, rows, cols, implementation: str):
    return call(
        implementation, dispatch.module(OP, implementation).sampled, "ik kj m m -> m", a, b, rows, cols
    )


def _forward(a, b, rows, cols, implementation):
    return _sampled(a, b, rows, cols, implementation), (a, b, rows, cols)


def _backward(implementation, saved, g):
    del implementation  # sums over positions are left to XLA
    a, b, rows, cols = saved
    xla = dispatch.module(OP, "xla")
    da = xla.scattered_matmul(g, rows, cols, b.T, a.shape[0])
    db = xla.scattered_matmul(g, cols, rows, a, b.shape[1])
    return da, db.T, None, None


_sampled.defvjp(_forward, _backward)
