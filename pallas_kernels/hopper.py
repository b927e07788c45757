"""What the Mosaic GPU kernels share: shared-memory layouts that wgmma can read, loads, and why a shape cannot run."""

import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MAX_WIDTH = 256  # columns of one wgmma
MEMORY = 227 * 2**10  # bytes of shared memory
COMPUTE = 2  # warpgroups that multiply
STAGES = 3  # pairs of tiles that are loaded ahead
# Layouts are stated, not inferred: inference does not end for kernels with many registers.
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def dtype_reason(dtype, *wanted):
    """Why a kernel for the dtypes `wanted` cannot run on `dtype`, or None."""
    names = [jnp.dtype(each).name for each in wanted]
    if jnp.dtype(dtype).name in names:
        return None
    return f"its operands must be {' or '.join(names)}, got {jnp.dtype(dtype).name}"


def multiple_reason(what: str, size: int, multiple: int):
    """Why a kernel whose `what` must be a multiple cannot run on `size`, or None."""
    return (
        None if size > 0 and size % multiple == 0 else f"{what} must be a multiple of {multiple}, got {size}"
    )


def max_width(dtype) -> int:
    """Columns of a tile of `sum_tiles` whose shared memory suffices, with 128 rows."""
    return MAX_WIDTH if jnp.dtype(dtype).itemsize <= 2 else 200


def k_multiple(dtype) -> int:
    """The contracted size of a wgmma: 32 bytes, which are also the shortest rows of a swizzled tile."""
    return 32 // jnp.dtype(dtype).itemsize


def tile_k(size: int, dtype) -> int:
    """The largest stretch of a contracted size, up to a swizzle of 128 bytes, that divides it."""
    return math.gcd(size, 128 // jnp.dtype(dtype).itemsize)


def transforms(dtype, *minor: int):
    """Tiling and swizzling of operands of one wgmma, given the sizes of their last axes."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(math.gcd(*minor) * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def load(ref, layout, optimized: bool = True):
    """The contents of a shared-memory reference as an array in a layout."""
    everything = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before JAX 0.11
    return plgpu.load(ref, *everything, layout=layout, optimized=optimized)


def pad_rows(x, multiple: int = 8):
    """`x` with rows of zeros up to a multiple: tiles of shared memory are loaded from whole groups of eight rows."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def tiled_products(body, shape, tile, grid, dtype):
    """The kernel `body(row, column, *arrays, y, out)`, run for every tile of its result; its last step is `sum_tiles`.

    Args:
      body: of the tile's place in the grid, the arrays and the result in global memory, and scratch memory.
      shape: of the result, in whole tiles; the rows may end early.
      tile: its rows, `COMPUTE` times those of a warpgroup, and columns.
      grid: how many tiles there are, by rows and columns.
    """
    half, width = tile[0] // COMPUTE, tile[1]

    def kernel(*refs):
        body(lax.axis_index("row"), lax.axis_index("column"), *refs)

    return plgpu.kernel(
        kernel,
        compiler_params=LANE,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=[plgpu.SMEM((COMPUTE, half, width), dtype, transforms=transforms(dtype, width))],
        grid=grid,
        grid_names=("row", "column"),
        num_threads=COMPUTE + 1,
        thread_name="group",
    )


def sum_tiles(place, x, weight, y, out, steps, *, transposed: bool):
    """Writes the tile of `y` at `place` in the grid: the sum over `steps` of products of tiles of two arrays.

    A memory warpgroup brings in the pairs of tiles, the others multiply their rows of them by wgmma.

    Args:
      place: row and column of the tile.
      x, weight: pairs of an array in global memory and the BlockSpec of its tiles, of which the second is multiplied
        transposed if `transposed`; both give back what they hold one step late.
      y: the result in global memory.
      out: `(COMPUTE, rows of a warpgroup, columns)` in shared memory.
      steps: the grid of the sum.
    """
    (row, column), group = place, lax.axis_index("group")
    _, half, width = out.shape
    mine = pl.ds(group * half, half)

    def multiply(_, x_tile, weight_tile, total):
        plgpu.wgmma(total, x_tile.at[mine], weight_tile.T if transposed else weight_tile)
        plgpu.wgmma_wait(1)
        return total

    def accumulate(pipeline):
        def scope(total):
            pipeline(total)
            out[group] = total[...].astype(out.dtype)
            plgpu.commit_smem()
            rows = pl.ds((row * COMPUTE + group) * half, half)
            plgpu.copy_smem_to_gmem(out.at[group], y.at[rows, pl.ds(column * width, width)])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scope, plgpu.ACC((half, width), jnp.float32))

    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=steps,
        in_specs=[x[1], weight[1]],
        max_concurrent_steps=STAGES,
        memory_registers=40,
        wg_axis="group",
        num_compute_wgs=COMPUTE,
        compute_context=accumulate,
    )(x[0], weight[0])
