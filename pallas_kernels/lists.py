"""Masks as lists of what each of their rows selects."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BlockLists(NamedTuple):
    """What each row of a block mask selects.

    Attributes:
      indices: (..., rows, limit) int32, the selected columns in ascending order, then -1.
      counts: (..., rows) int32, how many columns the row selects. Larger than the limit where they did not fit.
    """

    indices: jax.Array
    counts: jax.Array


def block_lists(block_mask, limit: int | None = None) -> BlockLists:
    """Lists of the selected columns of every row of a block mask.

    Args:
      block_mask: (..., rows, columns) bool.
      limit: room in each list; None is enough for any mask.

    Raises:
      ValueError: outside `jax.jit`, if a row selects more than `limit` columns. Inside, its count says so and its
        list ends early.
    """
    block_mask = jnp.asarray(block_mask)
    if block_mask.ndim < 2 or block_mask.dtype != jnp.bool_:
        raise ValueError(
            f"block_mask is {block_mask.dtype} of shape {block_mask.shape}; it must be bool of shape "
            "(..., rows, columns)"
        )
    columns = block_mask.shape[-1]
    limit = columns if limit is None else limit
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None")
    flat = block_mask.reshape(-1, columns)
    counts = flat.sum(-1, dtype=jnp.int32)
    if not isinstance(counts, jax.core.Tracer) and counts.size and counts.max() > limit:
        raise ValueError(f"block_mask selects {counts.max()} blocks in one row, more than limit={limit}")
    indices = jax.vmap(lambda row: jnp.flatnonzero(row, size=limit, fill_value=-1))(flat)
    rows = block_mask.shape[:-1]
    return BlockLists(indices.astype(jnp.int32).reshape(*rows, limit), counts.reshape(rows))
