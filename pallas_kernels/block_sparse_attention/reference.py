"""The definition: a dense softmax over the selected keys, in float32."""

import jax
import jax.numpy as jnp


def visible(block_mask, queries: int, keys: int, block_q: int, block_k: int, causal: bool):
    """(..., queries, keys) bool: which keys every query sees."""
    mask = block_mask[..., jnp.arange(queries) // block_q, :][..., jnp.arange(keys) // block_k]
    return mask & (jnp.arange(queries)[:, None] >= jnp.arange(keys)) if causal else mask


def attention(q, k, v, block_mask, config):
    """Output and log-sum-exp; arguments as `pallas_kernels.block_sparse_attention`, all of them given.

    Differentiable by JAX. Rows that see no key give zeros, -inf and no gradient.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    exact = jax.lax.Precision.HIGHEST
    logits = config.scale * jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k, precision=exact)
    if config.soft_cap is not None:
        logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
    mask = visible(block_mask, q.shape[1], k.shape[1], config.block_q, config.block_k, config.causal)
    any_key = mask.any(-1)
    # In rows without keys the mask is dropped before and the result after the softmax: no infinite differences.
    logits = jnp.where(mask | ~any_key[..., None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(mask, jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=exact)
    return out.astype(q.dtype), jnp.where(any_key, lse, -jnp.inf)
