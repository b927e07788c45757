"""Attention of one new token per sequence over a key-value cache of which only a part is read.

`paged` reads the selected pages of a paged cache. `bitmap` reads a cache of vectors with few non-zeros, each stored
as the bitmap of its channels and the packed values (`pack`, `unpack`), after Mustafar [Joo et al., 2025]. Both return
the log-sum-exp of the logits, with which `merge` joins attention over disjoint sets of keys: a compressed past and a
dense window of the newest tokens, say.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch, triton_call
from pallas_kernels.batching import independent
from pallas_kernels.meshes import on_mesh
from pallas_kernels.sparse_decode_attention import reference, xla
from pallas_kernels.sparse_decode_attention.packed import Packed, pack, unpack

__all__ = ["Packed", "bitmap", "merge", "pack", "paged", "unpack"]

OP = "sparse_decode_attention"


class Config(NamedTuple):
    """What is known when a call is compiled."""

    scale: float
    soft_cap: float | None


def paged(q, k_pages, v_pages, page_table, lengths, *, scale=None, soft_cap=None, implementation=None):
    """Attention of one token per sequence over the selected pages of a cache.

    Args:
      q: (B, H, D) bfloat16, float16 or float32.
      k_pages, v_pages: (P, page, Hkv, D) of the same dtype, H a multiple of Hkv: query head h reads head
        h // (H / Hkv). Entries that no sequence reads may hold anything finite.
      page_table: (B, S) int32, or (B, Hkv, S) to select pages per head: the pages of every sequence, in order, and
        -1 for those that are not selected or do not exist. Entry s holds the keys at positions s * page to
        (s + 1) * page - 1 of the table. A table may thus name all pages of a sequence and leave out some, or name
        selected pages one after another and have `lengths` count their tokens.
      lengths: (B,) int32: positions from `lengths[b]` on do not exist.
      scale: multiplies the logits; None is D ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      implementation: one of "reference", "xla", "pallas_gpu" (Hopper), "pallas_tpu", or None for the device's best.

    Returns:
      (B, H, D) of the dtype of q and (B, H) float32, the log of the sum of exponentials of the logits. A sequence
      without keys gives zeros and -inf. Gradients are those of `reference`, which reads the whole table.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run here.
    """
    q, k_pages, v_pages, page_table, lengths = (
        jnp.asarray(x) for x in (q, k_pages, v_pages, page_table, lengths)
    )
    _check_paged(q, k_pages, v_pages, page_table, lengths, soft_cap)
    config = _config(q, scale, soft_cap)
    name = dispatch.pick(f"{OP}.paged", implementation, paged_reasons(q, k_pages))

    def run(q, k_pages, v_pages, table, lengths):
        groups = k_pages.shape[2]
        table = table if table.ndim == 3 else table[:, None]
        table = jnp.broadcast_to(table, (q.shape[0], groups, table.shape[-1]))
        grouped = q.reshape(q.shape[0], groups, -1, q.shape[-1])
        out, lse = _paged(grouped, k_pages, v_pages, table, lengths, config, name)
        return out.reshape(q.shape), lse.reshape(q.shape[:2])

    return on_mesh(run, _specs, q, k_pages, v_pages, page_table, lengths)


def bitmap(q, keys: Packed, values: Packed, lengths, *, scale=None, soft_cap=None, implementation=None):
    """Attention of one token per sequence over a cache of packed keys and values.

    Args:
      q: (B, H, D) bfloat16, float16 or float32, D at most 256.
      keys, values: what `pack` makes of (B, Hkv, T, D): heads before tokens, so that what a head reads lies together.
        Values of the dtype of q; the budgets of keys and values may differ.
      lengths: (B,) int32, the number of tokens of every sequence; what exceeds T counts as T.
      scale, soft_cap: as in `paged`.
      implementation: one of "reference", "xla", "pallas_gpu" (Hopper), "pallas_tpu", "triton", or None for the
        device's best.

    Returns:
      (B, H, D) of the dtype of q and (B, H) float32, as `paged`. Gradients are those of `reference`, which unpacks
      the cache; bitmaps have none.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run here.
    """
    q, lengths = jnp.asarray(q), jnp.asarray(lengths)
    keys, values = (Packed(*(jnp.asarray(x) for x in packed)) for packed in (keys, values))
    _check_bitmap(q, keys, values, lengths, soft_cap)
    lengths = jnp.minimum(lengths, keys.values.shape[2])
    name = dispatch.pick(f"{OP}.bitmap", implementation, bitmap_reasons(q, keys, values))
    config = _config(q, scale, soft_cap)

    def run(q, *cache):
        grouped = q.reshape(q.shape[0], cache[0].shape[1], -1, q.shape[-1])
        out, lse = _bitmap(grouped, *cache, config, name)
        return out.reshape(q.shape), lse.reshape(q.shape[:2])

    return on_mesh(run, _specs, q, *keys, *values, lengths)


def _specs(q, *others):
    """Output and log-sum-exp are sharded along the sequences and heads of q."""
    del others
    return PartitionSpec(*q[:2], None), PartitionSpec(*q[:2])


def merge(outs, lses):
    """Attention over the union of disjoint sets of keys, from attention over each.

    Args:
      outs: (parts, ..., D), outputs.
      lses: (parts, ...), their log-sum-exps; -inf for a part without keys.

    Returns:
      The output (..., D) of the dtype of `outs` and its log-sum-exp (...).
    """
    outs, lses = jnp.asarray(outs), jnp.asarray(lses)
    if lses.ndim < 1 or lses.shape[0] == 0 or outs.shape[:-1] != lses.shape:
        raise ValueError(
            f"outs and lses have shapes {outs.shape} and {lses.shape}; they must be (parts, ..., D) and (parts, ...) "
            "with at least one part"
        )
    out, lse = xla.merge(outs.astype(jnp.float32), lses)
    return out.astype(outs.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _paged(q, k_pages, v_pages, table, lengths, config, name):
    if name == "reference":
        return reference.paged(q, k_pages, v_pages, table, lengths, config)
    return _paged_kernel(config, name)(q, k_pages, v_pages, table, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config, name):
    if name == "reference":
        return reference.bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config)
    return _bitmap_kernel(config, name)(q, k_bits, k_values, v_bits, v_values, lengths)


def _backward(definition, config, name, args, gradients):
    """The definition's gradients: with one query per sequence its logits are no larger than what they are made of."""
    del name
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in args]

    def of_floats(*floats):
        floats = iter(floats)
        return definition(*(next(floats) if f else x for f, x in zip(floating, args, strict=True)), config)

    wanted = iter(jax.vjp(of_floats, *(x for f, x in zip(floating, args, strict=True) if f))[1](gradients))
    return tuple(
        next(wanted) if f else np.zeros(x.shape, jax.dtypes.float0)
        for f, x in zip(floating, args, strict=True)
    )


