"""Which dense tiles of two sparse matrices each tile of their product needs: those with entries in both."""

import jax.numpy as jnp

from pallas_kernels.spgemm.reference import dense


def schedule(places, sizes, tile):
    """The tiles along the contracted axis that each tile of the product needs.

    Args:
      places: the rows and columns of the entries of X and Y, then any others.
      sizes: `(m, k, n)`, of X and Y.
      tile: the same for a tile of X and one of Y.

    Returns:
      `(I, J, K)` int32 the tiles, ascending, the last repeated as padding, and `(I, J)` int32 how many there are.
    """
    grid = [-(-size // step) for size, step in zip(sizes, tile, strict=True)]
    x = _used(places[0], sizes[0], grid[:2], tile[:2])
    y = _used(places[1], sizes[1], grid[1:], tile[1:])
    both = x[:, None, :] & y.T[None]
    count = both.sum(axis=2, dtype=jnp.int32)
    order = jnp.argsort(~both, axis=2, stable=True).astype(jnp.int32)
    last = jnp.maximum(count - 1, 0)[..., None]
    steps = jnp.minimum(jnp.arange(grid[1]), last)
    return jnp.take_along_axis(order, steps, axis=2), count


def padded(values, place, shape, tile):
    """The dense matrix of `values`, filled up with zeros to whole tiles."""
    whole = [-(-size // step) * step for size, step in zip(shape, tile, strict=True)]
    rows = jnp.where(place[0] < shape[0], place[0], whole[0])  # padding stays outside
    return dense(values, (rows, place[1]), whole)


def _used(place, rows, grid, tile):
    row = jnp.where(place[0] < rows, place[0] // tile[0], grid[0])
    return jnp.zeros(grid, bool).at[row, place[1] // tile[1]].set(True, mode="drop")
