"""MdGF: mask-decay gradient flow, of Progressive Gradient Flow for Robust N:M Sparsity Training in
Transformers (Bambhaniya et al. 2024).

With M_t the mask of largest |W_t|, chosen again at every step, the forward pass sees

    W~_t = W_t * [M_t + (1 - M_t) delta_t],

where delta falls from 1 (dense, before `begin`) over j = t - begin to 0 (strictly M_t, from `end` on):

    exponential:  delta = exp(-beta j)            linear:  delta = max(1 - beta j, 0).

The gradient of a pruned weight is delta g, which restricts its flow step by step (grad="scaled", the paper's
equation), or g, as in the released code (grad="ste"). With "scaled" and delta = 0 pruned weights rest.

The state's `masks` are the soft masks above: float32, exactly 0 and 1 from `end` on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import scores
from sparsejax.masks import Masks, apply_masks, choose, is_sparsified
from sparsejax.straight_through import GRADIENTS, best_masks
from sparsejax.target import target_of

# delta as a function of beta j, and the beta of the released configurations.
DECAYS = {
    "exponential": (lambda x: jnp.exp(-x), 1e-4),
    "linear": (lambda x: jnp.maximum(1.0 - x, 0.0), 8e-4),
}


class MdgfState(NamedTuple):
    """count: steps taken; masks: float32, of the present weights; metrics: {"mask_floor": delta of the next
    step}; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def mdgf(
    inner: optax.GradientTransformation,
    *,
    end: int,
    begin: int = 0,
    decay: str = "exponential",
    beta: float | None = None,
    grad: str = "scaled",
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Dense weights under soft masks whose floor decays from 1 to 0.

    Args:
      inner: any Optax transformation.
      begin, end: steps (counted from 0) between which delta decays; dense before, strict masks from `end` on.
      decay: "exponential" or "linear".
      beta: rate of the decay per step; None takes that of the released configurations: 1e-4 for exponential,
        8e-4 for linear.
      grad: what reaches pruned weights: "scaled" (delta g) or "ste" (g).
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    shape, usual = choose("decay", decay, DECAYS)
    scaled = choose("grad", grad, GRADIENTS) == "scaled"
    floor = floor_schedule(shape, usual if beta is None else beta, begin, end)
    aim, inner = target_of(**target), optax.with_extra_args_support(inner)

    def soft(params, count):
        masks = best_masks(aim, scores.magnitude(params))
        return {
            "masks": jax.tree.map(
                lambda m: jnp.where(m, 1.0, floor(count)) if is_sparsified(m) else m, masks
            ),
            "metrics": {"mask_floor": floor(count)},
        }

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return MdgfState(count, inner_state=inner.init(params), **soft(params, count))

    def update(grads, state, params=None, **extra_args):
        grads = apply_masks(grads, state.masks) if scaled else grads
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        fields = soft(optax.apply_updates(params, updates), count)
        return updates, state._replace(count=count, inner_state=inner_state, **fields)

    return optax.GradientTransformationExtraArgs(init, update)


def floor_schedule(shape, beta: float, begin: int, end: int) -> optax.Schedule:
    """delta over steps: 1 up to `begin`, `shape(beta * (step - begin))` up to `end`, 0 from it on.

    Raises:
      ValueError: for a negative beta, or an `end` before `begin`.
    """
    if beta < 0:
        raise ValueError(f"the decay rate beta must not be negative, got {beta}")
    if not 0 <= begin <= end:
        raise ValueError(f"mask decay needs 0 <= begin <= end, got begin={begin} and end={end}")

    def schedule(step):
        decayed = shape(beta * jnp.maximum(step - begin, 0).astype(jnp.float32))
        return jnp.where(step >= end, 0.0, decayed).astype(jnp.float32)

    return schedule
