"""Products at sampled positions on Hopper.

Blocks: a thread block computes one stored block by wgmma over tiles of the contracted axis; padding has no steps and
writes zeros. Single entries: a thread block gathers the rows that its 64 entries need, one small copy for each, and
adds up their products; the gathers, two rows for one number, are what it costs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper

ENTRIES = 64  # per thread block
STAGES = 3


def reason(a_shape, b_shape, dtype):
    """Why entries of the product of matrices of these shapes and dtype cannot be sampled, or None."""
    del b_shape
    return hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32) or hopper.multiple_reason(
        "the inner size", a_shape[1], 64
    )


def block_reason(block, dtype):
    """Why blocks of this shape and dtype cannot be sampled, or None."""
    if block[1] > hopper.MAX_WIDTH:
        return f"the block width must be at most {hopper.MAX_WIDTH}, got {block[1]}"
    if block[0] > 128:
        return f"the block rows must be at most 128, got {block[0]}"
    return (
        hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32)
        or hopper.multiple_reason("the block rows", block[0], 64)
        or hopper.multiple_reason("the block width", block[1], hopper.k_multiple(dtype))
    )


def block_sampled(x, g, indices, block: tuple[int, int]):
    """The stored blocks of `x.T @ g`: `(T, M)` and `(T, N)` to `(N / bn, L, bm, bn)`, zero in padding."""
    height, width = block
    columns, length = indices.shape
    dtype = x.dtype
    # float32 operands must be contiguous along the contracted axis.
    by_row = dtype == jnp.float32
    step = 128 // dtype.itemsize
    x, g = (hopper.pad_rows(array, step) for array in (x, g))
    if by_row:
        x, g = x.T, g.T
    steps = x.shape[1 if by_row else 0] // step
    operand = hopper.transforms(dtype, step) if by_row else hopper.transforms(dtype, height, width)
    result = hopper.transforms(dtype, width)

    def kernel(x_ref, g_ref, indices_ref, out_ref):
        column, slot = lax.axis_index("column"), lax.axis_index("slot")
        row = indices_ref[column, slot]

        def tile(ref_size, at):
            shape = (ref_size, step) if by_row else (step, ref_size)
            index = (lambda i: (at, i)) if by_row else (lambda i: (i, at))
            return plgpu.BlockSpec(shape, index, transforms=operand, delay_release=1)

        def accumulate(total):
            def multiply(_, x_tile, g_tile):
                plgpu.wgmma(total, x_tile if by_row else x_tile.T, g_tile.T if by_row else g_tile)
                plgpu.wgmma_wait(1)

            plgpu.emit_pipeline(
                multiply,
                grid=(jnp.where(row < 0, 0, steps),),
                in_specs=[tile(height, row), tile(width, column)],
                max_concurrent_steps=STAGES,
            )(x_ref, g_ref)
            return total[...]

        total = pl.run_scoped(accumulate, plgpu.ACC((height, width), jnp.float32))

        def store(out):
            out[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[column, slot])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(store, plgpu.SMEM((height, width), dtype, transforms=result))

    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct((columns, length, height, width), dtype),
        grid=(columns, length),
        grid_names=("column", "slot"),
    )
    return run(x, g, indices.astype(jnp.int32))


def sampled(a, b, rows, cols):
    """`(a @ b)[rows, cols]`: `(M, K)`, `(K, N)` and two `(nnz,)` to `(nnz,)`."""
    count, inner, dtype = rows.size, a.shape[1], a.dtype
    chunks = pl.cdiv(count, ENTRIES)
    rows, cols = (jnp.pad(array.astype(jnp.int32), (0, chunks * ENTRIES - count)) for array in (rows, cols))
    step = 64

    def kernel(a_ref, b_ref, rows_ref, cols_ref, out_ref, a_rows, b_rows, out, barrier):
        start = lax.axis_index("chunk") * ENTRIES

        def fetch(k):
            def one(i, _):
                part = pl.ds(k * step, step)
                plgpu.copy_gmem_to_smem(a_ref.at[rows_ref[start + i], part], a_rows.at[i], barrier)
                plgpu.copy_gmem_to_smem(b_ref.at[cols_ref[start + i], part], b_rows.at[i], barrier)

            lax.fori_loop(0, ENTRIES, one, None)
            plgpu.barrier_wait(barrier)

        def add(k, total):
            fetch(k)
            left, right = (
                hopper.load(ref, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                for ref in (a_rows, b_rows)
            )
            return total + jnp.sum(left * right, axis=1)

        total = plgpu.layout_cast(jnp.zeros((ENTRIES,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        out[...] = lax.fori_loop(0, inner // step, add, total).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, out_ref.at[pl.ds(start, ENTRIES)])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct((chunks * ENTRIES,), dtype),
        scratch_types=[
            plgpu.SMEM((ENTRIES, step), dtype),
            plgpu.SMEM((ENTRIES, step), dtype),
            plgpu.SMEM((ENTRIES,), dtype),
            plgpu.Barrier(num_arrivals=2 * ENTRIES),
        ],
        grid=(chunks,),
        grid_names=("chunk",),
    )
    return run(a, b.T, rows, cols)[:count]
