"""Products at sampled positions in XLA: gathered rows and batched dots, a chunk at a time.

Where more than one entry in `DENSE` is wanted, the whole product costs less than the gathers.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.schedule import schedule
from pallas_kernels.block_sparse_matmul.xla import chunk_size, gather_blocks, pad
from pallas_kernels.meshes import vary
from pallas_kernels.sums import matmul, sum_dtype

DENSE = 32


def sampled(a, b, rows, cols):
    """`(a @ b)[rows, cols]`: `(M, K)`, `(K, N)` and two `(nnz,)` to `(nnz,)`."""
    if rows.size * DENSE > a.shape[0] * b.shape[1]:
        return matmul(a, b)[rows, cols]
    columns = b.T

    def dots(positions):
        row, col = positions
        return jnp.einsum("pk,pk->p", a[row], columns[col], preferred_element_type=sum_dtype(a.dtype))

    return _chunked(dots, a.shape[1], rows, cols).astype(a.dtype)


def scattered_matmul(values, rows, cols, b, height: int):
    """`S @ b` for the `(height, N)` matrix S that holds `values` at `(rows, cols)`; repeated positions add up.

    Args:
      values, rows, cols: `(nnz,)`.
      b: `(N, K)`.
    """
    if rows.size * DENSE > height * b.shape[0]:
        weight = jnp.zeros((height, b.shape[0]), sum_dtype(b.dtype)).at[rows, cols].add(values)
        return matmul(weight.astype(b.dtype), b)
    chunk = chunk_size(rows.size, b.shape[1])
    # A row beyond the last: what is added there is dropped.
    chunks = [
        pad(array, chunk, fill).reshape(-1, chunk) for array, fill in ((values, 0), (rows, height), (cols, 0))
    ]

    def one_chunk(y, entries):
        value, row, col = entries
        return y.at[row].add(value[:, None].astype(y.dtype) * b[col], mode="drop"), None

    y = vary(jnp.zeros((height, b.shape[1]), sum_dtype(b.dtype)), values, b)
    y, _ = lax.scan(one_chunk, y, tuple(chunks))
    return y.astype(b.dtype)


def block_sampled(x, g, indices, block: tuple[int, int]):
    """The stored blocks of `x.T @ g`: `(T, M)` and `(T, N)` to `(N / bn, L, bm, bn)`, zero in padding."""
    (height, width), slots = block, indices.size
    plan = schedule(indices, x.shape[1] // height)
    chunk = chunk_size(slots, x.shape[0] * max(block))
    order = jnp.where(plan.target == indices.shape[0], slots, plan.order)  # padding is dropped
    arrays = (pad(order, chunk, slots), pad(plan.source, chunk, 0), pad(plan.target, chunk, 0))

    def one_chunk(i, out):
        at, row, column = (lax.dynamic_slice(array, (i * chunk,), (chunk,)) for array in arrays)
        blocks = jnp.einsum(
            "cmk,cmn->ckn",
            gather_blocks(x, row, height),
            gather_blocks(g, column, width),
            preferred_element_type=sum_dtype(x.dtype),
        )
        return out.at[at].set(blocks.astype(out.dtype), mode="drop")

    out = vary(jnp.zeros((slots, *block), x.dtype), x, g)
    out = lax.fori_loop(0, (plan.starts[-1] + chunk - 1) // chunk, one_chunk, out)
    return out.reshape(*indices.shape, *block)


def _chunked(function, width: int, rows, cols):
    """`function((rows, cols))` in chunks of positions that gather `width` elements each."""
    chunk = chunk_size(rows.size, width)
    chunks = jax.tree.map(lambda array: pad(array, chunk, 0).reshape(-1, chunk), (rows, cols))
    return lax.map(function, chunks).reshape(-1)[: rows.size]
