"""Proximal nuclear norm: training towards low rank by soft thresholds of singular values (Cai et al. 2010).

Every `update_every` steps, with c = lambda times the sum of the learning rates since the last time, in every
chosen leaf seen as a matrix W (all axes but the last, by the last):

    W <- U max(S - c, 0) V^T,    U S V^T = the singular value decomposition of W after the inner update.

At step `end` the leaf is truncated to its r = round((1 - sparsity) min(m, n)) largest singular values. From
then on the updates are projected on the r left singular vectors (right ones if n is the smaller side), so
that the rank stays at most r (up to the rounding of the parameters' dtype): the counterpart of a fixed mask. A low-rank matrix has no zeros, so the masks
are dense.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax.forward_backward import check_strength, end_step, rate_of
from sparsejax.masks import Masks, check_sparsity, dense_masks
from sparsejax.proximal import nuclear_prox, product


class NuclearState(NamedTuple):
    """count: steps taken; masks: the scalar True everywhere; owed: learning rates summed since the last
    decomposition; bases: per chosen leaf the kept singular vectors, zero before `end`; metrics: `rank`, the
    sum over the chosen leaves at the last change; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    owed: jnp.ndarray
    bases: dict[str, jnp.ndarray]
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def nuclear(
    inner: optax.GradientTransformation,
    *,
    learning_rate: float | optax.Schedule,
    strength: float,
    sparsity: float,
    update_every: int = 10,
    end: int | None = None,
    steps: int | None = None,
    include=masks_lib.INCLUDE,
    exclude=(),
) -> optax.GradientTransformationExtraArgs:
    """Shrinks singular values, and at `end` fixes the rank.

    Args:
      inner: any Optax transformation.
      learning_rate: of the inner optimizer, a float or its schedule.
      strength: lambda.
      sparsity: share of the singular values that are zero after `end`, in [0, 1).
      update_every: steps between two decompositions.
      end: step at which the rank is fixed; default 3/4 of `steps`.
      steps: number of steps of the training.
      include, exclude: which leaves, see `masks.sparsifiable`.
    """
    inner, end, rate = optax.with_extra_args_support(inner), end_step(end, steps), rate_of(learning_rate)
    check_strength(strength)
    check_sparsity(sparsity)
    if update_every < 1:
        raise ValueError(f"update_every must be at least 1 step, got {update_every}")

    def chosen(params):
        if sparsity == 0:
            return {}
        leaves = masks_lib.sparsifiable(params, include, exclude)
        return {name: leaf.reshape(-1, leaf.shape[-1]).astype(jnp.float32) for name, leaf in leaves.items()}

    def init(params):
        matrices = chosen(params)
        ranks = {name: max(1, round((1 - sparsity) * min(m.shape))) for name, m in matrices.items()}
        bases = {name: jnp.zeros((min(m.shape), ranks[name])) for name, m in matrices.items()}
        full = jnp.float32(sum(min(m.shape) for m in matrices.values()))
        zero = jnp.zeros([], jnp.int32)
        return NuclearState(
            zero, dense_masks(params), jnp.float32(0), bases, {"rank": full}, inner.init(params)
        )

    def update(grads, state, params=None, **extra_args):
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        values = chosen(jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, params, updates))
        owed = state.owed + rate(state.count)
        due = (state.count < end) & ((state.count + 1) % update_every == 0)

        def keep():
            return values, state.bases, owed, state.metrics["rank"]

        def shrink():
            found = {name: nuclear_prox(v, strength * owed, return_rank=True) for name, v in values.items()}
            rank = sum((r for _, r in found.values()), jnp.int32(0)).astype(jnp.float32)
            return {name: x for name, (x, _) in found.items()}, state.bases, jnp.float32(0), rank

        def fix():
            bases = {name: _basis(v, state.bases[name].shape[1]) for name, v in values.items()}
            rank = sum(basis.shape[1] for basis in bases.values())
            projected = {name: _project(v, bases[name]) for name, v in values.items()}
            return projected, bases, owed, jnp.float32(rank)

        def rest():
            projected = {name: _project(v, state.bases[name]) for name, v in values.items()}
            return projected, state.bases, owed, state.metrics["rank"]

        stage = jnp.where(state.count < end, due.astype(jnp.int32), 2 + (state.count > end))
        values, bases, owed, rank = jax.lax.switch(stage, [keep, shrink, fix, rest])

        def land(name, update, param):
            if name not in values:
                return update
            return (values[name].reshape(param.shape) - param).astype(param.dtype)

        updates = masks_lib.map_with_name(land, updates, params)
        count = optax.safe_increment(state.count)
        return updates, NuclearState(count, state.masks, owed, bases, {"rank": rank}, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _basis(matrix, rank: int):
    """The first singular vectors of the shorter side of a matrix."""
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] if matrix.shape[0] <= matrix.shape[1] else right[:rank].T


def _project(matrix, basis):
    if matrix.shape[0] <= matrix.shape[1]:
        return product(basis, product(basis.T, matrix))
    return product(product(matrix, basis), basis.T)
