"""Which blocks lie where under a causal mask and the ends of the sequences."""

import jax.numpy as jnp


def reachable(rows: int, columns: int, block_q: int, block_k: int):
    """(rows, columns) bool: the blocks in which some query sees some key under a causal mask."""
    last_query = (jnp.arange(rows) + 1) * block_q - 1
    return last_query[:, None] >= jnp.arange(columns) * block_k


def unmasked(rows: int, columns: int, block_q: int, block_k: int, keys: int, causal: bool):
    """(rows, columns) bool: the blocks in which every query sees every key, so that no mask is needed."""
    full = (jnp.arange(columns) + 1) * block_k <= keys
    if causal:
        full &= jnp.arange(rows)[:, None] * block_q >= (jnp.arange(columns) + 1) * block_k - 1
    return jnp.broadcast_to(full, (rows, columns))
