"""Block-sparse attention for Hopper GPUs, in Mosaic GPU.

After FlashAttention-3 [Shah et al., 2024] and its version in JAX: a thread block holds 64 or 128 queries of one
query block, 64 for each computing warpgroup, while another warpgroup fetches tiles of keys and values through rings
of buffers, here those that the query block's list names. Both computing warpgroups walk the same list; a barrier
between them lets one use the tensor cores while the other computes exponentials. Exponentials are to base 2.

Lists name first the blocks in which every query sees every key, then those that need a mask. The backward pass is in
`pallas_gpu_backward`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_gpu, hopper
from pallas_kernels.block_sparse_attention.pallas_gpu_backward import backward
from pallas_kernels.block_sparse_attention.tiles import Tiles
from pallas_kernels.flash_gpu import LOG2E, MASKED, ROWS, divide, per_row

__all__ = ["backward", "forward", "reason"]


def reason(q, config):
    """Why the kernels do not take these arguments, or None."""
    return (
        hopper.multiple_reason("block_q", config.block_q, ROWS)
        or hopper.multiple_reason("block_k", config.block_k, ROWS)
        or flash_gpu.reason(q.dtype, q.shape[-1])
    )


def forward(q, k, v, block_mask, config):
    """As `xla.forward`."""
    t = Tiles(q, k, block_mask, config)
    groups = 2 if config.block_q % (2 * ROWS) == 0 else 1
    width = 128 if config.block_k % 128 == 0 and t.channels <= 128 else 64
    stages = 2 if t.channels * width > 64 * 128 else 4
    length = t.n * config.block_q
    out, lse = plgpu.kernel(
        functools.partial(_forward_kernel, t, groups, width, stages),
        out_type=(
            jax.ShapeDtypeStruct((t.batch, length, t.heads, t.channels), q.dtype),
            jax.ShapeDtypeStruct((t.batch, t.heads, length), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=flash_gpu.tile((groups, ROWS, t.channels), q.dtype),
            k_smem=flash_gpu.tile((stages, width, t.channels), q.dtype),
            v_smem=flash_gpu.tile((stages, width, t.channels), q.dtype),
            lse_smem=plgpu.SMEM((groups, ROWS), jnp.float32),
            q_ready=plgpu.Barrier(num_barriers=groups),
            k_ready=plgpu.Barrier(num_barriers=stages),
            v_ready=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            turn=plgpu.Barrier(num_arrivals=groups),
        ),
        grid=(t.heads, length // (groups * ROWS), t.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(t.queries(q), t.keys(k), t.keys(v), *t.key_lists())
    return out[:, : t.length].reshape(q.shape), lse[..., : t.length].reshape(t.batch, t.groups, t.group, -1)


def _forward_kernel(
    t, groups, width, stages, q_ref, k_ref, v_ref, lists_ref, counts_ref, full_ref, out_ref, lse_ref, **s
):
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    wg = lax.axis_index("wg")
    row = (batch * t.heads + head) * t.n + divide(tile, t.config.block_q // (groups * ROWS))[0]
    per_block = t.config.block_k // width
    steps, full = counts_ref[row] * per_block, full_ref[row] * per_block

    def first_key(step):
        entry, part = divide(step, per_block)
        return (lists_ref[row, entry] * per_block + part) * width

    @pl.when(wg == groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = divide(head, t.group)[0]
        where = lambda step: (batch, pl.ds(first_key(step), width), kv_head)  # noqa: E731
        rings = [
            (s["k_ready"], s["k_free"], [(k_ref, where, s["k_smem"])]),
            (s["v_ready"], s["v_free"], [(v_ref, where, s["v_smem"])]),
        ]
        flash_gpu.keep_filled(rings, steps, stages)

    @pl.when(wg < groups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first_query = (tile * groups + wg) * ROWS
        queries = (batch, pl.ds(first_query, ROWS), head)
        q_smem, lse_smem = s["q_smem"].at[wg], s["lse_smem"].at[wg]
        plgpu.copy_gmem_to_smem(q_ref.at[queries], q_smem, s["q_ready"].at[wg])
        plgpu.barrier_wait(s["q_ready"].at[wg])
        turns = flash_gpu.Turns(s["turn"], wg, groups)
        step = functools.partial(_forward_step, t, stages, q_smem, s, turns, first_query, first_key)
        state = flash_gpu.column(MASKED), flash_gpu.column(0), flash_gpu.full((ROWS, t.channels), 0)
        turns.begin()
        state = lax.fori_loop(0, full, functools.partial(step, masked=False), state)
        top, total, acc = lax.fori_loop(full, steps, functools.partial(step, masked=True), state)
        turns.end()
        empty = top <= MASKED / 2
        total = jnp.where(empty, 1.0, total)
        acc *= per_row(jnp.where(empty, 0.0, 1 / total), acc.shape)
        q_smem[...] = acc.astype(q_smem.dtype)
        lse_smem[...] = jnp.where(empty, -jnp.inf, top / LOG2E + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_ref.at[queries])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, pl.ds(first_query, ROWS)])
        plgpu.wait_smem_to_gmem(0)


def _forward_step(t, stages, q_smem, s, turns, first_query, first_key, step, state, masked):
    top, total, acc = state
    slot = divide(step, stages)[1]
    plgpu.barrier_wait(s["k_ready"].at[slot])
    logits, _ = t.logits(flash_gpu.product(q_smem, s["k_smem"].at[slot], turns.meet))
    plgpu.barrier_arrive(s["k_free"].at[slot])
    if masked:
        logits = t.mask_logits(logits, first_query, first_key(step), 0, MASKED)
    new_top = jnp.maximum(top, logits.max(axis=1))
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits - per_row(new_top, logits.shape))
    acc *= per_row(decay, acc.shape)
    total = total * decay + weights.sum(axis=1)
    halves = weights.astype(q_smem.dtype)
    turns.arrive()
    plgpu.barrier_wait(s["v_ready"].at[slot])
    turns.wait()
    acc = flash_gpu.accumulate(acc, halves, s["v_smem"].at[slot])
    plgpu.barrier_arrive(s["v_free"].at[slot])
    return new_top, total, acc
