"""Decoding over a packed cache in Triton, called through jax-triton: any budget, and GPUs that `pallas_gpu` lacks.

Triton gathers from memory by address, so that packed tokens are expanded as they are read. The tokens of a sequence
are divided among several programs, whose parts are merged after, as in `pallas_gpu`.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.sparse_decode_attention import xla

_TOKENS = 64  # of a tile
_PROGRAMS = 264  # to aim at: two for each multiprocessor of a Hopper GPU


def bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config, compute_capability=None):
    """As `xla.bitmap`. `compute_capability` (90 for Hopper) is the device's if None."""
    import jax_triton  # which cannot be imported without JAX's own part for GPUs

    batch, groups, group, channels = q.shape
    splits = min(-(-k_bits.shape[2] // _TOKENS), max(1, _PROGRAMS // (batch * groups)))
    out, lse = jax_triton.triton_call(
        q,
        k_bits,
        k_values,
        v_bits,
        v_values,
        lengths,
        kernel=kernel,
        out_shape=[
            jax.ShapeDtypeStruct((splits, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((splits, *q.shape[:3]), jnp.float32),
        ],
        grid=(splits, batch * groups),
        num_warps=4,
        compute_capability=compute_capability,
        **constants(q, k_bits, k_values, v_values, config),
    )
    out, lse = xla.merge(out, lse)
    return out.astype(q.dtype), lse


def constants(q, k_bits, k_values, v_values, config):
    """What the kernel knows when it is compiled."""
    return dict(
        groups=q.shape[1],
        group=q.shape[2],
        height=max(16, triton.next_power_of_2(q.shape[2])),  # of the smallest matrix product
        channels=q.shape[3],
        lanes=max(16, triton.next_power_of_2(q.shape[3])),
        capacity=k_bits.shape[2],
        width=k_bits.shape[3],
        k_budget=k_values.shape[3],
        v_budget=v_values.shape[3],
        scale=config.scale,
        soft_cap=config.soft_cap or 0.0,
        tokens=_TOKENS,
    )


@triton.jit
def kernel(
    q, k_bits, k_values, v_bits, v_values, lengths, out, lse,
    groups: tl.constexpr, group: tl.constexpr, height: tl.constexpr, channels: tl.constexpr, lanes: tl.constexpr,
    capacity: tl.constexpr, width: tl.constexpr, k_budget: tl.constexpr, v_budget: tl.constexpr,
    scale: tl.constexpr, soft_cap: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """One part of the tokens of one row (sequence, group of heads)."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    row, rows = tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths + row // groups)
    tiles = tl.cdiv(length, tokens)
    head, channel = tl.arange(0, height), tl.arange(0, lanes)
    own = (head[:, None] < group) & (channel[None, :] < channels)
    place = head[:, None] * channels + channel[None, :]
    queries = tl.load(q + row * group * channels + place, mask=own, other=0.0)
    top = tl.full([height], -1e30, tl.float32)
    total = tl.zeros([height], tl.float32)
    acc = tl.zeros([height, lanes], tl.float32)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        token = tile * tokens + tl.arange(0, tokens)
        where = row.to(tl.int64) * capacity + token
        keys = expand(k_bits, k_values, where, token < length, channel, channels, width, k_budget)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if soft_cap > 0:
            logits = soft_cap * (1 - 2 / (1 + tl.exp(2 / soft_cap * logits)))
        logits = tl.where(token[None, :] < length, logits, -1e30)
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        values = expand(v_bits, v_values, where, token < length, channel, channels, width, v_budget)
        acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    part = split * rows + row
    tl.store(out + part * group * channels + place, acc / total[:, None], mask=own)
    tl.store(
        lse + part * group + head, tl.where(empty, float("-inf"), top + tl.log(total)), mask=head < group
    )


@triton.jit
def expand(
    bits, values, where, exists, channel, channels: tl.constexpr, width: tl.constexpr, budget: tl.constexpr
):
    """The packed vectors at `where` as (tokens, lanes), zeros where `exists` is not."""
    wanted = exists[:, None] & (channel[None, :] < channels)
    byte = tl.load(bits + where[:, None] * width + channel[None, :] // 8, mask=wanted, other=0)
    stored = (byte.to(tl.int32) >> (channel[None, :] % 8)) & 1
    place = tl.cumsum(stored, 1) - 1
    return tl.load(values + where[:, None] * budget + place, mask=stored == 1, other=0.0)
