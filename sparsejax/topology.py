"""What all sparse training methods share: the masked step, drop and grow, and fresh moments.

One training step of a sparse-to-sparse or gradual method (`evolve`) steps the inner optimizer on the kept
weights and changes the masks if that is due, after which `params + updates` is exactly zero outside the new
masks. A weight that was just grown starts at zero, with the inner optimizer's state as its `init` gives it.

Departure from the reference code of SET and RigL: the step on which the masks change still updates the
surviving weights. There it is skipped, which freezes learning-rate schedules and stops training altogether at
an update period of one.
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
    """One training step: the inner optimizer under the present masks, then new masks from `change()` if
    `due`.

    Args:
      inner: an Optax transformation.
      due: bool scalar, may be traced.
      change: function of the present masks that returns the new ones.
      grads: gradients with respect to the masked weights (dense; they are masked here).
      state: NamedTuple with `count`, `masks`, `inner_state` and, where the method tracks it, `fired`.
      params, extra_args: as for `inner.update`. The params may be unmasked at the first step only.

    Returns:
      (updates, state) with those fields replaced.
    """
    updates, inner_state = masked_update(inner, grads, state.inner_state, params, state.masks, extra_args)
    # The barrier ends the use of the old masks, so that XLA can keep them in place where nothing changes.
    inner_state, masks = jax.lax.optimization_barrier((inner_state, state.masks))
    tracked = {"masks": masks} | ({"fired": state.fired} if hasattr(state, "fired") else {})

    def changed(tracked):
        masks = change(tracked["masks"])
        fired = {"fired": jax.tree.map(jnp.logical_or, tracked["fired"], masks)} if "fired" in tracked else {}
        return {"masks": masks} | fired

    tracked = jax.lax.cond(due, changed, lambda tracked: tracked, tracked)
    updates = land_on_zero(updates, params, tracked["masks"])
    return updates, state._replace(
        count=optax.safe_increment(state.count), inner_state=inner_state, **tracked
    )


def masked_update(inner, grads, inner_state, params, masks, extra_args: Mapping | None = None):
    """`inner.update` with masked gradients, and with fresh state for every weight outside the masks.

    So a weight that grows meets the state that `inner.init` makes (after updates by zero gradients, which for
    the moments of Adam and its kin is the same).

    Returns:
      (updates, inner_state); the updates still have to land on zero.
    """
    inner = optax.with_extra_args_support(inner)
    # before the update, where XLA fuses it into the optimizer's own pass over its state
    inner_state = reset_state(inner, inner_state, params, masks)
    return inner.update(apply_masks(grads, masks), inner_state, params, **(extra_args or {}))


def land_on_zero(updates, params, masks):
    """Updates after which `params + updates` is exactly zero outside the masks."""

    def land(update, param, mask):
        return jnp.where(mask, update.astype(param.dtype), -param) if is_sparsified(mask) else update

    return jax.tree.map(land, updates, params, masks)


def reset_state(inner, inner_state, params, masks):
    """The inner state with every entry that belongs to a weight outside the masks as `inner.init` makes it.

    Entries are found by structure, not by class (`masks.owner`), so it works for any Optax chain, and leaves
    alone statistics that are shared by many weights (counts, the factored rows and columns of Adafactor).
    """
    owners = dict(jax.tree_util.tree_leaves_with_path(masks))
    if not any(is_sparsified(mask) for mask in owners.values()):
        return inner_state
    fresh = inner.init(apply_masks(params, masks))

    def reset(path, value, initial):
        mask = masks_lib.owner(path, owners)
        return value if mask is None or mask.shape != jnp.shape(value) else jnp.where(mask, value, initial)

    return jax.tree_util.tree_map_with_path(reset, inner_state, fresh)


def drop_and_grow(pattern: Pattern, mask, drop_scores, grow_scores, fraction):
    """Drops the share `fraction` of a leaf's kept units and grows as many: the step of SET, RigL and their
    kin.

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
    """Masks that sparsify the leaves of `patterns` but keep every weight so far: where gradual methods
    start."""
    return masks_lib.map_with_name(
        lambda name, leaf: jnp.ones(leaf.shape, bool) if name in patterns else jnp.asarray(True), params
    )


def change_leaves(function, patterns: Mapping[str, Pattern], masks, *trees):
    """Maps `function(name, pattern, mask, *leaves)` over the sparsified leaves; the others stay dense."""

    def leaf(name, mask, *leaves):
        return function(name, patterns[name], mask, *leaves) if name in patterns else mask

    return masks_lib.map_with_name(leaf, masks, *trees)
