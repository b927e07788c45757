"""Products of sparse matrices on Hopper: dense tiles in registers as the scratchpad, tiles without entries skipped.

A thread block accumulates one tile of the product, its window of SMASH's scratchpad. Its memory warpgroup brings in the
tiles along the contracted axis where both factors have entries, two compute warpgroups multiply them by wgmma; XLA then
gathers the product's entries. This costs the memory of three dense matrices, and the time of a dense product unless
entries cluster: tiles of entries at random places are hardly ever empty. A list of products, see `xla`, is better below
about one percent of entries. float32 operands are rounded to tf32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.spgemm import tiles
from pallas_kernels.spgemm.reference import at

COMPUTE = 2  # warpgroups that multiply
HALF = 64  # rows of each
WIDTH = 128
STAGES = 3


def reason(sizes, dtype):
    """Why matrices of these sizes and dtype cannot be multiplied, or None."""
    if min(sizes) < 1:
        return f"all sizes must be at least 1, got {sizes}"
    return hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32)


def product(x, y, places, lists, sizes):
    """The entries of X Y at the third of `places`, see `pallas_kernels.spgemm`."""
    del lists
    tile = COMPUTE * HALF, 128 // x.dtype.itemsize, WIDTH
    order, count = tiles.schedule(places, sizes, tile)
    left = tiles.padded(x, places[0], sizes[:2], tile[:2])
    right = tiles.padded(y, places[1], sizes[1:], tile[1:])
    whole = _tiles(left, right.T if x.dtype == jnp.float32 else right, order, count)
    return at(whole, places[2])


@sequential_vmap
def _tiles(x, y, order, count):
    """The product `(M, N)` of `x (M, K)` and `y (K, N)`, which is transposed if float32."""
    dtype, transposed = x.dtype, x.dtype == jnp.float32  # wgmma wants those contiguous along K
    tile, step = COMPUTE * HALF, 128 // dtype.itemsize
    stored = (WIDTH, step) if transposed else (step, WIDTH)

    def kernel(x_ref, y_ref, order_ref, count_ref, out_ref, out):
        row, column, group = (lax.axis_index(name) for name in ("row", "column", "group"))
        mine = pl.ds(group * HALF, HALF)

        def x_tile(i):
            return row, order_ref[row, column, i]

        def y_tile(i):
            inner = order_ref[row, column, i]
            return (column, inner) if transposed else (inner, column)

        def multiply(_, x_tile, y_tile, total):
            plgpu.wgmma(total, x_tile.at[mine], y_tile.T if transposed else y_tile)
            plgpu.wgmma_wait(1)
            return total

        def accumulate(pipeline):
            def scope(total):
                pipeline(total)
                out[group] = total[...].astype(dtype)
                plgpu.commit_smem()
                rows = pl.ds(row * tile + group * HALF, HALF)
                plgpu.copy_smem_to_gmem(out.at[group], out_ref.at[rows, pl.ds(column * WIDTH, WIDTH)])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(scope, plgpu.ACC((HALF, WIDTH), jnp.float32))

        operand = hopper.transforms(dtype, step, stored[1])
        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(count_ref[row, column],),
            in_specs=[
                plgpu.BlockSpec((tile, step), x_tile, transforms=operand, delay_release=1),
                plgpu.BlockSpec(stored, y_tile, transforms=operand, delay_release=1),
            ],
            max_concurrent_steps=STAGES,
            memory_registers=40,
            wg_axis="group",
            num_compute_wgs=COMPUTE,
            compute_context=accumulate,
        )(x_ref, y_ref)

    columns = order.shape[1]
    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns * WIDTH), dtype),
        scratch_types=[plgpu.SMEM((COMPUTE, HALF, WIDTH), dtype, transforms=hopper.transforms(dtype, WIDTH))],
        grid=order.shape[:2],
        grid_names=("row", "column"),
        num_threads=COMPUTE + 1,
        thread_name="group",
    )
    return run(x, y, order, count)
