"""Block-sparse products on Hopper: wgmma over the stored blocks of each block of the result.

A thread block computes one tile of rows of one block column. Its memory warpgroup walks along the stored blocks of
that column, whose number is read from memory, and brings in tiles of x and of the block by TMA; two compute
warpgroups multiply them, each for half of the rows, and accumulate in registers. A column without blocks writes
zeros. Neighbouring thread blocks share their rows of x, which stay in the L2 cache, as do the weights.

float32 operands are rounded to tf32, and wgmma wants them contiguous along the contracted axis, so that blocks are
transposed beforehand where they are not.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.block_sparse_matmul.schedule import schedule


def reason(batch: int, shape, dtype, transposed: bool):
    """Why blocks of these shapes and dtype cannot run, or None."""
    inner, outer = (shape[3], shape[2]) if transposed else (shape[2], shape[3])
    names = ("block width", "block rows") if transposed else ("block rows", "block width")
    if outer > hopper.max_width(dtype):
        return f"the {names[1]} must be at most {hopper.max_width(dtype)}, got {outer}"
    return (
        hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32)
        or hopper.multiple_reason(f"the {names[0]}", inner, hopper.k_multiple(dtype))
        or hopper.multiple_reason(f"the {names[1]}", outer, hopper.k_multiple(dtype))
        or (None if batch else "there are no rows to multiply")
    )


def matmul(x, blocks, indices, rows: int):
    """`x @ W`: `(M, rows)` to `(M, N)`."""
    plan = schedule(indices, rows // blocks.shape[2])
    if x.dtype == jnp.float32:
        return _products(x, blocks.swapaxes(2, 3), plan, indices.shape[0], transposed=True)
    return _products(x, blocks, plan, indices.shape[0], transposed=False)


def matmul_transposed(g, blocks, indices, rows: int):
    """`g @ W.T`: `(M, N)` to `(M, rows)`."""
    row_blocks = rows // blocks.shape[2]
    return _products(g, blocks, schedule(indices, row_blocks, transposed=True), row_blocks, transposed=True)


def _products(x, blocks, plan, targets: int, transposed: bool):
    """Sums of `x block @ block`, or `x block @ block.T` if `transposed`, over the runs of `plan`."""
    batch, dtype = x.shape[0], x.dtype
    blocks = blocks.reshape(-1, *blocks.shape[2:])
    outer, inner = blocks.shape[1:] if transposed else blocks.shape[:0:-1]
    x = hopper.pad_rows(x)
    step = hopper.tile_k(inner, dtype)
    per_block = inner // step
    half = 128 if batch > 128 and outer <= 128 and dtype != jnp.float32 else 64
    tile = hopper.COMPUTE * half
    stored = (outer, step) if transposed else (step, outer)
    operand = hopper.transforms(dtype, step, stored[1])

    def kernel(row, target, x_ref, blocks_ref, order_ref, source_ref, starts_ref, y_ref, out):
        first = starts_ref[target]

        def x_tile(i, part):
            return row, source_ref[first + i] * per_block + part

        def stored_tile(i, part):
            return order_ref[first + i], *((0, part) if transposed else (part, 0))

        hopper.sum_tiles(
            (row, target),
            (x_ref, plgpu.BlockSpec((tile, step), x_tile, transforms=operand, delay_release=1)),
            (blocks_ref, plgpu.BlockSpec((None, *stored), stored_tile, transforms=operand, delay_release=1)),
            y_ref,
            out,
            (starts_ref[target + 1] - first, per_block),
            transposed=transposed,
        )

    shape, grid = (x.shape[0], targets * outer), (pl.cdiv(x.shape[0], tile), targets)
    run = hopper.tiled_products(kernel, shape, (tile, outer), grid, dtype)
    return run(x, blocks, plan.order, plan.source, plan.starts)[:batch]
