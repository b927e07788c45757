"""RigL: Rigging the Lottery, Making All Tickets Winners (Evci et al. 2020).

Every `update_every` steps, in every sparsified leaf with n kept weights and r = floor(f(t) n):

    keep = the n - r kept weights of largest |w|;  grow = the r others of largest |dL/dw|,

where the gradient is that of the masked weights and f(t) = drop_fraction / 2 (1 + cos(pi t / update_end)).
Grown weights start at zero with fresh optimizer state. On patterns, |w| and |g| are averaged over each unit.

Unlike the reference code, the step that changes the masks still updates the surviving weights (`topology`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import scores, topology
from sparsejax.masks import Masks, apply_masks, copy_masks
from sparsejax.schedules import drop_fraction_schedule, updates_due
from sparsejax.target import target_of


class RigLState(NamedTuple):
    """count: steps taken; masks; fired: weights active at least once; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    fired: Masks
    inner_state: optax.OptState


def rigl(
    inner: optax.GradientTransformation,
    *,
    update_every: int = 100,
    drop_fraction: float | optax.Schedule = 0.3,
    update_end: int | None = None,
    seed: int = 0,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Drops the smallest weights and grows those with the largest gradients.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      update_every: steps between changes of the masks.
      drop_fraction: share of the kept weights to replace. A float is annealed by a cosine to 0 at
        `update_end` (and constant without one); a schedule is used as it is.
      update_end: step from which the masks stay fixed; the paper uses 3/4 of training. None never stops.
      seed: of the random initial masks.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    aim = target_of(**target)
    fraction, due = (
        drop_fraction_schedule(drop_fraction, update_end),
        updates_due(update_every, end=update_end),
    )

    def init(params):
        masks = aim.random_masks(jax.random.key(seed), params)
        return RigLState(jnp.zeros([], jnp.int32), masks, copy_masks(masks), inner.init(params))

    def update(grads, state, params=None, **extra_args):
        patterns = aim.patterns(params)

        def change(masks):
            def leaf(_, pattern, mask, weight, grad):
                return topology.drop_and_grow(pattern, mask, weight, grad, fraction(state.count))

            magnitudes = scores.magnitude(apply_masks(params, masks))
            return topology.change_leaves(leaf, patterns, masks, magnitudes, scores.gradient(grads))

        return topology.evolve(inner, due(state.count), change, grads, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
