"""How important every group of a model is, and which are the least: what HESSO and CRIC share.

With x the own weights of a group, g the direction that the optimizer descends along (its update is
proportional to -g) and n the number of weights, the scores are

  magnitude          |x|
  average_magnitude  |x| / n
  cosine             1 - cos(x, g)
  taylor             |<x, g>|
  taylor_squared     <x, g>^2 / 2

each divided by its l2 norm over all groups and weighted by 0.2; saliency is the sum of those chosen.

The paper's released code has 1 + cos(x, g) (`cosine_released`). There a group that the optimizer is moving
towards zero counts as important; here, as everywhere else in the mixture, it counts as redundant.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from sparsejax.masks import choose
from sparsejax.selection import top_k_mask
from sparsejax.structure import Groups

WEIGHT = 0.2
_TINY = 1e-30


def _cosine(xx, xg, gg, size):
    return xg / jnp.sqrt(jnp.maximum(xx * gg, _TINY))


# f(<x, x>, <x, g>, <g, g>, n) -> score, all float32 of shape (G,).
CRITERIA = {
    "magnitude": lambda xx, xg, gg, size: jnp.sqrt(xx),
    "average_magnitude": lambda xx, xg, gg, size: jnp.sqrt(xx) / size,
    "cosine": lambda *products: 1 - _cosine(*products),
    "cosine_released": lambda *products: 1 + _cosine(*products),
    "taylor": lambda xx, xg, gg, size: jnp.abs(xg),
    "taylor_squared": lambda xx, xg, gg, size: 0.5 * jnp.square(xg),
}
DEFAULT = ("magnitude", "average_magnitude", "cosine", "taylor", "taylor_squared")


def check_criteria(criteria: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple, or a ValueError that lists the known ones."""
    criteria = (criteria,) if isinstance(criteria, str) else tuple(criteria)
    for name in criteria:
        choose("criterion of saliency", name, CRITERIA)
    if not criteria:
        raise ValueError(f"saliency needs at least one criterion (known: {', '.join(CRITERIA)})")
    return criteria


def check_begin(begin: int) -> None:
    """A ValueError for a first step below 0, which would never come."""
    if begin < 0:
        raise ValueError(f"begin must be a step that is at least 0, got {begin}")


def redundant_count(groups: Groups, sparsity: float) -> int:
    """K = floor(sparsity G), the number of groups to remove.

    Raises:
      TypeError: for something that is not `Groups`.
      ValueError: if some layer could not keep a group.
    """
    if not isinstance(groups, Groups):
        raise TypeError(
            f"groups must be a sparsejax.structure.Groups, as structure.channels makes it, got {groups!r}"
        )
    count = int(sparsity * groups.count + 1e-6)
    most = groups.count - len(groups.layers)
    if count > most:
        raise ValueError(
            f"sparsity={sparsity:g} removes {count} of {groups.count} groups, but each of the {len(groups.layers)} "
            f"layers keeps one: at most {most} can go"
        )
    return count


def saliency(groups: Groups, params, updates, criteria: Iterable[str] = DEFAULT):
    """float32 (G,): the mixture of the named criteria; higher is more important.

    Args:
      groups: the groups.
      params: the weights x.
      updates: what the optimizer would add to them, proportional to -g. Any positive factor cancels.
      criteria: names of `CRITERIA`.
    """
    updates = _in_range(updates)
    products = [
        groups.sums(jax.tree.map(lambda x, u: x.astype(jnp.float32) ** 2, params, updates)),
        groups.sums(jax.tree.map(lambda x, u: -x.astype(jnp.float32) * u, params, updates)),
        groups.sums(jax.tree.map(lambda x, u: u**2, params, updates)),
        groups.sums(jax.tree.map(jnp.ones_like, params)),
    ]
    scores = [CRITERIA[name](*products) for name in criteria]
    scores = [_in_range(score) for score in scores]
    return WEIGHT * sum(score / jnp.maximum(jnp.linalg.norm(score), _TINY) for score in scores)


def _in_range(tree):
    """The tree in float32, times the power of two (exact) that brings its largest entry to about 1.

    Squares of squares of the updates of a trained network are below what float32 can hold.
    """
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    top = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))
    _, exponent = jnp.frexp(top)
    return jax.tree.map(lambda x: jnp.ldexp(x, -exponent), tree)


def lowest(groups: Groups, scores, k, available=True):
    """bool (G,): the `k` groups of lowest score, never the best available one of a layer.

    Args:
      groups: the groups.
      scores: float (G,).
      k: an int, may be traced; at most the available groups less one for every layer.
      available: bool (G,), the groups to choose from.
    """
    available = jnp.broadcast_to(available, scores.shape)
    ranked = jnp.where(available, scores, -jnp.inf)
    best = [jnp.arange(part.size) == jnp.argmax(part) for part in groups.split(ranked)]
    candidates = available & ~jnp.concatenate(best)
    return top_k_mask(-scores, k, candidates=candidates) & candidates


def shrink(groups: Groups, flags, left, updates, params):
    """Updates after which the own weights of the groups flagged by bool (G,) are `left` (x + update).

    With `left` = (T - t - 1) / (T - t) at t = 0 ... T - 1 the factors telescope: after T steps they are 0.
    """

    def leaf(update, param):
        moved = param.astype(jnp.float32) + update.astype(jnp.float32)
        return (left * moved - param.astype(jnp.float32)).astype(update.dtype)

    return groups.select(flags, jax.tree.map(leaf, updates, params), updates)
