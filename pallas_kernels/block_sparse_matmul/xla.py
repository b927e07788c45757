"""Block-sparse products in XLA: batched dense dots of the stored blocks, a chunk at a time.

Blocks are sorted by the result block that they belong to, which puts the padding of the block-ELL format last, and the
loop ends with the last stored block: the time follows the number of blocks, not that of the longest column.
A chunk is one batched dot, which XLA spreads over the cores of a CPU; loops over single blocks run on one core.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.schedule import schedule
from pallas_kernels.meshes import vary
from pallas_kernels.sums import sum_dtype

# Elements of an operand per chunk. Small enough for the products to be in cache when they are added up.
CHUNK = 2**17
# XLA's scatter goes element by element on CPUs; slices are added at memory speed, but a slice has a fixed cost.
WIDE = 64


def matmul(x, blocks, indices, rows: int):
    """`x @ W`: `(M, rows)` to `(M, N)`."""
    plan = schedule(indices, rows // blocks.shape[2])
    return _products(x, blocks, plan, indices.shape[0], "cmk,ckn->cmn")


def matmul_transposed(g, blocks, indices, rows: int):
    """`g @ W.T`: `(M, N)` to `(M, rows)`."""
    row_blocks = rows // blocks.shape[2]
    return _products(g, blocks, schedule(indices, row_blocks, transposed=True), row_blocks, "cmn,ckn->cmk")


def chunk_size(slots: int, elements: int) -> int:
    """How many of `slots` blocks form a chunk, where each has an operand of `elements`."""
    return max(1, min(slots, CHUNK // max(1, elements)))


def pad(array, chunk: int, value):
    """`array` filled up with `value` to whole chunks."""
    return jnp.pad(array, (0, -array.size % chunk), constant_values=value)


def gather_blocks(x, source, size: int):
    """`(M, blocks size)` to the blocks `(C, M, size)` at `source`."""
    return jnp.take(x.reshape(x.shape[0], x.shape[1] // size, size), source, axis=1, mode="clip").swapaxes(
        0, 1
    )


def _products(x, blocks, plan, targets: int, equation: str):
    batch, slots = x.shape[0], plan.order.size
    blocks = blocks.reshape(slots, *blocks.shape[2:])
    inner, outer = blocks.shape[1:] if equation.endswith("n") else blocks.shape[:0:-1]
    total_dtype = sum_dtype(x.dtype)
    chunk, wide = chunk_size(slots, batch * max(inner, outer)), outer >= WIDE
    order, source = pad(plan.order, chunk, 0), pad(plan.source, chunk, 0)
    target, total = pad(plan.target, chunk, targets), plan.starts[-1]

    def one_chunk(i, y):
        at, from_, to = (lax.dynamic_slice(a, (i * chunk,), (chunk,)) for a in (order, source, target))
        stored = jnp.take(blocks, at, axis=0, mode="clip")
        product = jnp.einsum(
            equation, gather_blocks(x, from_, inner), stored, preferred_element_type=total_dtype
        )
        if wide:
            return _add_slices(y, product, to, jnp.minimum(chunk, total - i * chunk))
        return y.at[to].add(product, mode="drop")

    y = jnp.zeros((batch, targets * outer) if wide else (targets, batch, outer), total_dtype)
    y = lax.fori_loop(0, (total + chunk - 1) // chunk, one_chunk, vary(y, x, blocks, total))
    return (y if wide else y.swapaxes(0, 1).reshape(batch, targets * outer)).astype(x.dtype)


def _add_slices(y, product, target, count):
    """Adds the first `count` products `(C, M, outer)` to the columns of `y`, `(M, targets outer)`."""
    batch, outer = product.shape[1:]

    def one(i, y):
        start = (0, target[i] * outer)
        old = lax.dynamic_slice(y, start, (batch, outer))
        return lax.dynamic_update_slice(y, old + product[i], start)

    return lax.fori_loop(0, count, one, y)
