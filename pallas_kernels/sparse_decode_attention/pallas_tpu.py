"""Decoding on TPUs: a grid over sequences and heads of the cache, and over the list of pages or tiles of tokens.

A page of one head is a tile of the pool seen as (P, page, Hkv * D): nothing is copied before it is read. Packed
vectors are expanded in the kernel with two small matrix products, which bring the bytes of the bitmap to the channels
and count the stored channels before each, and one gather along the lanes.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import flash_tpu, tpu
from pallas_kernels.flash_tpu import MASKED, dot
from pallas_kernels.sparse_decode_attention.xla import selected
from pallas_kernels.tpu import LANES

_TOKENS = 128  # of a tile of packed vectors


def paged_reason(q, k_pages):
    """Why `paged` does not take these arguments, or None."""
    if q.shape[-1] % LANES and k_pages.shape[2] > 1:
        return (
            f"with several heads in the cache their channels must be a multiple of {LANES}, got {q.shape[-1]}"
        )
    return tpu.dtype_reason(q.dtype)


def bitmap_reason(q):
    """Why `bitmap` does not take these arguments, or None."""
    if q.shape[-1] != LANES:
        return f"heads must have {LANES} channels, got {q.shape[-1]}"
    return tpu.dtype_reason(q.dtype)


def paged(q, k_pages, v_pages, page_table, lengths, config):
    """As `xla.paged`."""
    page, groups, channels = k_pages.shape[1:]
    pages, tokens = selected(page_table, lengths, page)

    def entry(pool):
        pool = pool.reshape(pool.shape[0], page, groups * channels)
        return pool, (None, page, channels), lambda row, index: (index, 0, lax.rem(row, groups))

    kernel = functools.partial(_kernel, config, page, lambda ref: ref[...])
    return _run(kernel, q, pages, tokens, [entry(k_pages), entry(v_pages)], page)


def bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config):
    """As `xla.bitmap`."""
    groups, length = k_bits.shape[1:3]
    tiles = -(-length // _TOKENS)

    def entry(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.int32)  # bytes have no layout of their own for tiles this narrow
        x = jnp.pad(x, ((0, 0), (0, 0), (0, tiles * _TOKENS - length), (0, 0)))
        x = x.reshape(-1, _TOKENS, x.shape[-1])
        return x, (None, *x.shape[1:]), lambda row, index: (row * tiles + index, 0, 0)

    rows = q.shape[0] * groups
    lists = jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32), (rows, tiles))
    kernel = functools.partial(_kernel, config, _TOKENS, functools.partial(_expand, q.dtype))
    entries = [entry(x) for x in (k_bits, k_values, v_bits, v_values)]
    return _run(kernel, q, lists, jnp.repeat(lengths, groups), entries, _TOKENS)


def _run(kernel, q, lists, tokens, entries, unit):
    shape = q.shape[2:]
    state = (shape[0], LANES)
    out, lse = flash_tpu.over_lists(
        kernel,
        lists,
        tokens,
        rows=[q.reshape(-1, *shape)],
        entries=entries,
        outs=[(shape, q.dtype), (state, jnp.float32)],
        scratch=[state, state, shape],
        unit=unit,
    )
    return out.reshape(q.shape), lse[..., 0].reshape(q.shape[:3])


def _kernel(config, unit, read, row, entry, t, tokens, q_ref, *refs):
    """`refs`: keys, values, output, log-sum-exp and state; keys and values one or two refs each."""
    del row, entry
    caches, (out_ref, lse_ref), state = refs[:-5], refs[-5:-3], refs[-3:]
    half = len(caches) // 2

    @pl.when(t == 0)
    def _():
        flash_tpu.softmax_start(*state)

    @pl.when(t * unit < tokens)
    def _():
        logits = config.scale * dot(q_ref[...], read(*caches[:half]), 1, 1)
        if config.soft_cap is not None:
            logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
        position = t * unit + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        flash_tpu.softmax_step(jnp.where(position < tokens, logits, MASKED), read(*caches[half:]), *state)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        flash_tpu.softmax_end(out_ref, lse_ref, *state)


def _expand(dtype, bits_ref, values_ref):
    """Packed vectors (tokens, ...) as (tokens, 128)."""
    tokens, budget = values_ref.shape
    lane = lax.broadcasted_iota(jnp.int32, (tokens, LANES), 1)
    from_, to = (lax.broadcasted_iota(jnp.int32, (bits_ref.shape[1], LANES), axis) for axis in (0, 1))
    spread = (from_ == to >> 3).astype(jnp.bfloat16)
    # products of integers up to 256 are exact
    byte = dot(bits_ref[...].astype(jnp.bfloat16), spread, 1, 0).astype(jnp.int32)
    stored = (byte >> (lane & 7)) & 1
    from_, to = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    before = dot(stored.astype(jnp.bfloat16), (from_ < to).astype(jnp.bfloat16), 1, 0).astype(jnp.int32)
    from_, to = (lax.broadcasted_iota(jnp.int32, (budget, LANES), axis) for axis in (0, 1))
    values = dot(values_ref[...], (from_ == to).astype(values_ref.dtype), 1, 0)
    gathered = jnp.take_along_axis(values, before, axis=1, mode="promise_in_bounds")
    return jnp.where(stored == 1, gathered, 0).astype(dtype)
