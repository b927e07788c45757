"""Products at sampled positions on TPU.

Blocks: a grid step for each stored block and tile of the contracted axis, with the block indices in scalar memory.
Single entries: the vector unit cannot gather, so that the rows an entry needs are copied one by one from main memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

ENTRIES = 128  # per grid step
POSITIONS = 2**16  # that fit into scalar memory, two integers each


def reason(a_shape, b_shape, dtype):
    """Why entries of the product of matrices of these shapes and dtype cannot be sampled, or None."""
    del b_shape
    return tpu.dtype_reason(dtype) or tpu.multiple_reason("the inner size", a_shape[1], tpu.LANES)


def block_reason(block, dtype):
    """Why blocks of this shape and dtype cannot be sampled, or None."""
    return (
        tpu.dtype_reason(dtype)
        or tpu.multiple_reason("the block rows", block[0], tpu.LANES)
        or tpu.multiple_reason("the block width", block[1], tpu.LANES)
    )


def block_sampled(x, g, indices, block: tuple[int, int]):
    """The stored blocks of `x.T @ g`: `(T, M)` and `(T, N)` to `(N / bn, L, bm, bn)`, zero in padding."""
    (height, width), (columns, length) = block, indices.shape
    tile = tpu.row_tile(x.shape[0], x.dtype)
    x, g = (jnp.pad(array, ((0, -array.shape[0] % tile), (0, 0))) for array in (x, g))

    def kernel(indices_ref, x_ref, g_ref, out_ref, sum_ref):
        column, slot, t = (pl.program_id(axis) for axis in range(3))

        @pl.when(t == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(indices_ref[column * length + slot] >= 0)
        def _():
            contracted = (((0,), (0,)), ((), ()))
            sum_ref[...] += lax.dot_general(
                x_ref[...], g_ref[...], contracted, preferred_element_type=jnp.float32
            )

        @pl.when(t == pl.num_programs(2) - 1)
        def _():
            out_ref[0, 0] = sum_ref[...].astype(out_ref.dtype)

    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(columns, length, x.shape[0] // tile),
            in_specs=[
                pl.BlockSpec(
                    (tile, height),
                    lambda c, slot, t, indices: (t, jnp.maximum(indices[c * length + slot], 0)),
                ),
                pl.BlockSpec((tile, width), lambda c, slot, t, indices: (t, c)),
            ],
            out_specs=pl.BlockSpec((1, 1, height, width), lambda c, slot, t, indices: (c, slot, 0, 0)),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((columns, length, height, width), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return run(indices.reshape(-1).astype(jnp.int32), x, g)


def sampled(a, b, rows, cols):
    """`(a @ b)[rows, cols]`: `(M, K)`, `(K, N)` and two `(nnz,)` to `(nnz,)`."""
    parts = []
    for start in range(0, rows.size, POSITIONS):
        part = slice(start, start + POSITIONS)
        parts.append(_entries(a, b.T, rows[part], cols[part]))
    return jnp.concatenate(parts) if parts else jnp.zeros((0,), a.dtype)


def _entries(a, b, rows, cols):
    """The dot products of rows of `a (M, K)` and of `b (N, K)`."""
    count, inner = rows.size, a.shape[1]
    steps = pl.cdiv(count, ENTRIES)
    rows, cols = (jnp.pad(array.astype(jnp.int32), (0, steps * ENTRIES - count)) for array in (rows, cols))

    def kernel(rows_ref, cols_ref, a_ref, b_ref, out_ref, a_rows, b_rows, done):
        start = pl.program_id(0) * ENTRIES

        def copies(i):
            return (
                pltpu.make_async_copy(a_ref.at[rows_ref[start + i]], a_rows.at[i], done),
                pltpu.make_async_copy(b_ref.at[cols_ref[start + i]], b_rows.at[i], done),
            )

        @pl.loop(0, ENTRIES)
        def _(i):
            for copy in copies(i):
                copy.start()

        @pl.loop(0, ENTRIES)
        def _(i):
            for copy in copies(i):
                copy.wait()

        left, right = (ref[...].astype(jnp.float32) for ref in (a_rows, b_rows))
        out_ref[...] = jnp.sum(left * right, axis=(1, 2))[None].astype(out_ref.dtype)

    # A row of its own in the tiled memory: without the middle axis, eight rows share a tile.
    a, b = (array.reshape(-1, 1, inner) for array in (a, b))
    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((None, 1, ENTRIES), lambda step, rows, cols: (step, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((ENTRIES, 1, inner), a.dtype),
                pltpu.VMEM((ENTRIES, 1, inner), a.dtype),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((steps, 1, ENTRIES), a.dtype),
    )
    return run(rows, cols, a, b).reshape(-1)[:count]