_paged.defvjp(lambda *args: (_paged(*args), args[:5]), functools.partial(_backward, reference.paged))
_bitmap.defvjp(lambda *args: (_bitmap(*args), args[:6]), functools.partial(_backward, reference.bitmap))


@functools.lru_cache(maxsize=None)
def _paged_kernel(config, name):
    function = functools.partial(dispatch.module(OP, name).paged, config=config)
    # no axis of the pool of pages is that of the sequences: it is whole on every device, but for its heads
    return independent(function, "bgrd psgd psgd bgn b -> bgrd bgr", "bg", merge=_merge_pools)


def _merge_pools(size, is_mapped, args):
    """Of `jax.vmap`: several pools become one, into which the tables point."""
    own_pools = is_mapped[1] or is_mapped[2]
    merged = []
    for i, (x, mapped) in enumerate(zip(args, is_mapped, strict=True)):
        if i in (1, 2) and not own_pools:
            merged.append(x)
            continue
        x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
        if i == 3 and own_pools:
            pages = args[1].shape[1 if is_mapped[1] else 0]
            first = jnp.arange(size, dtype=x.dtype).reshape(-1, 1, 1, 1) * pages
            x = jnp.where(x < 0, x, x + first)
        merged.append(x.reshape(-1, *x.shape[2:]))
    return merged


@functools.lru_cache(maxsize=None)
def _bitmap_kernel(config, name):
    function = functools.partial(dispatch.module(OP, name).bitmap, config=config)
    return independent(function, "bgrd bgtc bgtm bgte bgtn b -> bgrd bgr", "bg")


def paged_reasons(q, k_pages):
    """{implementation: why it cannot run here, or None}, best first."""
    return {
        "pallas_gpu": dispatch.gpu_reason(9, at=q)
        or dispatch.module(OP, "pallas_gpu").paged_reason(q, k_pages),
        "pallas_tpu": dispatch.tpu_reason(at=q) or dispatch.module(OP, "pallas_tpu").paged_reason(q, k_pages),
        "xla": None,
        "reference": None,
    }


