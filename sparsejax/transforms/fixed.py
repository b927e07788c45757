"""Fixed masks: static sparse training, with given or randomly drawn masks.

theta <- (theta - update(g * m)) * m with a mask m that never changes. With random masks and
`allocation="erk"` it is the static baseline of RigL (Evci et al. 2020) and Random Pruning (Liu et al. 2022);
with the masks of `sparsejax.pruning.at_init` it is SNIP, GraSP and SynFlow; with those of a trained network
it is one round of iterative magnitude pruning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks import Masks, check_masks, copy_masks
from sparsejax.target import target_of
from sparsejax.topology import land_on_zero, masked_update


class FixedState(NamedTuple):
    """count: steps taken; masks: the fixed masks; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    inner_state: optax.OptState


def fixed(
    inner: optax.GradientTransformation, *, masks: Masks | None = None, seed: int = 0, **target
) -> optax.GradientTransformationExtraArgs:
    """Trains under masks that never change.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      masks: a mask tree like the parameters. Without it, masks are drawn at random.
      seed: of the random masks.
      **target: of the random masks: `sparsity`, `allocation`, `pattern`, `include`, `exclude`, see `Target`.
    """
    if masks is not None and target:
        raise ValueError(
            f"fixed takes either masks or a target for random ones, got masks and {', '.join(target)}"
        )
    aim = target_of(**target) if masks is None else None

    def init(params):
        if masks is not None:
            check_masks(masks, params)
        chosen = copy_masks(masks) if aim is None else aim.random_masks(jax.random.key(seed), params)
        return FixedState(jnp.zeros([], jnp.int32), chosen, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        updates, inner_state = masked_update(inner, grads, state.inner_state, params, state.masks, extra_args)
        updates = land_on_zero(updates, params, state.masks)
        return updates, FixedState(optax.safe_increment(state.count), state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
