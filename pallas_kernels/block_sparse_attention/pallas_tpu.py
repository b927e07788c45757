"""Block-sparse attention for TPUs: the lists of blocks are scalars that are known before the blocks are fetched.

The grid runs over rows and, innermost and in sequence, over the list of the row; the index maps of keys and values
look the list up, so only selected blocks travel to the chip. The grid is as long as the longest list. After the end
of its own list a row asks for its last block again, which starts no new transfer, and computes nothing.

Blocks lie one after another, (rows, block, D), so that any block size is a legal tile; multiples of 128 are fast.
In the backward pass queries lie along the lanes, where their log-sum-exps then need no copies.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.blocks import Problem
from pallas_kernels.block_sparse_attention.xla import finite, row_sums

_LANES = 128
_MASKED = -1e30  # finite: a row that has seen no key yet must not subtract infinities
_SCALARS = 2**16  # entries of the lists that one call keeps in scalar memory, 256 KiB


def unavailable(q, config):
    """Why this cannot run here, or None."""
    del q, config
    backend = jax.default_backend()
    return None if backend == "tpu" else f"it needs a TPU and the default backend is {backend}"


def forward(q, k, v, block_mask, config, interpret=False):
    """As `xla.forward`."""
    p = Problem(q, k, block_mask, config)
    lists, counts = p.key_lists()
    shape = (p.block_q, q.shape[-1])
    out, lse = _call(
        functools.partial(_forward_kernel, p),
        lists,
        counts,
        rows=[p.query_blocks(q)],
        entries=[p.key_blocks(k), p.key_blocks(v)],
        outs=[(shape, q.dtype), ((p.block_q, _LANES), jnp.float32)],
        scratch=[(p.block_q, _LANES), (p.block_q, _LANES), shape],
        interpret=interpret,
    )
    return p.queries(out), p.query_scalars(lse[..., 0])


def backward(q, k, v, block_mask, out, lse, d_out, d_lse, config, interpret=False):
    """As `xla.backward`."""
    p = Problem(q, k, block_mask, config)
    keys = [p.key_blocks(k), p.key_blocks(v)]
    queries = [p.query_blocks(q), p.query_blocks(d_out)]
    queries += [p.scalar_blocks(x)[:, None] for x in (finite(lse), row_sums(out, lse, d_out, d_lse))]
    shape = (p.block_q, q.shape[-1])
    (dq,) = _call(
        functools.partial(_d_queries_kernel, p), *p.key_lists(), rows=queries, entries=keys,
        outs=[(shape, q.dtype)], scratch=[shape], interpret=interpret,
    )  # fmt: skip
    shape = (p.block_k, q.shape[-1])
    dk, dv = _call(
        functools.partial(_d_keys_kernel, p), *p.query_lists(), rows=keys, entries=queries,
        outs=[(shape, k.dtype), (shape, v.dtype)], scratch=[shape, shape], interpret=interpret,
    )  # fmt: skip
    return p.queries(dq), p.keys(dk), p.keys(dv)


def _call(kernel, lists, counts, *, rows, entries, outs, scratch, interpret):
    """Runs a kernel over every row and every entry of its list.

    Args:
      kernel: takes (row, entry, step, number of entries), then the blocks of `rows`, `entries`, `outs` and `scratch`.
      lists, counts: (R, limit) and (R,) int32.
      rows: arrays (R, ...), of which the kernel sees the block of its row.
      entries: arrays of which it sees the block that the list names.
      outs: shapes and dtypes of a row's results.
    """
    limit = lists.shape[1]
    steps = jnp.maximum(counts.max(), 1)
    by_row = lambda x: pl.BlockSpec((None, *x), lambda r, t, *_: (r, *(0 for _ in x)))  # noqa: E731

    def listed(r, t, first, lists, counts):
        return jnp.maximum(lists[r * limit + jnp.minimum(t, jnp.maximum(counts[r] - 1, 0))], 0)

    def by_entry(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda *args: (listed(*args), *(0 for _ in x.shape[1:])))

    def body(first, lists, counts, *refs):
        r, t = pl.program_id(0), pl.program_id(1)
        kernel(first[0] + r, listed(r, t, first, lists, counts), t, counts[r], *refs)

    def some_rows(first, lists, counts, *rows):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(lists.shape[0], steps),
            in_specs=[by_row(x.shape[1:]) for x in rows] + [by_entry(x) for x in entries],
            out_specs=[by_row(shape) for shape, _ in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )
        return pl.pallas_call(
            body,
            grid_spec=grid,
            out_shape=[jax.ShapeDtypeStruct((lists.shape[0], *shape), dtype) for shape, dtype in outs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
        )(first, lists.ravel(), counts, *rows, *entries)

    return _in_chunks(some_rows, max(1, _SCALARS // limit), lists, counts, *rows)


def _in_chunks(function, size, *rows):
    """`function(first row, *rows)`, called for at most `size` rows at a time."""
    total = rows[0].shape[0]
    if total <= size:
        return function(jnp.zeros(1, jnp.int32), *rows)
    chunks = -(-total // size)
    size = -(-total // chunks)
    padded = [jnp.pad(x, ((0, chunks * size - total), *((0, 0),) * (x.ndim - 1))) for x in rows]
    split = [x.reshape(chunks, size, *x.shape[1:]) for x in padded]
    first = jnp.arange(chunks, dtype=jnp.int32)[:, None] * size
    outs = lax.map(lambda args: function(*args), (first, *split))
    return [out.reshape(-1, *out.shape[2:])[:total] for out in outs]


def _forward_kernel(p, row, entry, t, count, q_ref, k_ref, v_ref, out_ref, lse_ref, top_ref, total_ref, acc_ref):
    @pl.when(t == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, _MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(t < count)
    def _():
        logits, seen, _ = _logits(p, q_ref[...], k_ref[...], row, entry, query_axis=0)
        logits = jnp.where(seen, logits, _MASKED)
        top = top_ref[:, :1]
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - new_top)
        decay = jnp.exp(top - new_top)
        total = decay * total_ref[:, :1] + weights.sum(-1, keepdims=True)
        acc_ref[...] = decay * acc_ref[...] + _dot(weights.astype(v_ref.dtype), v_ref[...], 1, 0)
        top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        empty = top_ref[...] == _MASKED  # then the sums hold masked keys, or nothing
        total = jnp.where(empty, 1, total_ref[...])
        lse_ref[...] = jnp.where(empty, -jnp.inf, top_ref[...] + jnp.log(total))
        out_ref[...] = jnp.where(empty[:, :1], 0, acc_ref[...] / total[:, :1]).astype(out_ref.dtype)


def _d_queries_kernel(p, row, entry, t, count, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, dq_ref, acc_ref):
    @pl.when(t == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(t < count)
    def _():
        d_logits, _ = _d_logits(p, row, entry, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref)
        acc_ref[...] += _dot(d_logits.astype(k_ref.dtype), k_ref[...], 0, 0)

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
        dk_acc[...] += _dot(d_logits.astype(q_ref.dtype), q_ref[...], 1, 0)
        dv_acc[...] += _dot(weights.astype(do_ref.dtype), do_ref[...], 1, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        dk_ref[...] = (p.config.scale * dk_acc[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _d_logits(p, query_row, key_row, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref):
    """Gradient of the scaled logits and the weights, both (block_k, block_q)."""
    logits, seen, slope = _logits(p, k_ref[...], q_ref[...], query_row, key_row, query_axis=1)
    weights = jnp.where(seen, jnp.exp(logits - lse_ref[...]), 0)
    d_weights = _dot(v_ref[...], do_ref[...], 1, 1)
    return weights * (d_weights - delta_ref[...]) * slope, weights


def _logits(p, a, b, query_row, key_row, query_axis):
    """Logits of a pair of blocks, which of them are seen, and their derivative by the scaled product."""
    logits = p.config.scale * _dot(a, b, 1, 1)
    slope = 1.0
    if p.config.soft_cap is not None:
        tanh = jnp.tanh(logits / p.config.soft_cap)
        logits, slope = p.config.soft_cap * tanh, 1 - tanh * tanh
    key = key_row % p.m * p.block_k + lax.broadcasted_iota(jnp.int32, logits.shape, 1 - query_axis)
    seen = key < p.keys_length
    if p.config.causal:
        query = query_row % p.n * p.block_q + lax.broadcasted_iota(jnp.int32, logits.shape, query_axis)
        seen &= query >= key
    return logits, seen, slope


def _dot(a, b, axis_of_a, axis_of_b):
    contracted = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
