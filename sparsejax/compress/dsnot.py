"""DSnoT: Dynamic Sparse No Training (Zhang et al. 2024), swaps of weights that balance each output's mean error.

Another method prunes; then, for every output r on its own, pruned weights are grown and kept ones pruned in pairs.
With mu_j and v_j the mean of input j and the mean of its variance within a sequence, D_jr = W_jr mu_j, and

  eps_r = sum over pruned j of D_jr                                   (the expected error of output r)

one cycle in an output with |eps_r| > threshold is, for eps_r > 0 (for eps_r < 0 with all signs turned),

  grow    the initially pruned j of largest D_jr / v_j^power that is not grown yet, if its D > 0
  prune   the initially kept j of lowest |W_jr| a_j (Wanda) with D < 0 that is not pruned yet; for N:M, of any D
          but in the grown weight's group of M
  eps_r  <- eps_r + D_pruned - D_grown

An output that lacks either weight, whose error is within the threshold, or (`same_sign`, always for N:M) whose
error would change its sign, is finished. Scores are never computed again.

Departures. eps is the mean over tokens; the paper's is the sum over a sequence, 2048 tokens long, in which units
`threshold` is. The released code takes 50 cycles, which are 1.2% of 4096 inputs but most of the kept weights of a
narrow layer, where they do harm: the default here is that share of the inputs, and `cycles=50` is the paper's.
Released settings adjust attention layers only, `skip="mlp/*"`; the default is all layers. For N:M a
swap that would not bring |eps_r| down is passed over. A variance of zero is raised to 1e-6 of the mean variance.

Where the first method changes the weights it keeps (SparseGPT), those values stay, W^; weights that are grown come
back with their dense value, and eps_r = sum over all j of (W_jr - W^_jr) mu_j, which is the above where W^ = W.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.compress.base import Layerwise, is_traced, layer_budget, masked, note
from sparsejax.compress.wanda import scores, wanda
from sparsejax.patterns import NM, Unstructured

SHARE = 0.0125  # cycles over inputs: 50 of 4096, rounded up
SEQUENCE = 2048  # tokens, over which the paper sums eps


class Refined(NamedTuple):
    """What the swaps did to one layer.

    Attributes:
      kernel: `(in, out)` float32, exactly 0 outside the mask.
      mask: bool `(in, out)`, with as many weights of every output (and group) as before.
      before, after: eps `(out,)` float32, the expected error of every output, in means over tokens.
      swaps: int32 `(out,)`.
    """

    kernel: jnp.ndarray
    mask: jnp.ndarray
    before: jnp.ndarray
    after: jnp.ndarray
    swaps: jnp.ndarray


def dsnot(
    initial: Layerwise | None = None,
    *,
    cycles: int | None = None,
    threshold: float = 0.1,
    same_sign: bool = False,
    power: float = 1.0,
    skip: str | Iterable[str] = (),
) -> Layerwise:
    """Swaps weights after another method until the mean error of every output is small.

    Args:
      initial: the layer-wise method that prunes; None for `wanda()`.
      cycles: most swaps of an output; None for ceil(0.0125 in), at most 50. The paper's is 50.
      threshold: an output is finished when its |eps|, times 2048 tokens, is at most this.
      same_sign: also finish an output before its error changes its sign. N:M always does.
      power: of the variance in what is grown first; 0 takes the largest mean contribution.
      skip: shell patterns on paths in a block, as "mlp/*": layers that `prune_layers` leaves to the initial method.

    Returns:
      The method. With `prune_layers` the report of a layer has "expected_error_before" and "expected_error_after",
      the sums of |eps| over outputs, in means over tokens, and "swaps".

    Raises:
      ValueError: for cycles or a threshold below 0, and when it prunes, for patterns of blocks.
    """
    initial = wanda() if initial is None else initial
    if cycles is not None and (isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 0):
        raise ValueError(f"cycles of dsnot must be an integer of at least 0 or None, got {cycles!r}")
    if not threshold >= 0:
        raise ValueError(f"threshold of dsnot must be at least 0, got {threshold!r}")
    allowed = tuple(kind for kind in initial.patterns if kind in (Unstructured, NM))
    options = {"cycles": cycles, "threshold": threshold, "same_sign": same_sign, "power": power}
    skip = (skip,) if isinstance(skip, str) else tuple(skip)

    def prune(kernel, stats, sparsity, pattern="unstructured"):
        sparsity, pattern = layer_budget("dsnot", sparsity, pattern, allowed)
        pruned, mask = initial.prune(kernel, stats, sparsity, pattern)
        if sparsity == 0:
            return pruned, mask
        refined = refine(kernel, pruned, mask, stats, pattern, **options)
        if not is_traced(refined.mask):
            note(
                expected_error_before=float(jnp.abs(refined.before).sum()),
                expected_error_after=float(jnp.abs(refined.after).sum()),
                swaps=int(refined.swaps.sum()),
            )
        return refined.kernel, refined.mask

    needs = tuple(dict.fromkeys((*initial.needs, "mean", "square", "within")))
    rules = {**(initial.wrapped_rules(partial(dsnot, **options)) or {}), **dict.fromkeys(skip, initial)}
    settings = {"initial": dict(initial.settings), **options, "skip": skip}
    return Layerwise(f"{initial.name}+dsnot", needs, prune, allowed, initial.host, rules or None, settings)


@partial(jax.jit, static_argnames=("pattern", "cycles", "threshold", "same_sign", "power"))
def refine(
    kernel, pruned, mask, stats, pattern, *, cycles=None, threshold=0.1, same_sign=False, power=1.0
) -> Refined:
    """The swaps for one layer.

    Args:
      kernel: the dense one, `(in, out)`.
      pruned: that of the first method, 0 outside `mask`.
      mask: bool `(in, out)`.
      stats: with the entries "mean", "square", "within" `(in,)`.
      pattern: `Unstructured()` or an `NM` that `mask` has.
      cycles, threshold, same_sign, power: as in `dsnot`.
    """
    inputs = kernel.shape[0]
    cycles = min(50, math.ceil(SHARE * inputs)) if cycles is None else cycles
    group = pattern.m if isinstance(pattern, NM) else None
    values = jnp.where(mask, pruned, kernel).astype(jnp.float32)
    mean = stats["mean"][:, None]
    before = jnp.sum((kernel - pruned) * mean, axis=0)
    variance = jnp.maximum(stats["within"], 1e-6 * jnp.mean(stats["within"]))[:, None] ** power
    contributions = values * mean
    # All v_j = 0 leaves only the order of the contributions themselves.
    order = contributions / jnp.where(variance > 0, variance, 1.0)
    parts = _Parts(contributions, order, scores(values, stats), mask, before)
    mask, after, swaps = _swap(
        parts, min(cycles, inputs), threshold / SEQUENCE, same_sign or group is not None, group
    )
    return Refined(masked(values, mask), mask, before, after, swaps)


class _Parts(NamedTuple):
    """contributions D, order D / v^power and Wanda scores `(in, out)`, the initial mask, and eps `(out,)`."""

    contributions: jnp.ndarray
    order: jnp.ndarray
    scores: jnp.ndarray
    mask: jnp.ndarray
    eps: jnp.ndarray


class _State(NamedTuple):
    """The mask `(out, in)`, and for every output: eps, grown from each list, pruned from each list, open, swaps."""

    mask: jnp.ndarray
    eps: jnp.ndarray
    grown: jnp.ndarray
    pruned: jnp.ndarray
    open: jnp.ndarray
    swaps: jnp.ndarray


def _swap(parts: _Parts, cycles: int, threshold: float, same_sign: bool, group: int | None):
    """The mask `(in, out)`, eps and counts of swaps after at most `cycles` of them in every output."""
    d, order, score, initial = (leaf.T for leaf in parts[:4])
    outputs = jnp.arange(d.shape[0])
    # Two lists of inputs for each output, for eps > 0 and eps < 0; no more than `cycles` of each can be used.
    to_grow = jnp.stack(
        [_first(jnp.where(~initial & (s * d > 0), s * order, -jnp.inf), cycles) for s in (1, -1)]
    )
    if group is None:
        to_prune = jnp.stack(
            [_first(jnp.where(initial & (s * d < 0), -score, -jnp.inf), cycles) for s in (1, -1)]
        )

    def cycle(_, state: _State):
        side = (state.eps < 0).astype(jnp.int32)
        open_ = state.open & (jnp.abs(state.eps) > threshold)
        grow = to_grow[side, outputs, jnp.minimum(state.grown[side, outputs], cycles - 1)]
        open_ &= (grow >= 0) & (state.grown[side, outputs] < cycles)
        if group is None:
            prune = to_prune[side, outputs, jnp.minimum(state.pruned[side, outputs], cycles - 1)]
            open_ &= (prune >= 0) & (state.pruned[side, outputs] < cycles)
            found = open_
        else:
            prune = _lowest_in_group(jnp.where(initial & state.mask, score, jnp.inf), grow, group)
            found = open_ & (prune >= 0)
        eps = state.eps + d[outputs, prune] - d[outputs, grow]
        if same_sign:
            open_ &= ~found | (jnp.sign(eps) == jnp.sign(state.eps))
        swapped = found & open_
        if group is not None:
            swapped &= jnp.abs(eps) < jnp.abs(state.eps)
        mask = state.mask.at[outputs, grow].max(swapped)
        mask = mask.at[outputs, prune].min(~swapped)
        return _State(
            mask,
            jnp.where(swapped, eps, state.eps),
            state.grown.at[side, outputs].add(open_),
            state.pruned.at[side, outputs].add(swapped),
            open_,
            state.swaps + swapped,
        )

    none = jnp.zeros((2, len(outputs)), jnp.int32)
    state = _State(initial, parts.eps, none, none, jnp.ones(len(outputs), bool), none[0])
    if cycles:
        # Most outputs finish early, and a layer is done when all have.
        _, state = jax.lax.while_loop(
            lambda carry: (carry[0] < cycles) & jnp.any(carry[1].open),
            lambda carry: (carry[0] + 1, cycle(*carry)),
            (0, state),
        )
    return state.mask.T, state.eps, state.swaps


def _first(scores, count: int):
    """Inputs `(out, count)` of the highest finite scores `(out, in)` in descending order, then -1."""
    best, inputs = jax.lax.top_k(scores, max(count, 1))
    return jnp.where(best > -jnp.inf, inputs, -1)


def _lowest_in_group(scores, inputs, size: int):
    """The input of lowest finite score in the group of `size` that holds `inputs` `(out,)`, or -1."""
    outputs = jnp.arange(scores.shape[0])
    members = inputs[:, None] // size * size + jnp.arange(size)
    found = scores[outputs[:, None], members]
    best = jnp.argmin(found, axis=1)
    return jnp.where(found[outputs, best] < jnp.inf, members[outputs, best], -1)
