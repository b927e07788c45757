"""Flash attention over lists of blocks in plain JAX: the fallback that is fast everywhere.

A row is a query block of one head (for dk and dv: a key block) with the list of blocks it meets; rows with lists
of similar length run together (`pallas_kernels.ragged`), one pair of blocks each at a time, so the cost follows
the number of selected blocks and no array is larger than a chunk of pairs.

Arrays here have heads split into groups that share keys: q (B, T, G, R, D), k and v (B, S, G, D), block_mask
(B, G, R, n, m), log-sum-exp (B, G, R, T).
"""

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.blocks import Problem
from pallas_kernels.ragged import fold_rows


def forward(q, k, v, block_mask, config):
    """Output (B, T, G, R, D) and log-sum-exp (B, G, R, T), float32."""
    p = Problem(q, k, block_mask, config)
    q_blocks, k_blocks, v_blocks = p.query_blocks(q), p.key_blocks(k), p.key_blocks(v)
    lists, counts = p.key_lists()

    def init(rows):
        shape = (rows.size, p.block_q)
        return jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, q.shape[-1]))

    def step(t, rows, state):
        top, total, out = state
        keys = lists[rows, t]
        logits, _ = _logits(p, q_blocks[rows], k_blocks[keys], rows, keys)
        new_top = jnp.maximum(top, logits.max(-1))
        shift = jnp.where(new_top == -jnp.inf, 0, new_top)  # until a row sees a key
        weights = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(top - shift)
        values = _dot("rqk,rkd->rqd", weights.astype(v.dtype), v_blocks[keys])
        return new_top, total * decay + weights.sum(-1), out * decay[..., None] + values

    top, total, out = fold_rows(counts, init, step, p.block_q * p.block_k)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return p.queries(out / total[..., None]).astype(q.dtype), p.query_scalars(lse)


def backward(q, k, v, block_mask, out, lse, d_out, d_lse, config):
    """Gradients of q, k and v. The probabilities are computed again from `lse`, once for dq, once for dk and dv."""
    p = Problem(q, k, block_mask, config)
    blocks = p.query_blocks(q), p.key_blocks(k), p.key_blocks(v), p.query_blocks(d_out)
    scalars = [p.scalar_blocks(x) for x in (finite(lse), row_sums(out, lse, d_out, d_lse))]
    dq = p.queries(_d_queries(p, *blocks, *scalars))
    dk, dv = (p.keys(x) for x in _d_keys(p, *blocks, *scalars))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def finite(lse):
    """The log-sum-exp with zeros for rows that see no key: all their logits are masked, whatever is subtracted."""
    return jnp.where(lse == -jnp.inf, 0, lse)


def row_sums(out, lse, d_out, d_lse):
    """sum_d out * d_out - d_lse, (B, G, R, T): what a row of the softmax subtracts from the gradient of its weights."""
    sums = jnp.einsum("btgrd,btgrd->bgrt", out.astype(jnp.float32), d_out.astype(jnp.float32))
    return sums - jnp.where(lse == -jnp.inf, 0, d_lse)


def _d_queries(p, q_blocks, k_blocks, v_blocks, do_blocks, lse, delta):
    lists, counts = p.key_lists()

    def step(t, rows, dq):
        keys = lists[rows, t]
        key_block = k_blocks[keys]
        logits, slope = _logits(p, q_blocks[rows], key_block, rows, keys)
        weights = jnp.exp(logits - lse[rows][..., None])
        d_weights = _dot("rqd,rkd->rqk", do_blocks[rows], v_blocks[keys])
        d_logits = weights * (d_weights - delta[rows][..., None]) * slope
        return dq + _dot("rqk,rkd->rqd", d_logits.astype(key_block.dtype), key_block)

    init = lambda rows: jnp.zeros((rows.size, *q_blocks.shape[1:]))  # noqa: E731
    return p.config.scale * fold_rows(counts, init, step, p.block_q * p.block_k)


def _d_keys(p, q_blocks, k_blocks, v_blocks, do_blocks, lse, delta):
    lists, counts = p.query_lists()

    def step(t, rows, state):
        dk, dv = state
        queries = lists[rows, t]
        query_block, do_block = q_blocks[queries], do_blocks[queries]
        past_end = queries < 0
        logits, slope = _logits(p, query_block, k_blocks[rows], queries, jnp.where(past_end, -1, rows))
        weights = jnp.exp(logits - lse[queries][..., None])
        d_weights = _dot("rqd,rkd->rqk", do_block, v_blocks[rows])
        d_logits = weights * (d_weights - delta[queries][..., None]) * slope
        dk += _dot("rqk,rqd->rkd", d_logits.astype(query_block.dtype), query_block)
        return dk, dv + _dot("rqk,rqd->rkd", weights.astype(do_block.dtype), do_block)

    init = lambda rows: (jnp.zeros((rows.size, *k_blocks.shape[1:])),) * 2  # noqa: E731
    dk, dv = fold_rows(counts, init, step, p.block_q * p.block_k)
    return p.config.scale * dk, dv


def _logits(p, q_block, k_block, query_rows, key_rows):
    """Logits (rows, block_q, block_k), -inf where masked, and their derivative by the scaled product.

    A pair with a key row of -1 is past the end of its list and masked as a whole.
    """
    logits = p.config.scale * _dot("rqd,rkd->rqk", q_block, k_block)
    slope = 1.0
    if p.config.soft_cap is not None:
        tanh = jnp.tanh(logits / p.config.soft_cap)
        logits, slope = p.config.soft_cap * tanh, 1 - tanh * tanh
    key = (key_rows % p.m)[:, None, None] * p.block_k + jnp.arange(p.block_k)
    seen = (key_rows >= 0)[:, None, None] & (key < p.keys_length)
    if p.config.causal:
        seen &= (query_rows % p.n)[:, None, None] * p.block_q + jnp.arange(p.block_q)[:, None] >= key
    return jnp.where(seen, logits, -jnp.inf), slope


def _dot(terms, a, b):
    return jnp.einsum(terms, a, b, preferred_element_type=jnp.float32)
