"""Proximal operators and projections: pure functions, safe under `jit` and `vmap`; nothing is sorted.

    prox_{lam f}(v) = argmin_x  1/2 ||x - v||^2 + lam f(x)

Groups are disjoint sets of entries: by default every entry is one; a `sparsejax.patterns` pattern (channels,
blocks, labels) or an array of integer labels forms larger ones. ||v_g|| is the Euclidean norm of a group.

The weighted group sparse envelope (WGSEF; Refael, Arbel & Huleihel 2022) is the largest convex function below

    gs_k(x) = 1/2 sum_g d_g ||x_g||^2   if at most k groups are nonzero, infinity otherwise,

for group weights d_g > 0, that is its biconjugate

    GS_k(x) = 1/2 min { sum_g d_g ||x_g||^2 / u_g : 0 <= u_g <= 1, sum_g u_g <= k }.

Its prox is x_g = v_g u_g / (u_g + lam d_g) with u_g = clip(t sqrt(lam d_g) ||v_g|| - lam d_g, 0, 1), for the
t at which the u_g sum to k (or u_g = 1 where at most k groups are nonzero). In place of t the code solves for
the s >= 0 of

    u_g = clip(d_g (lam (r_g - p) / p + s r_g / p), 0, 1),    r_g = ||v_g|| / sqrt(d_g),

where p, the k-th largest r_g, comes from a selection. That is the same family of u, but neither tiny nor huge
lam lose digits: what decides between near-equal groups is the exact difference r_g - p. The sum is piecewise
linear in s, so that Newton's method inside a shrinking bracket ends at the exact solution after a few linear
passes.

Every function computes in float32 at least and returns the dtype of its input. Infinities and NaN are refused
outside `jit`; inside they make the result meaningless.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks import count
from sparsejax.patterns import NM, Block, Group, Pattern, Unstructured
from sparsejax.selection import top_k_mask

# Newton needs about six passes; every eighth one bisects, which bounds the number of passes for any input.
_BISECT_EVERY = 8
_PASSES = 256
_LARGEST_RATIO = 1e30
_COLUMNS = 1024

Groups = Pattern | np.ndarray | Sequence | None


def l1_prox(v, lam):
    """Soft threshold: prox of lam ||x||_1, sign(v) max(|v| - lam, 0) (Daubechies et al. 2004).

    Args:
      v: float array.
      lam: scalar, or an array that broadcasts against `v` (in a diagonal metric D: lam / D).
    """
    _check(v, lam)
    wide = _wide(v)
    return (jnp.sign(wide) * jnp.maximum(jnp.abs(wide) - lam, 0)).astype(v.dtype)


def group_l2_prox(v, lam, *, groups: Groups = None, weights=None):
    """Group soft threshold: prox of lam sum_g w_g ||x_g||, the group lasso (Yuan & Lin 2006).

    Args:
      v: float array.
      lam: scalar.
      groups: see the module.
      weights: w_g, a scalar or one per group; default 1.

    Returns:
      x_g = v_g max(1 - lam w_g / ||v_g||, 0), of the shape and dtype of `v`.
    """
    _check(v, lam)
    pattern, weights = _pattern(groups, v), _weights(weights)
    norms = unit_norms(v, pattern)
    threshold = lam * weights
    factors = jnp.where(norms > threshold, 1 - threshold / jnp.where(norms > 0, norms, 1), 0)
    return _scale(v, factors, pattern)


def l0_projection(v, k, *, groups: Groups = None):
    """The nearest array with at most `k` nonzero groups: the k largest norms, ties to the first.

    Args:
      v: float array.
      k: number of groups, an int or traced (under N:M patterns n of every m are kept, whatever k).
      groups: see the module; by default single entries.
    """
    _check(v)
    pattern = _pattern(groups, v)
    _check_k(k, pattern.units(v.shape))
    kept = pattern.select(unit_norms(v, pattern), k)
    return jnp.where(pattern.expand(kept, v.shape), v, jnp.zeros_like(v))


def nuclear_prox(v, lam, *, return_rank: bool = False):
    """Singular value soft threshold: prox of lam times the sum of singular values (Cai et al. 2010).

    Args:
      v: float array (..., m, n), a stack of matrices.
      lam: scalar.
      return_rank: whether to return the rank as well.

    Returns:
      Array like `v`; with `return_rank` also the number of singular values above lam, int32 of shape (...).
    """
    _check(v, lam)
    left, values, right = jnp.linalg.svd(_wide(v), full_matrices=False)
    shrunk = product(left * jnp.maximum(values - lam, 0)[..., None, :], right).astype(v.dtype)
    return (shrunk, jnp.sum(values > lam, -1)) if return_rank else shrunk


def rank_projection(v, k: int):
    """The nearest matrices of rank at most `k` (Eckart & Young 1936), of a stack (..., m, n)."""
    _check(v)
    _check_k(k, min(v.shape[-2:]), "singular values")
    left, values, right = jnp.linalg.svd(_wide(v), full_matrices=False)
    return product(left[..., :k] * values[..., None, :k], right[..., :k, :]).astype(v.dtype)


# --- the weighted group sparse envelope --------------------------------------------------------------


def wgsef_value(x, k, *, groups: Groups = None, weights=None):
    """GS_k(x), the weighted group sparse envelope (see the module).

    It lies between 1/2 sum_g d_g ||x_g||^2, which it equals where at most k groups are nonzero, and
    1/2 (sum_g sqrt(d_g) ||x_g||)^2, which it is for k = 1. Differentiable in `x`, with gradient
    d_g x_g / u_g.

    Args:
      x: float array.
      k: groups to keep, from 1 to their number; an int or traced.
      groups: see the module; under an N:M pattern the value is the sum of the envelopes with k = n of every
        m entries, whatever `k`.
      weights: d_g, a scalar or one per group; default 1.

    Returns:
      Scalar, float32 (float64 for float64 inputs).
    """
    _check(x)
    pattern, weights = _pattern(groups, x), _weights(weights)
    _check_k(k, pattern.units(x.shape))
    squares = weights * _unit_squares(_wide(x), pattern)
    sizes = jnp.sqrt(weights) * unit_norms(lax.stop_gradient(x), pattern)
    squares, sizes = _rows(squares, pattern), _rows(sizes, pattern)
    k, axis = _rows_kept(k, pattern, sizes)
    share = _shares(sizes, jnp.zeros((), sizes.dtype), k, axis, jnp.ones_like(sizes))
    active = share > 0  # shares of nonzero groups can underflow
    return 0.5 * jnp.sum(jnp.where(active, squares / jnp.where(active, share, 1), 0))


def wgsef_prox(v, lam, k, *, groups: Groups = None, weights=None, metric=None):
    """prox of lam GS_k: ridge shrinkage of the best groups, soft threshold at the margin, zero below.

    At least k groups survive (fewer only if fewer are nonzero), and more than k can. Linear in the number of
    groups; differentiable almost everywhere, in both modes.

    Args:
      v: float array.
      lam: scalar, at least 0.
      k, groups, weights: as for `wgsef_value`.
      metric: D_g > 0, a scalar or one per group: the prox with 1/2 sum_g D_g ||x_g - v_g||^2; default 1.

    Raises:
      ValueError: outside `jit`, for a k out of range, a negative or infinite lam, an infinite or NaN `v`.
    """
    _check(v, lam)
    pattern = _pattern(groups, v)
    _check_k(k, pattern.units(v.shape))
    metric = _weights(metric)
    # in the coordinates sqrt(D_g) x_g the metric is Euclidean, and the weights are d_g / D_g
    norms = unit_norms(v, pattern) * jnp.sqrt(metric)
    weights = jnp.broadcast_to(_weights(weights) / metric, norms.shape)
    rows = _rows(norms, pattern)
    k, axis = _rows_kept(k, pattern, rows)
    factors = wgsef_factors(rows, lam, k, weights=_rows(weights, pattern), axis=axis)
    return _scale(v, _rows_back(factors, norms.shape, pattern), pattern)


def wgsef_factors(norms, lam, k, *, weights=None, axis: int | None = None):
    """What `wgsef_prox` multiplies every group by, from the norms of the groups alone.

    Args:
      norms: ||v_g||, at least 0; an array of any shape.
      lam: scalar, at least 0.
      k: groups to keep, from 1 to their number; an int or traced.
      weights: d_g, broadcasting against `norms`; default 1. In a metric that is D_g on group g, pass norms
        multiplied by sqrt(D_g) and weights d_g / D_g.
      axis: None for one envelope over all groups, or an axis: one for every row along it.

    Returns:
      u_g / (u_g + lam d_g), of the shape of `norms`.
    """
    weights = jnp.broadcast_to(_weights(weights), norms.shape).astype(norms.dtype)
    lam, axis = jnp.asarray(lam, norms.dtype), axis if axis is None else range(norms.ndim)[axis]
    shares = _shares(norms / jnp.sqrt(weights), lam, k, axis, weights)
    whole = shares + lam * weights
    return jnp.where(whole > 0, shares / jnp.where(whole > 0, whole, 1), 1)


@partial(jax.jit, static_argnames="axis")
def _shares(scores, lam, k, axis, weights):
    """The u of the module's equation, given the scores r, along `axis` (None: over all groups)."""
    kept = top_k_mask(lax.stop_gradient(scores), k, axis)
    kth = jnp.min(jnp.where(kept, scores, jnp.inf), axis, keepdims=axis is not None)
    few = count(scores > 0, axis) <= jnp.asarray(k, jnp.uint32)
    kth = jnp.where(few, 1, kth)  # where at most k are nonzero there is nothing to solve
    ratio = jnp.minimum(scores / kth, _LARGEST_RATIO)
    slope = weights * ratio
    start = (lam * jnp.minimum((scores - kth) / kth, _LARGEST_RATIO)) * weights
    # At the k-th score or above, u_g >= d_g s; all others reach at most d_g s, and the best k - 1 at most 1.
    bracket = 1 / _sum(weights, axis), 1 / jnp.min(weights, axis, keepdims=axis is not None)
    level = _solve(slope, start, k, bracket, few, axis)
    return jnp.where(few, (scores > 0).astype(scores.dtype), jnp.clip(start + slope * level, 0, 1))


