"""One-shot pruning during training: dense until step `at`, then pruned once and trained on with fixed masks.

The baseline of every gradual method, and with `at` late in training the usual prune and fine-tune (Han et al.
2015).
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax import scores
from sparsejax.masks import Masks, choose
from sparsejax.target import target_of
from sparsejax.topology import evolve, open_masks


class OneShotState(NamedTuple):
    """count: steps taken; masks: all True before step `at`; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    inner_state: optax.OptState


def one_shot(
    inner: optax.GradientTransformation, *, at: int, score: str = "magnitude", **target
) -> optax.GradientTransformationExtraArgs:
    """Prunes once.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      at: the step (counted from 0) at which to prune.
      score: what is kept, a name of `sparsejax.scores.SCORES`.
      **target: `sparsity`, `allocation` ("global"), `pattern`, `include`, `exclude`, see `Target`.
    """
    if at < 0:
        raise ValueError(f"the step of one-shot pruning must not be negative, got at={at}")
    aim = target_of(**{"allocation": "global", **target})
    score_of = choose("score", score, scores.SCORES)

    def init(params):
        return OneShotState(
            jnp.zeros([], jnp.int32), open_masks(aim.patterns(params), params), inner.init(params)
        )

    def update(grads, state, params=None, **extra_args):
        def change(_):
            values = score_of(params, grads)
            return aim.masks(values, aim.counts_on_the_way(values, 0.0))

        return evolve(inner, state.count == at, change, grads, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
