"""In which order the stored blocks are multiplied: all kernels add up the products of one result block in a run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """The slots of a block-ELL weight sorted by the result block that they are added to; padding comes last.

    Attributes:
      order: `(slots,)` int32, the slots, flattened.
      source: `(slots,)` int32, the operand's block that each of them is multiplied with.
      target: `(slots,)` int32, the result's block; for padding the number of result blocks.
      starts: `(targets + 1,)` int32, where the run of each result block begins; the last is the number of blocks.
    """

    order: jax.Array
    source: jax.Array
    target: jax.Array
    starts: jax.Array


def schedule(indices, row_blocks: int, transposed: bool = False) -> Schedule:
    """The schedule of `x @ W`, or of `g @ W.T`.

    Args:
      indices: `(column blocks, slots)` integers, the row block of each stored block, -1 for padding.
      row_blocks: how many row blocks W has.
      transposed: whether the result is divided into W's row blocks.
    """
    columns, length = indices.shape
    targets = row_blocks if transposed else columns
    row = indices.reshape(-1).astype(jnp.int32)
    column = jnp.repeat(jnp.arange(columns, dtype=jnp.int32), length)
    source, target = (column, row) if transposed else (row, column)
    target = jnp.where(row < 0, targets, target)
    order = jnp.argsort(target, stable=True).astype(jnp.int32)
    target = target[order]
    starts = jnp.sum(target < jnp.arange(targets + 1)[:, None], axis=1, dtype=jnp.int32)
    return Schedule(order, jnp.maximum(source[order], 0), target, starts)
