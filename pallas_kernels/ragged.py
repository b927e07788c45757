"""Loops over rows that have different amounts of work, without doing the work of the longest for all."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.meshes import vary


def fold_rows(counts, init, step, elements: int):
    """Folds over the list of every row: row r takes `counts[r]` steps from `init(r)`.

    Rows are taken in chunks of similar counts, longest first, and a chunk takes as many steps as its longest row:
    the cost follows the sum of the counts, not rows times the largest.

    Args:
      counts: (rows,) integers; inside `jax.shard_map` they vary where anything in `step` does.
      init: row indices (chunk,) -> state, a tree of arrays with the chunk as first axis.
      step: (t, row indices, state) -> state. Must leave the state of a row alone if t >= counts[row].
      elements: size of one row's largest intermediate array, from which the size of a chunk is chosen.

    Returns:
      The final states, with all rows as first axis.
    """
    rows = counts.shape[0]
    # A chunk fills the caches of a CPU, and a GPU or TPU with work.
    budget = 2**18 if jax.default_backend() == "cpu" else 2**25
    chunk = max(1, min(rows, budget // elements))
    order = jnp.argsort(-counts)
    padded = jnp.pad(order, (0, -rows % chunk), mode="edge").reshape(-1, chunk)

    def one_chunk(_, members):
        steps = counts[members].max()
        state = jax.tree.map(lambda x: vary(x, counts), init(members))
        return None, lax.fori_loop(0, steps, lambda t, state: step(t, members, state), state)

    states = lax.scan(one_chunk, None, padded)[1]
    back = jnp.argsort(order)  # where each row went
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[back], states)
