"""Dense training: the inner optimizer and masks that sparsify nothing, so that a baseline runs like a
method."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax.masks import Masks, dense_masks


class DenseState(NamedTuple):
    """count: steps taken; masks: the scalar True everywhere; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    inner_state: optax.OptState


def dense(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer unchanged.

    Args:
      inner: any Optax transformation.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return DenseState(jnp.zeros([], jnp.int32), dense_masks(params), inner.init(params))

    def update(grads, state, params=None, **extra_args):
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        return updates, DenseState(optax.safe_increment(state.count), state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