def _solve(slope, start, k, bracket, skip, axis):
    """The level s > 0 at which the sum of clip(start + slope s, 0, 1) is k.

    Each pass solves for s exactly on the piece of the sum around the present s; once s stays, the piece is
    the right one. Rows in `skip` have no solution and are left alone.
    """
    fixed_slope, fixed_start = map(lax.stop_gradient, (slope, start))
    k = jnp.asarray(k, jnp.int32)
    close = 4 * jnp.finfo(slope.dtype).eps

    def piece(slope, start, level):
        """Missing in the saturated terms, and the intercept and slope of the others, at a level."""
        here = lax.stop_gradient(start + slope * level)
        full, inside = here >= 1, (here > 0) & (here < 1)
        missing = (k - count(full, axis).astype(jnp.int32)).astype(slope.dtype)
        return missing, _sum(jnp.where(inside, start, 0), axis), _sum(jnp.where(inside, slope, 0), axis)

    def step(carry):
        i, low, high, level, _ = carry
        missing, intercept, gain = piece(fixed_slope, fixed_start, level)
        short = missing - (intercept + gain * level)
        low, high = jnp.where(short > 0, level, low), jnp.where(short < 0, level, high)
        newton = (missing - intercept) / gain
        done = (short == 0) | (jnp.abs(newton - level) <= close * level) | (high - low <= close * low) | skip
        inside = (newton >= low) & (newton <= high) & (i % _BISECT_EVERY < _BISECT_EVERY - 1)
        following = jnp.where(inside, newton, jnp.sqrt(low) * jnp.sqrt(high))
        return i + 1, low, high, jnp.where(done, level, following), done

    low, high = lax.stop_gradient((bracket[0] * (1 - close), bracket[1] * (1 + close)))
    first = (jnp.int32(0), low, high, jnp.sqrt(low) * jnp.sqrt(high), skip)
    *_, level, _ = lax.while_loop(lambda c: (c[0] < _PASSES) & ~jnp.all(c[-1]), step, first)
    missing, intercept, gain = piece(slope, start, level)
    return jnp.where(gain > 0, (missing - intercept) / jnp.where(gain > 0, gain, 1), level)


