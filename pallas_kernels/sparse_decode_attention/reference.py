"""The definition: gather or unpack the cache, then a dense softmax in float32.

Arrays have heads split into groups that share keys: q (B, G, R, D), page_table (B, G, S).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_decode_attention.packed import Packed, unpack


def paged(q, k_pages, v_pages, page_table, lengths, config):
    """As `pallas_kernels.sparse_decode_attention.paged`."""

    def gathered(pages):  # (B, G, S * page, D)
        pages = jnp.moveaxis(pages.astype(jnp.float32), 2, 0)
        gather = jax.vmap(jax.vmap(lambda pool, table: pool[table]), (None, 0))
        keys = gather(pages, jnp.maximum(page_table, 0))
        return keys.reshape(*keys.shape[:2], -1, keys.shape[-1])

    page = k_pages.shape[1]
    position = jnp.arange(page_table.shape[-1] * page)
    seen = jnp.repeat(page_table >= 0, page, axis=-1) & (position < lengths[:, None, None])
    return _attention(q, gathered(k_pages), gathered(v_pages), seen, config)


def bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config):
    """As `pallas_kernels.sparse_decode_attention.bitmap`."""
    k, v = (unpack(Packed(*x), q.shape[-1]) for x in ((k_bits, k_values), (v_bits, v_values)))
    seen = jnp.arange(k.shape[2]) < lengths[:, None, None]
    return _attention(q, k.astype(jnp.float32), v.astype(jnp.float32), seen, config)


def _attention(q, k, v, seen, config):
    """q (B, G, R, D); k and v (B, G, T, D) float32; seen (B, G or 1, T)."""
    exact = jax.lax.Precision.HIGHEST
    logits = config.scale * jnp.einsum("bgrd,bgtd->bgrt", q.astype(jnp.float32), k, precision=exact)
    if config.soft_cap is not None:
        logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
    seen = jnp.broadcast_to(seen[:, :, None], logits.shape)
    any_key = seen.any(-1)
    # In rows without keys the mask is dropped before and the result after the softmax: no infinite differences.
    logits = jnp.where(seen | ~any_key[..., None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("bgrt,bgtd->bgrd", weights, v, precision=exact)
    return out.astype(q.dtype), jnp.where(any_key, lse, -jnp.inf)
