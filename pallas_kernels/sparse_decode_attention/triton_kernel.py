"""The kernel of `pallas_kernels.sparse_decode_attention.triton`."""

import triton
import triton.language as tl


@triton.jit
def bitmap_kernel(
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