def _sum(values, axis):
    """A sum whose rounding error grows little with the length: columns first, then their sums."""
    if axis is not None or values.size <= _COLUMNS:
        return jnp.sum(values, axis, keepdims=axis is not None)
    flat = values.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % _COLUMNS))
    return jnp.sum(jnp.sum(flat.reshape(-1, _COLUMNS), 0))


# --- groups ------------------------------------------------------------------------------------------


def unit_norms(x, pattern: Pattern):
    """The Euclidean norm of every unit of a pattern, in the shape of its unit scores, without overflow."""
    x = _wide(x)
    if isinstance(pattern, (Unstructured, NM)):
        return jnp.abs(x)
    scale = lax.stop_gradient(jnp.max(jnp.abs(x)))
    scale = jnp.where(scale > 0, scale, 1)
    squares = _unit_squares(x / scale, pattern)
    # the derivative of sqrt at 0 is infinite; that of a norm may be taken as 0
    return scale * jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def unit_mean(x, pattern: Pattern):
    """The mean of every unit of a pattern, in the shape of its unit scores (whatever its own pooling)."""
    return (replace(pattern, pooling="mean") if isinstance(pattern, Block) else pattern).pool(x)


def _unit_squares(x, pattern):
    return unit_mean(jnp.square(x), pattern) * jnp.asarray(pattern.unit_sizes(x.shape), x.dtype)


