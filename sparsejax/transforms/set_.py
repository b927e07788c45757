"""SET: Scalable training of artificial neural networks with adaptive sparse connectivity (Mocanu et al.
2018).

Every `update_every` steps, in every sparsified leaf with n kept weights and r = floor(f(t) n): the r kept
weights of smallest |w| are dropped and r others grown uniformly at random.

Ours departs from the original in the ways that later work adopted: magnitudes decide (there, the smallest
positive and the largest negative weights are dropped separately), grown weights start at zero instead of N(0,
0.1^2), and the fraction may be annealed by a cosine. `unfired_first` is the option of In-Time
Over-Parameterization (Liu et al. 2021): weights that were never active are grown before all others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax import scores, topology
from sparsejax.masks import Masks, apply_masks, copy_masks
from sparsejax.schedules import drop_fraction_schedule, updates_due
from sparsejax.target import random_units, target_of


class SetState(NamedTuple):
    """count: steps taken; key: raw PRNG key of the growth; masks; fired: weights active at least once;
    inner_state: the inner optimizer's."""

    count: jnp.ndarray
    key: jnp.ndarray
    masks: Masks
    fired: Masks
    inner_state: optax.OptState


def set_(
    inner: optax.GradientTransformation,
    *,
    update_every: int = 100,
    drop_fraction: float | optax.Schedule = 0.3,
    update_end: int | None = None,
    unfired_first: bool = False,
    seed: int = 0,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Drops the smallest weights and grows others at random.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      update_every: steps between changes of the masks (the paper: one epoch).
      drop_fraction: share zeta of the kept weights to replace. A float is annealed by a cosine to 0 at
        `update_end` (and constant without one); a schedule is used as it is.
      update_end: step from which the masks stay fixed; None never stops.
      unfired_first: grow units that were never active before any other.
      seed: of the initial masks and the growth.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    aim = target_of(**target)
    fraction, due = (
        drop_fraction_schedule(drop_fraction, update_end),
        updates_due(update_every, end=update_end),
    )

    def init(params):
        key, growth = jax.random.split(jax.random.key(seed))
        masks = aim.random_masks(key, params)
        return SetState(
            jnp.zeros([], jnp.int32),
            jax.random.key_data(growth),
            masks,
            copy_masks(masks),
            inner.init(params),
        )

    def update(grads, state, params=None, **extra_args):
        patterns = aim.patterns(params)

        def change(masks):
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
            drawn = random_units(key, patterns, masks_lib.flatten(params))

            def leaf(name, pattern, mask, weight, fired):
                grow = drawn[name] + (1.0 - pattern.reduce(fired)) if unfired_first else drawn[name]
                return topology.drop_and_grow(pattern, mask, weight, grow, fraction(state.count))

            magnitudes = scores.magnitude(apply_masks(params, masks))
            return topology.change_leaves(leaf, patterns, masks, magnitudes, state.fired)

        return topology.evolve(inner, due(state.count), change, grads, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
