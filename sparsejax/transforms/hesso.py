"""HESSO: the hybrid structured-sparse optimizer of Only Train Once (Chen et al. 2024).

Of the G groups of the network (`sparsejax.structure`), K = floor(sparsity G) are removed while it trains, in P
periods between `begin` and `end`. At the start of a period about K/P groups of lowest saliency
(`sparsejax.saliency`), over all layers together, become redundant. With T the steps of the period, step t of it
is

    x <- x + update                      everywhere, by the inner optimizer
    x <- (T - t - 1) / (T - t) x         redundant groups

so that they shrink linearly to exactly zero, and stay there: their own weights are masked, and so are the
inputs that they feed. A layer always keeps its best group. No fine-tuning follows; training just goes on.

The released code marks not exactly the lowest groups (it sorts candidates by index before it cuts the list),
rewards groups that move towards zero (see `saliency`), and removes less than K where a layer would be emptied;
here the next lowest groups go instead, so that the count is K.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import saliency
from sparsejax.masks import Masks, check_sparsity, dense_masks
from sparsejax.structure import Groups
from sparsejax.topology import land_on_zero, masked_update


class HessoState(NamedTuple):
    """count: steps taken; masks: zero on pruned groups; redundant, pruned: bool (G,), the groups that shrink
    and those that are gone; metrics: `groups`, how many are left; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    redundant: jnp.ndarray
    pruned: jnp.ndarray
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def hesso(
    inner: optax.GradientTransformation,
    *,
    groups: Groups,
    sparsity: float,
    end: int,
    begin: int = 0,
    periods: int = 1,
    criteria: Iterable[str] = saliency.DEFAULT,
) -> optax.GradientTransformationExtraArgs:
    """Removes whole groups while it trains.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      groups: the removable groups, from `sparsejax.structure.channels`. The training loop fills them in.
      sparsity: the fraction of groups to remove, in [0, 1).
      begin, end: steps (counted from 0) between which groups are removed; the last ones are zero after step
        `end - 1`.
      periods: P, in how many instalments.
      criteria: names of `sparsejax.saliency.CRITERIA`; their mixture ranks the groups.
    """
    criteria = saliency.check_criteria(criteria)
    total = saliency.redundant_count(groups, check_sparsity(sparsity))
    saliency.check_begin(begin)
    if not 1 <= periods <= end - begin:
        raise ValueError(
            f"periods must be at least 1 and fit between begin and end, got periods={periods}, begin={begin}, end={end}"
        )
    borders = np.asarray([begin + (end - begin) * p // periods for p in range(periods + 1)], np.int32)
    goals = np.asarray([total * (p + 1) // periods for p in range(periods)], np.int32)

    def init(params):
        groups.check(params)
        none = jnp.zeros(groups.count, bool)
        masks = groups.masks(params, ~none) if total else dense_masks(params)
        metrics = {"groups": jnp.float32(groups.count)}
        return HessoState(jnp.zeros([], jnp.int32), masks, none, jnp.array(none), metrics, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        count = state.count
        updates, inner_state = masked_update(inner, grads, state.inner_state, params, state.masks, extra_args)
        state = state._replace(count=optax.safe_increment(count), inner_state=inner_state)
        if not total:
            return updates, state
        period = jnp.clip(jnp.searchsorted(borders, count, side="right") - 1, 0, periods - 1)
        active, stop = (count >= begin) & (count < end), jnp.asarray(borders)[period + 1]

        def mark():
            scores = saliency.saliency(groups, params, updates, criteria)
            missing = jnp.asarray(goals)[period] - jnp.sum(state.pruned)
            return saliency.lowest(groups, scores, missing, ~state.pruned)

        starting = active & (count == jnp.asarray(borders)[period])
        redundant = jax.lax.cond(starting, mark, lambda: state.redundant)
        left = (stop - count - 1) / jnp.maximum(stop - count, 1)
        updates = saliency.shrink(groups, redundant, left, updates, params)
        finished = active & (count == stop - 1)
        pruned = state.pruned | (redundant & finished)
        masks = groups.masks(params, ~pruned)
        return land_on_zero(updates, params, masks), state._replace(
            masks=masks,
            redundant=redundant & ~finished,
            pruned=pruned,
            metrics={"groups": jnp.sum(~pruned, dtype=jnp.float32)},
        )

    return optax.GradientTransformationExtraArgs(init, update)
