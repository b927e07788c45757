"""SR-STE: Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (Zhou et al. 2021).

The straight-through estimator (see `ste`) with a decay of what is pruned, part of the gradient:

    W_{t+1} = W_t - lr [ g + decay (1 - M_t) * W_t ],      g = dL/dW~ at W~ = M_t * W_t.

So the term enters the momentum of the inner optimizer, on top of ordinary weight decay; under Adam it is
normalised with the gradient, and the pruned weights then need a larger `decay` than the paper's for SGD. The
masks flip less the larger it is (SAD: `metrics["sad"]`, accumulated over steps); a negative one makes them
flip more.

With `decoupled=True` the term bypasses the inner optimizer instead, as the weight decay of AdamW does:
W_{t+1} = W_t + inner update - lr decay (1 - M_t) * W_t. For plain SGD both are the same.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax import straight_through
from sparsejax.masks import Masks
from sparsejax.schedules import updates_due
from sparsejax.target import target_of


class SrSteState(NamedTuple):
    """count: steps taken; masks: of the present weights; metrics: {"sad": mask entries flipped so far};
    inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def sr_ste(
    inner: optax.GradientTransformation,
    *,
    decay: float = 2e-4,
    decoupled: bool = False,
    learning_rate: float | optax.Schedule | None = None,
    refresh_every: int = 1,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Dense weights under masks of largest magnitude, with decay of the pruned weights.

    Args:
      inner: any Optax transformation; it sees the dense gradient of the masked weights.
      decay: strength of the decay, constant in time and the same for all layers.
      decoupled: keep the term out of the inner optimizer; needs `learning_rate`.
      learning_rate: of the decoupled term only.
      refresh_every: steps between two choices of the masks.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    if decoupled and learning_rate is None:
        raise ValueError("sr_ste with decoupled=True needs a learning_rate, got None")
    aim, inner = target_of(**target), optax.with_extra_args_support(inner)
    due = updates_due(refresh_every)

    def init(params):
        return SrSteState(
            jnp.zeros([], jnp.int32), **straight_through.start(aim, params), inner_state=inner.init(params)
        )

    def update(grads, state, params=None, **extra_args):
        if decay and not decoupled:  # without decay it is `ste` to the bit
            grads = straight_through.shrink(grads, params, state.masks, decay)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        if decay and decoupled:
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
            updates = straight_through.shrink(updates, params, state.masks, -rate * decay)
        count = optax.safe_increment(state.count)
        followed = straight_through.follow(aim, state, params, updates, due=refresh_every == 1 or due(count))
        return updates, state._replace(count=count, inner_state=inner_state, **followed)

    return optax.GradientTransformationExtraArgs(init, update)
