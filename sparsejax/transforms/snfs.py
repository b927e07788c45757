"""SNFS: Sparse Networks from Scratch, sparse momentum (Dettmers & Zettlemoyer 2019).

A dense average of the gradients, V <- beta V + (1 - beta) g, decides where weights grow. Every `update_every`
steps the share f(t) of every leaf's weights with the smallest |w| is dropped; the R weights dropped in all
leaves together are divided over the leaves in proportion to the mean |V| of their kept weights, and grow
where |V| is largest. A leaf that is full passes its share on. The total count is constant, the counts of the
leaves are not.

Only `Unstructured` leaves take part in the redistribution (units of other patterns differ in size); all
others, and all leaves with `redistribute=False` (how RigL's authors ran it), grow what they dropped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax import scores, topology
from sparsejax.masks import Masks, apply_masks, copy_masks
from sparsejax.patterns import Unstructured
from sparsejax.schedules import drop_fraction_schedule, updates_due
from sparsejax.target import target_of


class SnfsState(NamedTuple):
    """count: steps taken; masks; fired: weights active at least once; momentum: V, float32 like the params
    (empty for leaves that are not sparsified); inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    fired: Masks
    momentum: optax.Updates
    inner_state: optax.OptState


def snfs(
    inner: optax.GradientTransformation,
    *,
    update_every: int = 100,
    drop_fraction: float | optax.Schedule = 0.5,
    update_end: int | None = None,
    beta: float = 0.9,
    redistribute: bool = True,
    seed: int = 0,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Drops the smallest weights and grows those with the largest momentum, across layers.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      update_every: steps between changes of the masks (the paper: one epoch).
      drop_fraction: share of the kept weights to replace. A float is annealed by a cosine to 0 at
        `update_end` (and constant without one); a schedule is used as it is.
      update_end: step from which the masks stay fixed; None never stops.
      beta: decay of the momentum, in [0, 1).
      redistribute: divide the dropped weights over the leaves by momentum.
      seed: of the random initial masks.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    aim = target_of(**target)
    fraction, due = (
        drop_fraction_schedule(drop_fraction, update_end),
        updates_due(update_every, end=update_end),
    )

    def init(params):
        masks = aim.random_masks(jax.random.key(seed), params)
        momentum = jax.tree.map(lambda mask: jnp.zeros(mask.shape, jnp.float32), masks)
        return SnfsState(jnp.zeros([], jnp.int32), masks, copy_masks(masks), momentum, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        patterns = aim.patterns(params)

        def average(mask, momentum, grad):
            return beta * momentum + (1 - beta) * grad if masks_lib.is_sparsified(mask) else momentum

        momentum = jax.tree.map(average, state.masks, state.momentum, grads)

        def change(masks):
            magnitudes = scores.magnitude(apply_masks(params, masks))
            leaves = (magnitudes, scores.magnitude(momentum))
            return _change(patterns, masks, *leaves, fraction(state.count), redistribute)

        state = state._replace(momentum=momentum)
        return topology.evolve(inner, due(state.count), change, grads, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _change(patterns, masks, magnitudes, momentum, fraction, redistribute):
    active, kept = {}, {}
    flat = {
        name: masks_lib.flatten(tree) for name, tree in [("mask", masks), ("w", magnitudes), ("v", momentum)]
    }
    for name, pattern in patterns.items():
        active[name] = pattern.reduce(flat["mask"][name])
        kept[name] = topology.drop(active[name], pattern.pool(flat["w"][name]), fraction)
    counts = {name: masks_lib.count(units) for name, units in active.items()}
    free = [name for name, pattern in patterns.items() if isinstance(pattern, Unstructured)]
    if redistribute and len(free) > 1:
        left = [masks_lib.count(kept[name]) for name in free]
        share = [jnp.sum(flat["v"][name] * kept[name]) / jnp.maximum(n, 1) for name, n in zip(free, left)]
        grown = divide(
            jnp.stack([counts[name] - n for name, n in zip(free, left)]),
            jnp.stack([kept[name].size - n for name, n in zip(free, left)]),
            jnp.stack(share),
        )
        counts |= {name: n + grown[i] for i, (name, n) in enumerate(zip(free, left))}

    def leaf(name, pattern, mask, value):
        units = pattern.select(pattern.pool(value), counts[name], keep=kept[name])
        return pattern.expand(units, mask.shape)

    return topology.change_leaves(leaf, patterns, masks, momentum)


def divide(dropped, room, share):
    """How many weights each leaf grows: in proportion to `share`, at most `room`, sum(dropped) in total.

    Args:
      dropped, room: integer arrays (leaves,), with sum(dropped) <= sum(room).
      share: float array (leaves,), not negative; if all are zero, every leaf grows what it dropped.

    Returns:
      int32 array (leaves,).
    """
    dropped, room = dropped.astype(jnp.int32), room.astype(jnp.int32)
    total = jnp.sum(dropped)
    share = jnp.where(jnp.sum(share) > 0, share, dropped.astype(jnp.float32))
    grown = jnp.zeros_like(room)
    for _ in range(room.size):  # each round fills at least one leaf or leaves only what rounding lost
        open_share = jnp.where(grown < room, share, 0.0)
        portion = open_share / jnp.maximum(jnp.sum(open_share), 1e-30)
        left = total - jnp.sum(grown)
        # rounding must neither lose a whole quota (5.9999) nor overspend in the sum
        wish = jnp.floor(left.astype(jnp.float32) * portion + 1e-3).astype(jnp.int32)
        grown += _in_order(jnp.minimum(wish, room - grown), left)
    return grown + _in_order(room - grown, total - jnp.sum(grown))


def _in_order(wish, budget):
    """Grants wishes from first to last until the budget is spent."""
    return jnp.clip(budget - (jnp.cumsum(wish) - wish), 0, wish)