def disjoint(sets: Sequence, shape, *, name: str = "the array") -> Group:
    """The pattern whose groups are given as sets of indices.

    Args:
      sets: one bool array of `shape` or integer array of flat (row-major) indices per group.
      shape: of the weight.
      name: of the leaf, for the error.

    Raises:
      ValueError: if two sets overlap, a set is empty, or an entry is in none.
    """
    labels = np.full(math.prod(shape), -1)
    for g, members in enumerate(map(np.asarray, sets)):
        if members.dtype == bool and members.shape != tuple(shape):
            raise ValueError(
                f"group {g} of {name} is a bool array of shape {members.shape}, but {name} has shape {tuple(shape)}"
            )
        members = np.flatnonzero(members) if members.dtype == bool else np.unique(members)
        if members.size == 0 or members[0] < 0 or members[-1] >= labels.size:
            raise ValueError(
                f"group {g} of {name} must hold indices from 0 to {labels.size - 1}, got {members[:8]}"
            )
        taken = members[labels[members] >= 0]
        if taken.size:
            other = labels[taken[0]]
            raise ValueError(
                f"groups {other} and {g} of {name} overlap in entry {taken[0]}, but they must be disjoint"
            )
        labels[members] = g
    if (labels < 0).any():
        raise ValueError(
            f"entry {np.flatnonzero(labels < 0)[0]} of {name} is in none of the {len(sets)} groups"
        )
    return Group(labels.reshape(shape))


def _pattern(groups: Groups, v) -> Pattern:
    if groups is None:
        return Unstructured()
    pattern = groups if isinstance(groups, Pattern) else Group(groups)
    pattern.check("the array", v.shape)
    return pattern


def _rows(units, pattern):
    """Unit values as rows over which one envelope each is taken: N:M groups, else everything as it is."""
    if not isinstance(pattern, NM):
        return units
    units = jnp.moveaxis(units, pattern.axis, -1)
    return units.reshape(*units.shape[:-1], -1, pattern.m)


def _rows_back(rows, shape, pattern):
    if not isinstance(pattern, NM):
        return rows
    return jnp.moveaxis(rows.reshape(*rows.shape[:-2], -1), -1, pattern.axis)


def _rows_kept(k, pattern, rows):
    """How many groups a row keeps, and its axis."""
    return (pattern.n, rows.ndim - 1) if isinstance(pattern, NM) else (k, None)


def _scale(v, factors, pattern):
    return (_wide(v) * pattern.expand(factors, v.shape)).astype(v.dtype)


# --- dtypes and checks -------------------------------------------------------------------------------


def _wide(v):
    return v.astype(jnp.promote_types(v.dtype, jnp.float32))


def product(left, right):
    """The matrix product in full precision, on accelerators too."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def _concrete(value) -> Any:
    """The value as a NumPy array, or None inside `jit`."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value, np.float64)


def _check(v, lam=0.0) -> None:
    known, strength = _concrete(v), _concrete(lam)
    if known is not None and not np.isfinite(known).all():
        raise ValueError(
            f"the array of shape {known.shape} holds infinities or NaN; a prox needs finite numbers"
        )
    if strength is not None and not (np.isfinite(strength).all() and (strength >= 0).all()):
        raise ValueError(f"lam must be finite and at least 0, got {lam}")


def _check_k(k, units: int, what: str = "groups") -> None:
    known = _concrete(k)
    if known is not None and not (known.ndim == 0 and known == int(known) and 1 <= known <= units):
        raise ValueError(f"k must be an integer from 1 to the number of {what}, {units}, got {k}")


def _weights(weights):
    weights = 1.0 if weights is None else weights
    known = _concrete(weights)
    if known is not None and not (np.isfinite(known).all() and (known > 0).all()):
        raise ValueError(f"group weights must be positive and finite, got {np.min(known):g}")
    return jnp.asarray(weights, jnp.float32)