def bitmap_reasons(q, keys, values):
    """{implementation: why it cannot run here, or None}, best first."""
    cache = keys.values.shape, values.values.shape
    gpu = dispatch.gpu_reason(9, at=q) or dispatch.module(OP, "pallas_gpu").bitmap_reason(q, *cache)
    triton = dispatch.gpu_reason(8, 9, 10, 12, at=q) or triton_call.reason()
    tpu = dispatch.tpu_reason(at=q) or dispatch.module(OP, "pallas_tpu").bitmap_reason(q)
    return {"pallas_gpu": gpu, "triton": triton, "pallas_tpu": tpu, "xla": None, "reference": None}


def _config(q, scale, soft_cap):
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Config(scale, None if soft_cap is None else float(soft_cap))


def _check_paged(q, k_pages, v_pages, page_table, lengths, soft_cap):
    if q.ndim != 3 or k_pages.ndim != 4 or k_pages.shape != v_pages.shape or q.shape[-1] != k_pages.shape[-1]:
        raise ValueError(
            f"q, k_pages and v_pages have shapes {q.shape}, {k_pages.shape} and {v_pages.shape}; they must be "
            "(B, H, D) and twice (P, page, Hkv, D)"
        )
    _check_common(q, k_pages.shape[2], (k_pages.dtype, v_pages.dtype), lengths, soft_cap)
    if 0 in k_pages.shape or 0 in page_table.shape:
        raise ValueError(
            f"k_pages and page_table have shapes {k_pages.shape} and {page_table.shape}; no axis may be empty"
        )
    leading = (q.shape[:1], (q.shape[0], k_pages.shape[2]))
    if page_table.shape[:-1] not in leading or page_table.dtype != jnp.int32:
        raise ValueError(
            f"page_table is {page_table.dtype} of shape {page_table.shape}; it must be int32 of shape (B, S) or "
            f"(B, Hkv, S) with B = {q.shape[0]} and Hkv = {k_pages.shape[2]}"
        )


def _check_bitmap(q, keys, values, lengths, soft_cap):
    if q.ndim != 3 or any(x.ndim != 4 for x in (*keys, *values)):
        shapes = [x.shape for x in (q, *keys, *values)]
        raise ValueError(
            f"q and the bitmaps and values of keys and values have shapes {shapes}; they must be (B, H, D), "
            "(B, Hkv, T, ceil(D / 8)) and (B, Hkv, T, budget)"
        )
    lead = (q.shape[0], *keys.values.shape[1:3])
    if 0 in lead:
        raise ValueError(f"keys.values has shape {keys.values.shape}; no axis may be empty")
    for name, packed in (("keys", keys), ("values", values)):
        expected = (*lead, -(-q.shape[-1] // 8))
        if packed.bitmap.shape != expected or packed.bitmap.dtype != jnp.uint8:
            raise ValueError(
                f"{name}.bitmap is {packed.bitmap.dtype} of shape {packed.bitmap.shape}; it must be uint8 of shape "
                f"{expected}"
            )
        if packed.values.shape[:3] != lead or not 1 <= packed.values.shape[3] <= q.shape[-1]:
            raise ValueError(
                f"{name}.values has shape {packed.values.shape}; it must be {lead} and a budget of 1 to "
                f"{q.shape[-1]} values"
            )
    _check_common(q, lead[1], (keys.values.dtype, values.values.dtype), lengths, soft_cap)


def _check_common(q, groups, dtypes, lengths, soft_cap):
    if 0 in q.shape:
        raise ValueError(f"q has shape {q.shape}; no axis may be empty")
    if groups == 0 or q.shape[1] % groups:
        raise ValueError(
            f"q has shape {q.shape}; its heads must be a multiple of the {groups} heads of the cache"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or any(dtype != q.dtype for dtype in dtypes):
        raise ValueError(
            f"q and the cache have dtypes {q.dtype}, {dtypes[0]} and {dtypes[1]}; they must be one of bfloat16, "
            "float16 and float32"
        )
    if lengths.shape != q.shape[:1] or lengths.dtype != jnp.int32:
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {lengths.shape}; it must be int32 of shape {q.shape[:1]}"
        )
    if soft_cap is not None and not (soft_cap > 0 and math.isfinite(soft_cap)):
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive and finite, or None")
