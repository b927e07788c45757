"""Natural GaLore: natural gradients in a low-rank subspace of every weight matrix (Das 2024; GaLore: Zhao et al.
2024). An optimizer, not a sparse training method: its weights are dense, it owns no masks and `sparsity=0` has no
meaning for it. It is therefore no member of `sparsejax.transforms.METHODS`; sparse transforms may wrap it.

For the gradient G (m, n) of a matrix, m >= n, with P its first r right singular vectors, found again every
`update_every` steps (for m < n: R = P^T G with left ones):

    R = G P                                                     (m, r)
    H = the last `history` vectors vec(R), this one included, as columns
    vec(N) = (damping I + H H^T)^-1 vec(R) = Q_1 Q_2^T e / sqrt(damping),      e = the unit vector of this R
             with the QR decomposition [H; sqrt(damping) I] = [Q_1; Q_2] T
    update = scale inner(N) P^T

The second form of the natural step N factorises `history` columns only, as Woodbury's identity of the paper does; but
the sums of that one, and of H (damping I + H^T H)^-1 e, are of numbers of size 1 / damping that cancel where past
gradients are alike, and in H^T H float32 loses the damping.

Memory per matrix, in float32: min(m, n) r for P, the inner state on max(m, n) r numbers, and `history` times
max(m, n) r for H. With the defaults that is more than Adam's two moments of the whole matrix unless min(m, n)
exceeds r (history + 2) / 2 or so; `history=0` is plain GaLore, which holds no H and takes no natural step.

Departures: the moments of the inner optimizer and H are not carried over into a new subspace (nor are they in the
paper). The released code projects both sides of a matrix; here it is the shorter one, as in the paper.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax.proximal import product


class NaturalGaLoreState(NamedTuple):
    """count: steps taken; bases: per chosen leaf P, (min(m, n), r); past: per chosen leaf the projected
    gradients that H is made of, (history, *shape of R), zero where there was no step yet; inner_state: the inner
    optimizer's, on a tree whose chosen leaves have the shape of R. All float32."""

    count: jnp.ndarray
    bases: dict[str, jnp.ndarray]
    past: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def natural_galore(
    inner: optax.GradientTransformation,
    *,
    rank: int = 128,
    update_every: int = 200,
    scale: float = 0.25,
    history: int = 20,
    damping: float = 1e-3,
    include=("*kernel",),
    exclude=(),
) -> optax.GradientTransformation:
    """Projects gradients, takes the natural step, runs the inner optimizer there, and projects back.

    Args:
      inner: an Optax transformation that needs no parameters, such as `optax.adam(0.01)`: those of the subspace
        have other shapes. Decoupled weight decay goes behind, as in
        `optax.chain(natural_galore(optax.scale_by_adam()), optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01))`.
      rank: r; a matrix with a side below it keeps all directions of that side.
      update_every: steps between two singular value decompositions; the first step makes the first.
      scale: factor of the updates of the chosen leaves.
      history: how many gradients the Fisher matrix is estimated from; 0 takes no natural step.
      damping: of the Fisher matrix, above 0.
      include, exclude: which leaves are projected, see `masks.sparsifiable`; one with more than two axes counts as
        the matrix of its last axis by all others. The other leaves go to `inner` as they are.

    Raises:
      ValueError: for a keyword out of its range.
    """
    for name, value, least in (("rank", rank, 1), ("update_every", update_every, 1), ("history", history, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value}")
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}")

    def chosen(tree):
        leaves = masks_lib.sparsifiable(tree, include, exclude)
        return {name: leaf.reshape(-1, leaf.shape[-1]).astype(jnp.float32) for name, leaf in leaves.items()}

    def init(params):
        matrices = chosen(params)
        ranks = {name: min(rank, *m.shape) for name, m in matrices.items()}
        bases = {name: jnp.zeros((min(m.shape), ranks[name])) for name, m in matrices.items()}
        low = {name: _project(m, bases[name]) for name, m in matrices.items()}
        past = {name: jnp.zeros((history, *r.shape)) for name, r in low.items()}
        inner_state = inner.init(_replace(params, low))
        return NaturalGaLoreState(jnp.zeros([], jnp.int32), bases, past, inner_state)

    def update(grads, state, params=None):
        del params
        matrices = chosen(grads)
        bases = jax.lax.cond(
            state.count % update_every == 0,
            lambda: {name: _basis(m, state.bases[name].shape[1]) for name, m in matrices.items()},
            lambda: state.bases,
        )
        low = {name: _project(m, bases[name]) for name, m in matrices.items()}
        past = state.past
        if history:
            slot = state.count % history
            past = {name: past[name].at[slot].set(r) for name, r in low.items()}
            low = {name: _natural(past[name], slot, damping) for name in low}
        moved, inner_state = inner.update(_replace(grads, low), state.inner_state)
        leaves = masks_lib.flatten(moved)
        back = {name: scale * _back(leaves[name], bases[name], m.shape) for name, m in matrices.items()}
        updates = jax.tree.map(lambda u, g: u.reshape(g.shape).astype(g.dtype), _replace(moved, back), grads)
        return updates, NaturalGaLoreState(optax.safe_increment(state.count), bases, past, inner_state)

    return optax.GradientTransformation(init, update)


def _replace(tree, leaves: dict):
    return masks_lib.map_with_name(lambda name, leaf: leaves.get(name, leaf), tree)


def _natural(past, slot, damping: float):
    """(damping I + H H^T)^-1 h for the columns H of `past`, of which h is the one in `slot`.

    H H^T is that of H V for an orthogonal V. It is chosen so that the columns which are h over again become one column
    and differences to h, which float32 subtracts exactly: what is left of the others stays small in every factor.
    """
    columns, place = past.reshape(past.shape[0], -1).T, jax.nn.one_hot(slot, past.shape[0])
    now = columns[:, slot]
    tiny = jnp.finfo(jnp.float32).tiny
    alike = jnp.clip(jnp.round(product(now, columns) / jnp.maximum(product(now, now), tiny)), -1, 1)
    alike = jnp.where(place, 1.0, alike)
    size = jnp.linalg.norm(alike)
    normal = alike / size + place
    turn = jnp.eye(len(past)) - 2 * jnp.outer(normal, normal) / jnp.sum(
        normal**2
    )  # sends `place` to -alike / size
    turned = product(columns - jnp.outer(now, alike), turn) - size * jnp.outer(now, place)
    root = math.sqrt(damping)
    q, _ = jnp.linalg.qr(jnp.concatenate([turned, root * jnp.eye(len(past))]))
    natural = product(q[: len(columns)], product(turn[slot], q[len(columns) :])) / root
    return natural.reshape(past.shape[1:])


def _basis(matrix, rank: int):
    """The first singular vectors of the shorter side, as columns."""
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] if matrix.shape[0] < matrix.shape[1] else right[:rank].T


def _project(matrix, basis):
    return product(basis.T, matrix) if matrix.shape[0] < matrix.shape[1] else product(matrix, basis)


def _back(low, basis, shape):
    return product(basis, low) if shape[0] < shape[1] else product(low, basis.T)
