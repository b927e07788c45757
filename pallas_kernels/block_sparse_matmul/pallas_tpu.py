"""Block-sparse products on TPU: one grid step for each tile of rows and stored block.

The schedule is prefetched into scalar memory, from where it decides which blocks the pipeline brings in. A run of
steps with the same result block accumulates in one buffer. Padding comes last and repeats the indices of the last
stored block, so that nothing is fetched for it. Result blocks without stored blocks are never visited; they are set
to zero afterwards.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.block_sparse_matmul.schedule import schedule

SLOTS = 2**16  # that fit into scalar memory, three integers each


def reason(batch: int, shape, dtype, transposed: bool):
    """Why blocks of these shapes and dtype cannot run, or None."""
    if shape[0] * shape[1] > SLOTS:
        return f"at most {SLOTS} blocks can be scheduled, got {shape[0] * shape[1]}"
    return (
        tpu.dtype_reason(dtype)
        or tpu.multiple_reason("the block rows", shape[2], tpu.LANES)
        or tpu.multiple_reason("the block width", shape[3], tpu.LANES)
        or (None if batch else "there are no rows to multiply")
    )


def matmul(x, blocks, indices, rows: int):
    """`x @ W`: `(M, rows)` to `(M, N)`."""
    plan = schedule(indices, rows // blocks.shape[2])
    return _products(x, blocks, plan, indices.shape[0], transposed=False)


def matmul_transposed(g, blocks, indices, rows: int):
    """`g @ W.T`: `(M, N)` to `(M, rows)`."""
    row_blocks = rows // blocks.shape[2]
    return _products(g, blocks, schedule(indices, row_blocks, transposed=True), row_blocks, transposed=True)


def _products(x, blocks, plan, targets: int, transposed: bool):
    """Sums of `x block @ block`, or `x block @ block.T` if `transposed`, over the runs of `plan`."""
    batch, slots = x.shape[0], plan.order.size
    blocks = blocks.reshape(slots, *blocks.shape[2:])
    outer, inner = blocks.shape[1:] if transposed else blocks.shape[:0:-1]
    total = plan.starts[-1]
    step = jnp.minimum(jnp.arange(slots), jnp.maximum(total - 1, 0))
    order, source, target = (array[step] for array in (plan.order, plan.source, plan.target))
    target = jnp.minimum(target, targets - 1)
    tile = tpu.row_tile(batch, x.dtype)

    def kernel(order_ref, source_ref, target_ref, total_ref, x_ref, block_ref, y_ref, sum_ref):
        del order_ref, source_ref
        t = pl.program_id(1)

        @pl.when((t == 0) | (target_ref[t] != target_ref[jnp.maximum(t - 1, 0)]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(t < total_ref[0])
        def _():
            contracted = (((1,), (1 if transposed else 0,)), ((), ()))
            sum_ref[...] += lax.dot_general(
                x_ref[...], block_ref[0], contracted, preferred_element_type=jnp.float32
            )

        y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(batch, tile), slots),
            in_specs=[
                pl.BlockSpec((tile, inner), lambda i, t, order, source, target, total: (i, source[t])),
                pl.BlockSpec(
                    (1, *blocks.shape[1:]), lambda i, t, order, source, target, total: (order[t], 0, 0)
                ),
            ],
            out_specs=pl.BlockSpec((tile, outer), lambda i, t, order, source, target, total: (i, target[t])),
            scratch_shapes=[pltpu.VMEM((tile, outer), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, targets * outer), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )
    y = run(order, source, target, total[None], x, blocks)
    visited = plan.starts[1:] > plan.starts[:-1]
    return jnp.where(jnp.repeat(visited, outer, total_repeat_length=targets * outer), y, 0)
