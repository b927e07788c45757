"""Decoding on Hopper GPUs, in Mosaic GPU: the tokens of a sequence are divided among several thread blocks.

One computing warpgroup holds the queries of a group of heads as rows of its matrix products (64 rows, most of them
idle: decoding waits for memory, not for tensor cores), while another fetches pages or packed tokens through rings of
buffers, 64 tokens at a time. Packed tokens are expanded to a tile in shared memory. Every thread block returns its
part of the softmax with its log-sum-exp; they are merged after.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_gpu, hopper
from pallas_kernels.flash_gpu import LOG2E, MASKED, ROWS, divide, per_row
from pallas_kernels.sparse_decode_attention import xla
from pallas_kernels.sparse_decode_attention.expand import expand

_TOKENS = 64  # of a tile
_BLOCKS = 132  # thread blocks to aim at: one for each multiprocessor


def paged_reason(q, k_pages):
    """Why `paged` does not take these arguments, or None."""
    page, groups = k_pages.shape[1:3]
    if page % 8 or (page % _TOKENS and _TOKENS % page):
        return f"pages must have 8, 16, 32 or a multiple of {_TOKENS} tokens, got {page}"
    return _reason(q, groups)


def bitmap_reason(q, keys, values):
    """Why `bitmap` does not take q and packed keys and values of these shapes, or None."""
    if q.shape[-1] not in (64, 128):
        return f"heads must have 64 or 128 channels, got {q.shape[-1]}"
    return (
        hopper.multiple_reason("the budget of keys", keys[-1], 8)
        or hopper.multiple_reason("the budget of values", values[-1], 8)
        or _reason(q, keys[1])
    )


def _reason(q, groups):
    if q.shape[1] > groups * ROWS:
        return f"at most {ROWS} heads may share keys, got {q.shape[1] // groups}"
    return flash_gpu.reason(q.dtype, q.shape[-1])


class _Call(NamedTuple):
    """What `_kernel` knows of a call.

    Attributes:
      rings: (input refs, scratch, batch, group, first tile) -> rings for `flash_gpu.keep_filled`.
      tile: (scratch, "k" or "v", slot) -> the tile (64 tokens, channels) of a filled buffer.
    """

    rings: Callable
    tile: Callable
    config: Any
    height: int
    splits: int
    stages: int


def paged(q, k_pages, v_pages, page_table, lengths, config):
    """As `xla.paged`."""
    page = k_pages.shape[1]
    if page > _TOKENS:  # a page is several
        parts = page // _TOKENS
        k_pages, v_pages = (x.reshape(-1, _TOKENS, *x.shape[2:]) for x in (k_pages, v_pages))
        table = page_table[..., None] * parts + jnp.arange(parts, dtype=page_table.dtype)
        page_table = jnp.where(page_table[..., None] < 0, -1, table).reshape(*page_table.shape[:2], -1)
        page = _TOKENS
    pages, tokens = xla.selected(page_table, lengths, page)
    per_tile = _TOKENS // page
    # after the last page anything may be read
    pages = jnp.pad(jnp.maximum(pages, 0), ((0, 0), (0, -pages.shape[1] % per_tile)))

    def rings(refs, s, batch, group, first):
        k_ref, v_ref, pages_ref = refs
        row = batch * q.shape[1] + group

        def part(source, buffers, i):
            where = lambda step: (pages_ref[row, (first + step) * per_tile + i], slice(None), group)  # noqa: E731
            return source, where, buffers.at[:, pl.ds(i * page, page)]

        copies = [
            [part(ref, s[x], i) for i in range(per_tile)] for ref, x in ((k_ref, "k_smem"), (v_ref, "v_smem"))
        ]
        return [(s["k_ready"], s["k_free"], copies[0]), (s["v_ready"], s["v_free"], copies[1])]

    stages = 2 if q.shape[-1] > 128 else 4
    ring = flash_gpu.tile((stages, _TOKENS, q.shape[-1]), q.dtype)
    scratch = dict(k_smem=ring, v_smem=ring) | _barriers(per_tile, stages)
    tile = lambda s, x, slot: s[f"{x}_smem"].at[slot]  # noqa: E731
    make = functools.partial(_Call, rings, tile, config, stages=stages)
    return _run(make, q, tokens, pages.shape[1] // per_tile, (k_pages, v_pages, pages), scratch)


def bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config):
    """As `xla.bitmap`. Copies the cache first if its length is no multiple of 64."""
    length, channels = k_bits.shape[2], q.shape[-1]
    words = _TOKENS * channels // 32  # of a tile's bitmaps

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, -length % _TOKENS), (0, 0)))

    def as_words(x):
        x = padded(x)
        x = lax.bitcast_convert_type(x.reshape(*x.shape[:3], -1, 4), jnp.int32)
        return x.reshape(*x.shape[:2], -1)

    def rings(refs, s, batch, group, first):
        def ring(x, bits_ref, values_ref):
            bits = lambda step: (batch, group, pl.ds((first + step) * words, words))  # noqa: E731
            values = lambda step: (batch, group, pl.ds((first + step) * _TOKENS, _TOKENS))  # noqa: E731
            copies = [(bits_ref, bits, s[f"{x}_bits"]), (values_ref, values, s[f"{x}_values"])]
            return s[f"{x}_ready"], s[f"{x}_free"], copies

        return [ring("k", *refs[:2]), ring("v", *refs[2:])]

    def tile(s, x, slot):
        expanded = expand(s[f"{x}_bits"].at[slot], s[f"{x}_values"].at[slot], channels)
        s[f"{x}_tile"][...] = expanded
        plgpu.commit_smem()
        return s[f"{x}_tile"]

    stages = 4
    scratch = dict(
        k_tile=flash_gpu.tile((_TOKENS, channels), q.dtype),
        v_tile=flash_gpu.tile((_TOKENS, channels), q.dtype),
    )
    for x, values in (("k", k_values), ("v", v_values)):
        scratch[f"{x}_bits"] = plgpu.SMEM((stages, words), jnp.int32)
        scratch[f"{x}_values"] = plgpu.SMEM((stages, _TOKENS, values.shape[-1]), q.dtype)
    scratch |= _barriers(2, stages)
    make = functools.partial(_Call, rings, tile, config, stages=stages)
    inputs = as_words(k_bits), padded(k_values), as_words(v_bits), padded(v_values)
    return _run(make, q, jnp.repeat(lengths, q.shape[1]), -(-length // _TOKENS), inputs, scratch)


def _barriers(copies, stages):
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_barriers=stages)
    return dict(k_ready=ready, v_ready=ready, k_free=free, v_free=free)


def _run(make, q, tokens, tiles, inputs, scratch):
    """Attention of every row to its first `tokens` keys, at most `tiles` tiles."""
    batch, groups, group, channels = q.shape
    height = -(-group // 8) * 8
    splits = min(tiles, max(1, _BLOCKS // (batch * groups)))
    call = make(height=height, splits=splits)
    rows_of_128_bytes = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    out, lse = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, groups, height, channels), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, groups, height), jnp.float32),
        ),
        scratch_types=scratch
        | dict(
            q_smem=flash_gpu.tile((ROWS, channels), q.dtype),
            out_smem=plgpu.SMEM((ROWS, channels), jnp.float32, transforms=rows_of_128_bytes),
            lse_smem=plgpu.SMEM((ROWS,), jnp.float32),
            q_ready=plgpu.Barrier(),
        ),
        grid=(splits, groups, batch),
        grid_names=("split", "group", "batch"),
        num_threads=2,
        thread_name="wg",
        # maxima and sums of rows stay within a warp; with 256 channels every byte of shared memory is needed
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(jnp.pad(q, ((0, 0), (0, 0), (0, height - group), (0, 0))), tokens, *inputs)
    out, lse = xla.merge(out[..., :group, :], lse[..., :group])
    return out.astype(q.dtype), lse


def _kernel(call, q_ref, tokens_ref, *refs, **s):
    refs, out_ref, lse_ref = refs[:-2], *refs[-2:]
    batch, group, split = (lax.axis_index(name) for name in ("batch", "group", "split"))
    groups, channels = q_ref.shape[1], q_ref.shape[3]
    tokens = tokens_ref[batch * groups + group]
    tiles = divide(tokens + (_TOKENS - 1), _TOKENS)[0]
    first = divide(tiles * split, call.splits)[0]
    steps = divide(tiles * (split + 1), call.splits)[0] - first

    @pl.when(lax.axis_index("wg") == 1)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        flash_gpu.keep_filled(call.rings(refs, s, batch, group, first), steps, call.stages)

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        plgpu.set_max_registers(232, action="increase")
        some = pl.ds(0, call.height)
        # the other rows of the tile hold anything; nothing of theirs reaches these
        plgpu.copy_gmem_to_smem(q_ref.at[batch, group], s["q_smem"].at[some], s["q_ready"])
        plgpu.barrier_wait(s["q_ready"])
        step = lambda i, state: _step(call, i, tokens - (first + i) * _TOKENS, s, state)  # noqa: E731
        start = flash_gpu.column(MASKED), flash_gpu.column(0), flash_gpu.full((ROWS, channels), 0)
        _write(lax.fori_loop(0, steps, step, start), s)
        where = split, batch, group
        plgpu.copy_smem_to_gmem(s["out_smem"].at[some], out_ref.at[where])
        plgpu.copy_smem_to_gmem(s["lse_smem"].at[some], lse_ref.at[where])
        plgpu.wait_smem_to_gmem(0)


def _step(call, i, remaining, s, state):
    """One tile of an online softmax to base 2, of which `remaining` tokens exist."""
    top, total, acc = state
    slot = divide(i, call.stages)[1]
    plgpu.barrier_wait(s["k_ready"].at[slot])
    products = flash_gpu.product(s["q_smem"], call.tile(s, "k", slot))
    plgpu.barrier_arrive(s["k_free"].at[slot])
    logits, _ = flash_gpu.logits(products, call.config.scale, call.config.soft_cap)
    logits = jnp.where(flash_gpu.positions(logits.shape, 1) < remaining, logits, MASKED)
    new_top = jnp.maximum(top, logits.max(axis=1))
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits - per_row(new_top, logits.shape))
    total = total * decay + weights.sum(axis=1)
    acc *= per_row(decay, acc.shape)
    plgpu.barrier_wait(s["v_ready"].at[slot])
    acc = flash_gpu.accumulate(acc, weights.astype(s["q_smem"].dtype), call.tile(s, "v", slot))
    plgpu.barrier_arrive(s["v_free"].at[slot])
    return new_top, total, acc


def _write(state, s):
    """Output and log-sum-exp of the state, to shared memory."""
    top, total, acc = state
    empty = top <= MASKED / 2
    total = jnp.where(empty, 1.0, total)
    s["out_smem"][...] = acc * per_row(jnp.where(empty, 0.0, 1 / total), acc.shape)
    s["lse_smem"][...] = jnp.where(empty, -jnp.inf, top / LOG2E + jnp.log(total))
    plgpu.commit_smem()
