"""What straight-through methods share: dense weights, masks that follow them, and decay of what is pruned.

The forward pass sees M * W, with M the allowed mask of largest |W|; the gradient g with respect to M * W is
dense and reaches every weight (`sparsejax.masks.mask_weight`). Nothing is ever set to zero: a pruned weight
goes on moving and comes back when it has grown large enough. A method of this kind is

    updates = inner.update(shrink(g, W, M, decay))      # decay 0: the plain straight-through estimator
    M = follow(...)                                     # from W + updates, for the next forward pass

and has a state with `masks` and `metrics`, which `start` makes and `follow` advances.
"""

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax import scores as scores_lib
from sparsejax.masks import is_sparsified
from sparsejax.target import Target

# What reaches pruned weights, where a method leaves the choice: their (soft) mask's share of g, or all of it.
GRADIENTS = ("scaled", "ste")


def start(aim: Target, params) -> dict:
    """The state fields `masks` (of the initial weights) and `metrics` ({"sad": 0.0})."""
    masks = best_masks(aim, scores_lib.magnitude(params))
    return {"masks": masks, "metrics": {"sad": jnp.zeros([], jnp.float32)}}


def best_masks(aim: Target, scores) -> masks_lib.Masks:
    """The target's masks of highest score; jit-safe for every allocation."""
    return aim.masks(scores, aim.counts_on_the_way(scores, 0.0))


def follow(aim: Target, state, params, updates, due=True) -> dict:
    """The state fields `masks` and `metrics` after this step, for `state._replace(**...)`.

    Args:
      aim: what the masks should look like.
      state: the method's state, with `masks` and `metrics["sad"]`.
      params, updates: as the caller will add them up; the masks are those of their sum.
      due: whether the masks are chosen again: True, or a traced bool scalar.

    Returns:
      `masks`, and `metrics` with `masks.sad` between the old and the new masks added to "sad": the flips of
      all steps so far.
    """

    def chosen():
        masks = best_masks(aim, scores_lib.magnitude(optax.apply_updates(params, updates)))
        return masks, masks_lib.sad(state.masks, masks)

    if due is True:
        masks, flips = chosen()
    else:
        masks, flips = jax.lax.cond(due, chosen, lambda: (state.masks, jnp.zeros([], jnp.float32)))
    return {"masks": masks, "metrics": {**state.metrics, "sad": state.metrics["sad"] + flips}}


def shrink(values, params, masks, strength):
    """values + strength (1 - M) W: the sparse-refined term, zero on kept weights and dense leaves.

    Args:
      values: tree like the params that the term is added to: gradients (SR-STE) or momenta (AST).
      params: the dense weights W.
      masks: bool masks M.
      strength: scalar, may be traced; above 0 pulls the pruned weights to zero.
    """

    def leaf(value, param, mask):
        if not is_sparsified(mask):
            return value
        return jnp.where(mask, value, value + (strength * param).astype(value.dtype))

    return jax.tree.map(leaf, values, params, masks)
