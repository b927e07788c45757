"""Block-sparse attention for Hopper GPUs: the backward pass.

Two kernels, as in FlashAttention-3 without atomics: one walks the lists of the query blocks and sums dq, one walks
the lists of the key blocks, over all heads that share the keys, and sums dk and dv. The second works on transposed
logits, keys by queries, so that its products read q and do as they lie.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_gpu
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.tiles import Tiles
from pallas_kernels.flash_gpu import LOG2E, ROWS, divide

_STAGES = 2
_WIDTH = 64  # of a fetched tile; the gradients take most registers


def backward(q, k, v, block_mask, out, lse, d_out, d_lse, config):
    """As `xla.backward`, which it calls for more than 128 channels: the sums would not fit into registers."""
    if q.shape[-1] > 128:
        return xla.backward(q, k, v, block_mask, out, lse, d_out, d_lse, config)
    t = Tiles(q, k, block_mask, config)
    scalars = xla.finite(lse) * LOG2E, xla.row_sums(out, lse, d_out, d_lse)
    args = t.queries(q), t.keys(k), t.keys(v), t.queries(d_out), *(t.scalars(x) for x in scalars)
    dq = _d_queries(t, *args)[:, : t.length].reshape(q.shape)
    dk, dv = (x[:, : t.keys_length] for x in _d_keys(t, *args))
    return dq, dk, dv


def _kernel(t, body, groups, tiles, grid, **kwargs):
    """A kernel of `groups` computing warpgroups and a fetching one, over heads, tiles and sequences."""
    return plgpu.kernel(
        functools.partial(body, t, groups),
        grid=(grid, tiles, t.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **kwargs,
    )


def _d_queries(t, q, k, v, d_out, lse, delta):
    groups = 2 if t.config.block_q % (2 * ROWS) == 0 else 1
    own, fetched = (groups, ROWS, t.channels), (_STAGES, _WIDTH, t.channels)
    kernel = _kernel(
        t,
        _d_queries_kernel,
        groups,
        q.shape[1] // (groups * ROWS),
        t.heads,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=dict(
            q_smem=flash_gpu.tile(own, q.dtype),
            do_smem=flash_gpu.tile(own, q.dtype),
            lse_smem=plgpu.SMEM((groups, ROWS), jnp.float32),
            delta_smem=plgpu.SMEM((groups, ROWS), jnp.float32),
            k_smem=flash_gpu.tile(fetched, q.dtype),
            v_smem=flash_gpu.tile(fetched, q.dtype),
            own_ready=plgpu.Barrier(num_arrivals=4, num_barriers=groups),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            free=plgpu.Barrier(num_arrivals=groups, num_barriers=_STAGES),
        ),
    )
    return kernel(q, k, v, d_out, lse, delta, *t.key_lists())


def _d_queries_kernel(
    t, groups, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, lists_ref, counts_ref, full_ref, dq_ref, **s
):
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    wg = lax.axis_index("wg")
    row = (batch * t.heads + head) * t.n + divide(tile, t.config.block_q // (groups * ROWS))[0]
    per_block = t.config.block_k // _WIDTH
    steps, full = counts_ref[row] * per_block, full_ref[row] * per_block

    def first_key(step):
        entry, part = divide(step, per_block)
        return (lists_ref[row, entry] * per_block + part) * _WIDTH

    @pl.when(wg == groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = divide(head, t.group)[0]
        where = lambda step: (batch, pl.ds(first_key(step), _WIDTH), kv_head)  # noqa: E731
        copies = [(k_ref, where, s["k_smem"]), (v_ref, where, s["v_smem"])]
        flash_gpu.keep_filled([(s["ready"], s["free"], copies)], steps, _STAGES)

    @pl.when(wg < groups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first_query = (tile * groups + wg) * ROWS
        queries = (batch, pl.ds(first_query, ROWS), head)
        scalars = (batch, head, pl.ds(first_query, ROWS))
        own = [s[name].at[wg] for name in ("q_smem", "do_smem", "lse_smem", "delta_smem")]
        sources = (q_ref.at[queries], do_ref.at[queries], lse_ref.at[scalars], delta_ref.at[scalars])
        for source, target in zip(sources, own, strict=True):
            plgpu.copy_gmem_to_smem(source, target, s["own_ready"].at[wg])
        plgpu.barrier_wait(s["own_ready"].at[wg])
        q_smem, do_smem = own[:2]
        lse, delta = (flash_gpu.per_row(flash_gpu.load(x, axis=0), (ROWS, _WIDTH)) for x in own[2:])

        def step(i, dq, masked):
            slot = divide(i, _STAGES)[1]
            plgpu.barrier_wait(s["ready"].at[slot])
            k_smem = s["k_smem"].at[slot]
            logits, slope = t.logits(flash_gpu.product(q_smem, k_smem))
            if masked:
                logits = t.mask_logits(logits, first_query, first_key(i), 0, -jnp.inf)
            d_weights = flash_gpu.product(do_smem, s["v_smem"].at[slot])
            d_logits = jnp.exp2(logits - lse) * (d_weights - delta)
            d_logits = d_logits if slope is None else d_logits * slope
            dq = flash_gpu.accumulate(dq, d_logits.astype(q_smem.dtype), k_smem)
            plgpu.barrier_arrive(s["free"].at[slot])
            return dq

        dq = flash_gpu.full((ROWS, t.channels), 0)
        dq = lax.fori_loop(0, full, functools.partial(step, masked=False), dq)
        dq = lax.fori_loop(full, steps, functools.partial(step, masked=True), dq)
        q_smem[...] = (dq * t.config.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[queries])
        plgpu.wait_smem_to_gmem(0)


def _d_keys(t, q, k, v, d_out, lse, delta):
    groups = 2 if t.config.block_k % (2 * ROWS) == 0 else 1
    own, fetched = (groups, ROWS, t.channels), (_STAGES, _WIDTH, t.channels)
    kernel = _kernel(
        t,
        _d_keys_kernel,
        groups,
        k.shape[1] // (groups * ROWS),
        t.groups,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=dict(
            k_smem=flash_gpu.tile(own, q.dtype),
            v_smem=flash_gpu.tile(own, q.dtype),
            q_smem=flash_gpu.tile(fetched, q.dtype),
            do_smem=flash_gpu.tile(fetched, q.dtype),
            lse_smem=plgpu.SMEM((_STAGES, _WIDTH), jnp.float32),
            delta_smem=plgpu.SMEM((_STAGES, _WIDTH), jnp.float32),
            own_ready=plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            ready=plgpu.Barrier(num_arrivals=4, num_barriers=_STAGES),
            free=plgpu.Barrier(num_arrivals=groups, num_barriers=_STAGES),
        ),
    )
    return kernel(q, k, v, d_out, lse, delta, *t.query_lists())


def _d_keys_kernel(
    t,
    groups,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    lists_ref,
    counts_ref,
    full_ref,
    dk_ref,
    dv_ref,
    **s,
):
    batch, group, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    wg = lax.axis_index("wg")
    row = (batch * t.groups + group) * t.m + divide(tile, t.config.block_k // (groups * ROWS))[0]
    per_block = t.config.block_q // _WIDTH
    steps, full = counts_ref[row] * per_block, full_ref[row] * per_block

    def head_and_first_query(step):
        entry, part = divide(step, per_block)
        head, block = divide(lists_ref[row, entry], t.n)
        return group * t.group + head, (block * per_block + part) * _WIDTH

    @pl.when(wg == groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def queries(step):
            head, first = head_and_first_query(step)
            return batch, pl.ds(first, _WIDTH), head

        def scalars(step):
            head, first = head_and_first_query(step)
            return batch, head, pl.ds(first, _WIDTH)

        copies = [
            (q_ref, queries, s["q_smem"]),
            (do_ref, queries, s["do_smem"]),
            (lse_ref, scalars, s["lse_smem"]),
            (delta_ref, scalars, s["delta_smem"]),
        ]
        flash_gpu.keep_filled([(s["ready"], s["free"], copies)], steps, _STAGES)

    @pl.when(wg < groups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first_key = (tile * groups + wg) * ROWS
        keys = (batch, pl.ds(first_key, ROWS), group)
        k_smem, v_smem = s["k_smem"].at[wg], s["v_smem"].at[wg]
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem, s["own_ready"].at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem, s["own_ready"].at[wg])
        plgpu.barrier_wait(s["own_ready"].at[wg])
        shape = (ROWS, _WIDTH)

        def step(i, sums, masked):
            dk, dv = sums
            slot = divide(i, _STAGES)[1]
            plgpu.barrier_wait(s["ready"].at[slot])
            q_smem, do_smem = s["q_smem"].at[slot], s["do_smem"].at[slot]
            logits, slope = t.logits(flash_gpu.product(k_smem, q_smem))
            if masked:
                logits = t.mask_logits(logits, head_and_first_query(i)[1], first_key, 1, -jnp.inf)
            lse, delta = (flash_gpu.load(s[name].at[slot], axis=1) for name in ("lse_smem", "delta_smem"))
            weights = jnp.exp2(logits - flash_gpu.per_column(lse, shape))
            dv = flash_gpu.accumulate(dv, weights.astype(q_smem.dtype), do_smem)
            d_weights = flash_gpu.product(v_smem, do_smem)
            d_logits = weights * (d_weights - flash_gpu.per_column(delta, shape))
            d_logits = d_logits if slope is None else d_logits * slope
            dk = flash_gpu.accumulate(dk, d_logits.astype(q_smem.dtype), q_smem)
            plgpu.barrier_arrive(s["free"].at[slot])
            return dk, dv

        sums = flash_gpu.full((ROWS, t.channels), 0), flash_gpu.full((ROWS, t.channels), 0)
        sums = lax.fori_loop(0, full, functools.partial(step, masked=False), sums)
        dk, dv = lax.fori_loop(full, steps, functools.partial(step, masked=True), sums)
        k_smem[...] = (dk * t.config.scale).astype(k_smem.dtype)
        v_smem[...] = dv.astype(v_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[keys])
        plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[keys])
        plgpu.wait_smem_to_gmem(0)
