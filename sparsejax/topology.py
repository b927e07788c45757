"""What all sparse training methods share: the masked step, drop and grow, and fresh moments.

One training step of a sparse-to-sparse or gradual method (`evolve`) changes the masks if that is due and then
steps the inner optimizer, after which `params + updates` is exactly zero outside the new masks. A weight that
was just grown starts at zero, and the inner optimizer's state of every weight that did not survive (`old & new`)
is what its `init` gives.

Departure from the reference code of SET and RigL: the step on which the masks change still updates the
surviving weights. There it is skipped, which freezes learning-rate schedules and stops training altogether at an update
period of one.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax.masks import apply_masks, count, is_sparsified
from sparsejax.patterns import Pattern
from sparsejax.selection import top_k_mask


def evolve(inner, due, change, grads, state, params, extra_args: Mapping | None = None):
    """One training step: new masks from `change()` if `due`, then the masked step of the inner optimizer.

    Args:
      inner: an Optax transformation.
      due: bool scalar, may be traced.
      change: function without arguments that returns the new masks.
      grads: gradients with respect to the masked weights.
      state: NamedTuple with `count`, `masks`, `inner_state` and, where the method tracks it, `fired`.
      params, extra_args: as for `masked_step`.

    Returns:
      (updates, state) with those fields replaced.
    """
    tracked = {"masks": state.masks} | ({"fired": state.fired} if hasattr(state, "fired") else {})

    def changed():
        masks = change()
        return {"masks": masks} | ({"fired": _union(state.fired, masks)} if "fired" in tracked else {})

    tracked = jax.lax.cond(due, changed, lambda: tracked)
    updates, inner_state = masked_step(
        inner, grads, state.inner_state, params, state.masks, tracked["masks"], extra_args
    )
    return updates, state._replace(count=optax.safe_increment(state.count), inner_state=inner_state, **tracked)


def masked_step(inner, grads, inner_state, params, old, new, extra_args: Mapping | None = None):
    """One step of the inner optimizer on the weights that survive, and zero everywhere else.

    Args:
      inner: an Optax transformation.
      grads: gradients with respect to the masked weights (dense; they are masked here).
      inner_state, params: as in `inner.update`.
      old, new: bool masks before and after this step's change of topology; pass the same tree twice if none.
      extra_args: further keyword arguments of `inner.update`.

    Returns:
      (updates, inner_state).
    """
    survived = new if new is old else jax.tree.map(jnp.logical_and, old, new)
    seen = apply_masks(params, old)
    inner = optax.with_extra_args_support(inner)
    updates, inner_state = inner.update(apply_masks(grads, old), inner_state, seen, **(extra_args or {}))
    inner_state = reset_state(inner, inner_state, seen, survived)
    return jax.tree.map(_land_on_zero, updates, params, survived), inner_state


def _land_on_zero(update, param, survived):
    return jnp.where(survived, update.astype(param.dtype), -param) if is_sparsified(survived) else update


def reset_state(inner, inner_state, params, survived):
    """The inner state with every entry that belongs to a weight outside `survived` as `inner.init` makes it.

    Entries are found by structure, not by class (`masks.owner`), so it works for any Optax chain, and leaves alone
    statistics that are shared by many weights (counts, the factored rows and columns of Adafactor).
    """
    owners = dict(jax.tree_util.tree_leaves_with_path(survived))
    if not any(is_sparsified(mask) for mask in owners.values()):
        return inner_state
    fresh = inner.init(apply_masks(params, survived))

    def reset(path, value, initial):
        mask = masks_lib.owner(path, owners)
        return value if mask is None or mask.shape != jnp.shape(value) else jnp.where(mask, value, initial)

    return jax.tree_util.tree_map_with_path(reset, inner_state, fresh)


def drop_and_grow(pattern: Pattern, mask, drop_scores, grow_scores, fraction):
    """Drops the share `fraction` of a leaf's kept units and grows as many: the step of SET, RigL and their kin.

    Dropped are the kept units with the lowest `drop_scores`; grown are those with the highest `grow_scores`
    among all that are not kept now, a unit that was just dropped included (it then keeps its weight). The
    number of units stays the same. Under N:M, dropping is free and growing restores n in every group.

    Args:
      pattern: the leaf's pattern.
      mask: bool array, obeying the pattern.
      drop_scores: array of the mask's shape.
      grow_scores: array of the mask's shape, or of the pattern's unit scores' shape.
      fraction: scalar in [0, 1], may be traced; floor(fraction * units kept) are dropped.

    Returns:
      The new bool mask.
    """
    active = pattern.reduce(mask)
    kept = drop(active, pattern.pool(drop_scores), fraction)
    if grow_scores.shape != active.shape:
        grow_scores = pattern.pool(grow_scores)
    return pattern.expand(pattern.select(grow_scores, count(active), keep=kept), mask.shape)


def drop(active, unit_scores, fraction):
    """The active units that remain after dropping floor(fraction * their number) of the lowest scores."""
    dropped = jnp.floor(fraction * count(active).astype(jnp.float32)).astype(jnp.uint32)
    return top_k_mask(unit_scores, count(active) - dropped, candidates=active) & active


def open_masks(patterns: Mapping[str, Pattern], params):
    """Masks that sparsify the leaves of `patterns` but keep every weight so far: where gradual methods start."""
    return masks_lib.map_with_name(
        lambda name, leaf: jnp.ones(leaf.shape, bool) if name in patterns else jnp.asarray(True), params
    )


def change_leaves(function, patterns: Mapping[str, Pattern], masks, *trees):
    """Maps `function(name, pattern, mask, *leaves)` over the sparsified leaves; the others stay dense."""

    def leaf(name, mask, *leaves):
        return function(name, patterns[name], mask, *leaves) if name in patterns else mask

    return masks_lib.map_with_name(leaf, masks, *trees)


def _union(fired, masks):
    return jax.tree.map(jnp.logical_or, fired, masks)
