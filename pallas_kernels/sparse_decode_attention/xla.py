"""Decoding in plain JAX: some pages, or some packed tokens, at a time, for as long as a sequence is.

A row is a sequence and a group of heads that share keys; rows of similar length run together
(`pallas_kernels.ragged`), so the cost follows the number of tokens that are read.
"""

import jax.numpy as jnp

from pallas_kernels.lists import block_lists
from pallas_kernels.ragged import fold_rows
from pallas_kernels.sparse_decode_attention.packed import Packed, unpack

_TOKENS = 128  # that a step reads


def selected(page_table, lengths, page):
    """The selected pages (rows, S) of every sequence and group, then -1, and how many tokens they hold (rows,).

    All are full but the last.
    """
    slots = page_table.shape[-1]
    fill = jnp.clip(lengths[:, None, None] - jnp.arange(slots) * page, 0, page)
    fill = jnp.where(page_table >= 0, fill, 0).reshape(-1, slots)
    lists, _ = block_lists(fill > 0)
    pages = jnp.take_along_axis(page_table.reshape(-1, slots), jnp.maximum(lists, 0), axis=-1)
    return jnp.where(lists < 0, -1, pages), fill.sum(-1, dtype=jnp.int32)


def paged(q, k_pages, v_pages, page_table, lengths, config):
    """Output (B, G, R, D) and log-sum-exp (B, G, R); q (B, G, R, D), page_table (B, G, S)."""
    page, groups = k_pages.shape[1:3]
    pages, tokens = selected(page_table, lengths, page)
    width = max(1, _TOKENS // page)
    pages = jnp.pad(jnp.maximum(pages, 0), ((0, 0), (0, -pages.shape[1] % width)))
    pages = pages.reshape(pages.shape[0], -1, width)

    def fetch(t, rows):
        where = pages[rows, t], slice(None), (rows % groups)[:, None]
        return tuple(x[where].reshape(rows.size, width * page, -1) for x in (k_pages, v_pages))

    return _attend(q, fetch, tokens, width * page, config)


def bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config):
    """Output (B, G, R, D) and log-sum-exp (B, G, R); packed arrays (B, G, T, ...)."""
    batch, groups, length = k_bits.shape[:3]
    size = min(_TOKENS, length)

    def split(x):  # (rows, steps, size, ...)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % size), (0, 0)))
        return x.reshape(batch * groups, -1, size, x.shape[-1])

    keys, values = Packed(split(k_bits), split(k_values)), Packed(split(v_bits), split(v_values))

    def fetch(t, rows):
        return tuple(unpack(Packed(*(x[rows, t] for x in packed)), q.shape[-1]) for packed in (keys, values))

    return _attend(q, fetch, jnp.repeat(lengths, groups), size, config)


def _attend(q, fetch, tokens, size, config):
    """Attention of every row to its first `tokens` keys.

    Args:
      q: (B, G, R, D).
      fetch: (step, rows) -> keys and values (rows, size, D) at positions step * size to (step + 1) * size - 1.
      tokens: (B * G,) int32.
    """
    queries = q.reshape(-1, *q.shape[2:])

    def init(rows):
        shape = (rows.size, q.shape[2])
        return jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, q.shape[3]))

    def step(t, rows, state):
        top, total, out = state
        keys, values = fetch(t, rows)
        logits = config.scale * _dot("brd,btd->brt", queries[rows], keys)
        if config.soft_cap is not None:
            logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
        seen = t * size + jnp.arange(size) < tokens[rows][:, None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(-1))
        shift = jnp.where(new_top == -jnp.inf, 0, new_top)
        weights = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(top - shift)
        added = _dot("brt,btd->brd", weights.astype(values.dtype), values)
        return new_top, total * decay + weights.sum(-1), out * decay[..., None] + added

    elements = size * max(q.shape[2], q.shape[3])
    top, total, out = fold_rows(-(-tokens // size), init, step, elements)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return (out / total[..., None]).reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3])


def merge(outs, lses):
    """Outputs (parts, ..., D) and log-sum-exps (parts, ...) of disjoint sets of keys as one."""
    top = lses.max(0)
    shift = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - shift)
    total = weights.sum(0)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    return (outs * weights[..., None]).sum(0) / safe[..., None], jnp.where(
        empty, -jnp.inf, shift + jnp.log(safe)
    )


def _dot(terms, a, b):
    return jnp.einsum(terms, a, b, preferred_element_type=jnp.float32)
