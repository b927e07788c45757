"""Products of sparse matrices on Hopper: dense tiles in registers as the scratchpad, tiles without entries skipped.

A thread block accumulates one tile of the product, its window of SMASH's scratchpad. Its memory warpgroup brings in the
tiles along the contracted axis where both factors have entries, two compute warpgroups multiply them by wgmma; XLA then
gathers the product's entries. This costs the memory of three dense matrices, and the time of a dense product unless
entries cluster: tiles of entries at random places are hardly ever empty. A list of products, see `xla`, is better below
about one percent of entries. float32 operands are rounded to tf32.
"""

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.spgemm import tiles
from pallas_kernels.spgemm.reference import at

TILE = 64 * hopper.COMPUTE  # rows of the product
WIDTH = 128


def reason(sizes, dtype):
    """Why matrices of these sizes and dtype cannot be multiplied, or None."""
    if min(sizes) < 1:
        return f"all sizes must be at least 1, got {sizes}"
    return hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32)


def product(x, y, places, lists, sizes):
    """The entries of X Y at the third of `places`, see `pallas_kernels.spgemm`."""
    del lists
    tile = TILE, 128 // x.dtype.itemsize, WIDTH
    order, count = tiles.schedule(places, sizes, tile)
    left = tiles.padded(x, places[0], sizes[:2], tile[:2])
    right = tiles.padded(y, places[1], sizes[1:], tile[1:])
    whole = _tiles(left, right.T if x.dtype == jnp.float32 else right, order, count)
    return at(whole, places[2])


@sequential_vmap
def _tiles(x, y, order, count):
    """The product `(M, N)` of `x (M, K)` and `y (K, N)`, which is transposed if float32."""
    dtype, transposed = x.dtype, x.dtype == jnp.float32  # wgmma wants those contiguous along K
    step = 128 // dtype.itemsize
    stored = (WIDTH, step) if transposed else (step, WIDTH)
    operand = hopper.transforms(dtype, step, stored[1])

    def kernel(row, column, x_ref, y_ref, order_ref, count_ref, out_ref, out):
        def x_tile(i):
            return row, order_ref[row, column, i]

        def y_tile(i):
            inner = order_ref[row, column, i]
            return (column, inner) if transposed else (inner, column)

        hopper.sum_tiles(
            (row, column),
            (x_ref, plgpu.BlockSpec((TILE, step), x_tile, transforms=operand, delay_release=1)),
            (y_ref, plgpu.BlockSpec(stored, y_tile, transforms=operand, delay_release=1)),
            out_ref,
            out,
            (count_ref[row, column],),
            transposed=transposed,
        )

    grid = order.shape[:2]
    run = hopper.tiled_products(kernel, (x.shape[0], grid[1] * WIDTH), (TILE, WIDTH), grid, dtype)
    return run(x, y, order, count)
