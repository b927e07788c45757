"""Block-sparse attention for TPUs: a grid over rows and their lists of blocks (`pallas_kernels.flash_tpu`).

Blocks lie one after another, (rows, block, D), so that any block size is a legal tile; multiples of 128 are fast.
In the backward pass queries lie along the lanes, where their log-sum-exps then need no copies.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import flash_tpu, tpu
from pallas_kernels.block_sparse_attention.blocks import Problem
from pallas_kernels.block_sparse_attention.xla import finite, row_sums
from pallas_kernels.flash_tpu import MASKED, dot
from pallas_kernels.tpu import LANES


def reason(q, config):
    """Why the kernels do not take these arguments, or None."""
    del config  # all blocks can
    return tpu.dtype_reason(q.dtype)


def forward(q, k, v, block_mask, config):
    """As `xla.forward`."""
    p = Problem(q, k, block_mask, config)
    shape = (p.block_q, q.shape[-1])
    out, lse = flash_tpu.over_lists(
        functools.partial(_forward_kernel, p),
        *p.key_lists(),
        rows=[p.query_blocks(q)],
        entries=[_listed(p.key_blocks(k)), _listed(p.key_blocks(v))],
        outs=[(shape, q.dtype), ((p.block_q, LANES), jnp.float32)],
        scratch=[(p.block_q, LANES), (p.block_q, LANES), shape],
    )
    return p.queries(out), p.query_scalars(lse[..., 0])


def backward(q, k, v, block_mask, out, lse, d_out, d_lse, config):
    """As `xla.backward`."""
    p = Problem(q, k, block_mask, config)
    keys = [p.key_blocks(k), p.key_blocks(v)]
    queries = [p.query_blocks(q), p.query_blocks(d_out)]
    queries += [p.scalar_blocks(x)[:, None] for x in (finite(lse), row_sums(out, lse, d_out, d_lse))]
    shape = (p.block_q, q.shape[-1])
    (dq,) = flash_tpu.over_lists(
        functools.partial(_d_queries_kernel, p), *p.key_lists(), rows=queries, entries=[_listed(x) for x in keys],
        outs=[(shape, q.dtype)], scratch=[shape],
    )  # fmt: skip
    shape = (p.block_k, q.shape[-1])
    dk, dv = flash_tpu.over_lists(
        functools.partial(_d_keys_kernel, p), *p.query_lists(), rows=keys, entries=[_listed(x) for x in queries],
        outs=[(shape, k.dtype), (shape, v.dtype)], scratch=[shape, shape],
    )  # fmt: skip
    return p.queries(dq), p.keys(dk), p.keys(dv)


def _listed(blocks):
    """Blocks of which the list names the one of a step."""
    return blocks, (None, *blocks.shape[1:]), lambda row, entry: (entry, *(0 for _ in blocks.shape[1:]))


def _forward_kernel(p, row, entry, t, count, q_ref, k_ref, v_ref, out_ref, lse_ref, *state):
    @pl.when(t == 0)
    def _():
        flash_tpu.softmax_start(*state)

    @pl.when(t < count)
    def _():
        logits, seen, _ = _logits(p, q_ref[...], k_ref[...], row, entry, query_axis=0)
        flash_tpu.softmax_step(jnp.where(seen, logits, MASKED), v_ref[...], *state)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        flash_tpu.softmax_end(out_ref, lse_ref, *state)


def _d_queries_kernel(
    p, row, entry, t, count, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, dq_ref, acc_ref
):
    @pl.when(t == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(t < count)
    def _():
        d_logits, _ = _d_logits(p, row, entry, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref)
        acc_ref[...] += dot(d_logits.astype(k_ref.dtype), k_ref[...], 0, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        dq_ref[...] = (p.config.scale * acc_ref[...]).astype(dq_ref.dtype)


def _d_keys_kernel(
    p, row, entry, t, count, k_ref, v_ref, q_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, dk_acc, dv_acc
):
    @pl.when(t == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(t < count)
    def _():
        d_logits, weights = _d_logits(p, entry, row, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref)
        dk_acc[...] += dot(d_logits.astype(q_ref.dtype), q_ref[...], 1, 0)
        dv_acc[...] += dot(weights.astype(do_ref.dtype), do_ref[...], 1, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        dk_ref[...] = (p.config.scale * dk_acc[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _d_logits(p, query_row, key_row, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref):
    """Gradient of the scaled logits and the weights, both (block_k, block_q)."""
    logits, seen, slope = _logits(p, k_ref[...], q_ref[...], query_row, key_row, query_axis=1)
    weights = jnp.where(seen, jnp.exp(logits - lse_ref[...]), 0)
    d_weights = dot(v_ref[...], do_ref[...], 1, 1)
    return weights * (d_weights - delta_ref[...]) * slope, weights


def _logits(p, a, b, query_row, key_row, query_axis):
    """Logits of a pair of blocks, which of them are seen, and their derivative by the scaled product."""
    logits = p.config.scale * dot(a, b, 1, 1)
    slope = 1.0
    if p.config.soft_cap is not None:
        tanh = jnp.tanh(logits / p.config.soft_cap)
        logits, slope = p.config.soft_cap * tanh, 1 - tanh * tanh
    key = lax.rem(key_row, p.m) * p.block_k + lax.broadcasted_iota(jnp.int32, logits.shape, 1 - query_axis)
    seen = key < p.keys_length
    if p.config.causal:
        query = lax.rem(query_row, p.n) * p.block_q + lax.broadcasted_iota(
            jnp.int32, logits.shape, query_axis
        )
        seen &= query >= key
    return logits, seen, slope
