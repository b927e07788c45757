"""STE: training under N:M masks with the straight-through estimator (Bengio et al. 2013; Zhou et al. 2021).

With M_t the mask that keeps the N largest |W_t| of every M weights, and lr the learning rate:

    W_{t+1} = W_t - lr g,      g = dL/dW~ at W~ = M_t * W_t,

where g is dense: pruned weights receive it as if they were kept. The weights stay dense, the masks are chosen
again after every update. Any inner optimizer and any pattern will do.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax import straight_through
from sparsejax.masks import Masks
from sparsejax.schedules import updates_due
from sparsejax.target import target_of


class SteState(NamedTuple):
    """count: steps taken; masks: of the present weights; metrics: {"sad": mask entries flipped so far};
    inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def ste(
    inner: optax.GradientTransformation, *, refresh_every: int = 1, **target
) -> optax.GradientTransformationExtraArgs:
    """Dense weights under masks of largest magnitude that follow them.

    Args:
      inner: any Optax transformation; it sees the dense gradient of the masked weights.
      refresh_every: steps between two choices of the masks.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    aim, inner = target_of(**target), optax.with_extra_args_support(inner)
    due = updates_due(refresh_every)

    def init(params):
        return SteState(
            jnp.zeros([], jnp.int32), **straight_through.start(aim, params), inner_state=inner.init(params)
        )

    def update(grads, state, params=None, **extra_args):
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        followed = straight_through.follow(aim, state, params, updates, due=refresh_every == 1 or due(count))
        return updates, state._replace(count=count, inner_state=inner_state, **followed)

    return optax.GradientTransformationExtraArgs(init, update)
