"""Gradual magnitude pruning: To prune, or not to prune (Zhu & Gupta 2017).

Starts dense and raises the sparsity of every leaf along

    s_t = s_f (1 - (1 - (t - begin) / (end - begin))^3),

keeping the weights of largest magnitude at every update. Pruned weights are zero and get no gradient, so
masks are nested and never recover (the reference code keeps their frozen values, so that there they can). The
final sparsity is reached exactly at `end`, whatever the period of the updates.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax import scores
from sparsejax.masks import Masks, apply_masks, choose
from sparsejax.schedules import cubic, linear, updates_due
from sparsejax.target import target_of
from sparsejax.topology import evolve, open_masks


class GradualState(NamedTuple):
    """count: steps taken; masks: nested over time; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    inner_state: optax.OptState


def gradual(
    inner: optax.GradientTransformation,
    *,
    end: int,
    begin: int = 0,
    update_every: int = 100,
    schedule: str = "cubic",
    score: str = "magnitude",
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Prunes step by step from dense to the target.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      begin, end: steps (counted from 0) between which the sparsity rises; training must go on beyond `end`.
      update_every: steps between changes of the masks (the paper: 100 to 1000).
      schedule: "cubic" as in the paper, or "linear".
      score: what is kept, a name of `sparsejax.scores.SCORES`.
      **target: `sparsity`, `allocation` ("uniform", as in the paper; `global` and `lamp` re-divide the budget
        at every update), `pattern`, `include`, `exclude`, see `Target`.
    """
    aim = target_of(**{"allocation": "uniform", **target})
    progress = choose("schedule", schedule, {"cubic": cubic, "linear": linear})(begin, end)
    due = updates_due(update_every, begin, end, force_end=True)
    score_of = choose("score", score, scores.SCORES)

    def init(params):
        return GradualState(
            jnp.zeros([], jnp.int32), open_masks(aim.patterns(params), params), inner.init(params)
        )

    def update(grads, state, params=None, **extra_args):
        def change(masks):
            values = score_of(apply_masks(params, masks), grads)
            counts = aim.counts_on_the_way(values, 1.0 - progress(state.count), masks)
            return aim.masks(values, counts, masks)

        return evolve(inner, due(state.count), change, grads, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
