"""Block-sparse products on Hopper: wgmma over the stored blocks of each block of the result.

A thread block computes one tile of rows of one block column. Its memory warpgroup walks along the stored blocks of
that column, whose number is read from memory, and brings in tiles of x and of the block by TMA; two compute
warpgroups multiply them, each for half of the rows, and accumulate in registers. A column without blocks writes
zeros. Neighbouring thread blocks share their rows of x, which stay in the L2 cache, as do the weights.

float32 operands are rounded to tf32, and wgmma wants them contiguous along the contracted axis, so that blocks are
transposed beforehand where they are not.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.block_sparse_matmul.schedule import schedule

COMPUTE = 2  # warpgroups that multiply
STAGES = 3


def reason(batch: int, shape, dtype, transposed: bool):
    """Why blocks of these shapes and dtype cannot run, or None."""
    inner, outer = (shape[3], shape[2]) if transposed else (shape[2], shape[3])
    names = ("block width", "block rows") if transposed else ("block rows", "block width")
    if outer > hopper.MAX_WIDTH:
        return f"the {names[1]} must be at most {hopper.MAX_WIDTH}, got {outer}"
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
    tile = COMPUTE * half
    stored = (outer, step) if transposed else (step, outer)
    operand = hopper.transforms(dtype, step, stored[1])
    result = hopper.transforms(dtype, outer)

    def kernel(x_ref, blocks_ref, order_ref, source_ref, starts_ref, y_ref, out):
        row, target, group = (lax.axis_index(name) for name in ("row", "target", "group"))
        first = starts_ref[target]
        mine = pl.ds(group * half, half)

        def x_tile(i, part):
            return row, source_ref[first + i] * per_block + part

        def stored_tile(i, part):
            return order_ref[first + i], *((0, part) if transposed else (part, 0))

        def multiply(_, x_tile, stored_tile, total):
            plgpu.wgmma(total, x_tile.at[mine], stored_tile.T if transposed else stored_tile)
            plgpu.wgmma_wait(1)
            return total

        def accumulate(pipeline):
            def scope(total):
                pipeline(total)
                out[group] = total[...].astype(dtype)
                plgpu.commit_smem()
                rows = pl.ds(row * tile + group * half, half)
                plgpu.copy_smem_to_gmem(out.at[group], y_ref.at[rows, pl.ds(target * outer, outer)])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(scope, plgpu.ACC((half, outer), jnp.float32))

        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(starts_ref[target + 1] - first, per_block),
            in_specs=[
                plgpu.BlockSpec((tile, step), x_tile, transforms=operand, delay_release=1),
                plgpu.BlockSpec((None, *stored), stored_tile, transforms=operand, delay_release=1),
            ],
            max_concurrent_steps=STAGES,
            memory_registers=40,
            wg_axis="group",
            num_compute_wgs=COMPUTE,
            compute_context=accumulate,
        )(x_ref, blocks_ref)

    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct((x.shape[0], targets * outer), dtype),
        scratch_types=[plgpu.SMEM((COMPUTE, half, outer), dtype, transforms=result)],
        grid=(pl.cdiv(x.shape[0], tile), targets),
        grid_names=("row", "target"),
        num_threads=COMPUTE + 1,
        thread_name="group",
    )
    return run(x, blocks, plan.order, plan.source, plan.starts)[:batch]
