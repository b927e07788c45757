"""MaskLLM: learned N:M masks over frozen weights (Fang et al. 2024, "MaskLLM: Learnable Semi-Structured
Sparsity for Large Language Models").

Every group of M weights along the contracted axis has logits pi over its C = C(M, N) candidate masks, the
rows of the table S (`candidates`). A training step draws p = softmax((kappa pi + g) / tau) with Gumbel noise
g, multiplies the weights by the soft mask p S, and adds -lambda sum ||W * p S||^2 to the loss, which keeps
gradients alive by rewarding large kept weights. Only pi is trained. In evaluation a group keeps the candidate
of its largest logit. Over the run kappa rises and tau falls linearly, so that samples harden; lambda falls
linearly to zero.

A one-shot mask M0 serves as prior: pi starts at N(0, 0.01^2), plus strength * std(pi) * (<S_c, M0> less its
mean over c), which orders the candidates by their overlap with M0.

The paper trains with AdamW: b1 0.9, b2 0.95, weight decay 0.1, learning rate 5e-4 (5e-5 times the multiplier
10 of the logits) with cosine decay to a tenth.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from sparsejax import scores
from sparsejax.masks import (
    apply_masks,
    check_masks,
    choose,
    dense_masks,
    flatten,
    is_sparsified,
    map_with_name,
)
from sparsejax.patterns import NM, parse
from sparsejax.schedules import linear
from sparsejax.target import Target

INIT_STD = 0.01
MAX_CANDIDATES = 256
PRIORS = ("magnitude",)


def candidates(n: int, m: int) -> np.ndarray:
    """All masks that keep `n` of `m`: bool of shape (C(m, n), m), from 1100 to 0011 for 2:4.

    Raises:
      ValueError: if there are more than `MAX_CANDIDATES`.
    """
    count = math.comb(m, n)
    if count > MAX_CANDIDATES:
        raise ValueError(
            f"maskllm learns a logit for every candidate mask of a group, and {n}:{m} has {count} of them; "
            f"allowed are at most {MAX_CANDIDATES} (2:4 has 6, 4:8 has 70, 2:16 has 120)"
        )
    found = np.zeros((count, m), bool)
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        found[row, list(kept)] = True
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskLLM:
    """Learned N:M masks over frozen weights.

    The latent tree is `{"logits": {path: float32 (..., groups, C, out)}}`, where the candidates take the
    place of the M positions of their group; the state holds the frozen weights and the steps taken.

    Attributes:
      steps: training steps over which kappa, tau and lambda move.
      pattern: N:M, or its name.
      prior: masks that the logits start from: "magnitude" for the largest weights of each group, a mask tree
        like the parameters (a scalar leaf gives no prior), or None for random logits.
      prior_strength: in standard deviations of the logits per weight of overlap.
      kappa, temperature: first and last value of the logits' scale kappa and of tau.
      reward: lambda at the first step.
      hard: draw one candidate in the forward pass, with the gradient of the soft mask (straight-through).
      include, exclude: which leaves are sparsified (the paper leaves out the output head), see
        `masks.sparsifiable`.

    Raises:
      ValueError: one sentence, for a pattern that is not N:M or has too many candidates, for an unknown
        prior, and for numbers out of range; in `init` for a leaf that the pattern or the prior does not fit.
    """

    steps: int
    pattern: str | NM = "2:4"
    prior: Any = "magnitude"
    prior_strength: float = 3.0
    kappa: tuple[float, float] = (100.0, 500.0)
    temperature: tuple[float, float] = (4.0, 0.05)
    reward: float = 1e-5
    hard: bool = False
    include: Iterable[str] = ("*kernel",)
    exclude: Iterable[str] = ()

    def __post_init__(self):
        if type(self.nm) is not NM:
            raise ValueError(f"maskllm needs an N:M pattern such as 2:4, got {self.pattern!r}")
        candidates(self.nm.n, self.nm.m)
        if isinstance(self.prior, str):
            choose("prior of maskllm", self.prior, PRIORS)
        for name in ("kappa", "temperature"):
            ends = getattr(self, name)
            if len(ends) != 2 or min(ends) <= 0:
                raise ValueError(
                    f"{name} of maskllm must be two positive numbers, first and last, got {ends}"
                )
        for name, least in (("steps", 1), ("reward", 0), ("prior_strength", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of maskllm must be at least {least}, got {getattr(self, name)}")

    @functools.cached_property
    def nm(self) -> NM:
        """The pattern."""
        return parse(self.pattern)

    @functools.cached_property
    def target(self) -> Target:
        """The pattern and the leaves it is for."""
        return Target(pattern=self.nm, include=self.include, exclude=self.exclude)

    def init(self, key, params):
        """Random logits, ordered by the prior; the parameters stay as they are, in the state."""
        leaves, prior, logits = flatten(params), flatten(self._prior_masks(params)), {}
        for name in self.target.patterns(params):
            key, used = jax.random.split(key)
            drawn = INIT_STD * jax.random.normal(used, _logits_shape(leaves[name].shape, self.nm))
            if is_sparsified(prior[name]):
                drawn += self.prior_strength * jnp.std(drawn) * _overlap(prior[name], self.nm)
            logits[name] = drawn
        return {"logits": unflatten_dict(logits, sep="/")}, {"params": params, "count": jnp.int32(0)}

    def materialize(self, latent, state, key=None):
        """The frozen weights under soft masks drawn with `key`, or under the best ones without."""
        if key is None:
            return apply_masks(state["params"], self.masks(latent, state)), state, jnp.float32(0)
        count, logits = state["count"], flatten(latent["logits"])
        keys = dict(zip(logits, jax.random.split(key, len(logits)), strict=True))

        def now(first, last):
            return linear(0, self.steps, initial=first, final=last)(count)

        def soften(name, weight):
            if name not in logits:
                return weight
            axis = _axis(weight.shape, self.nm)
            share = sample(
                keys[name], logits[name], now(*self.kappa), now(*self.temperature), axis=axis, hard=self.hard
            )
            return weight * _mix(share, weight.shape, self.nm).astype(weight.dtype)

        params = map_with_name(soften, state["params"])
        kept = [
            jnp.sum(jnp.square(_float32(leaf))) for name, leaf in flatten(params).items() if name in logits
        ]
        return params, {**state, "count": count + 1}, -now(self.reward, 0.0) * sum(kept)

    def masks(self, latent, state):
        """Bool masks of the candidates with the largest logits; the scalar True for dense leaves."""
        logits = flatten(latent["logits"])

        def best(name, weight):
            return _best(logits[name], weight.shape, self.nm) if name in logits else jnp.asarray(True)

        return map_with_name(best, state["params"])

    def _prior_masks(self, params):
        if self.prior is None:
            return dense_masks(params)
        if isinstance(self.prior, str):
            return self.target.masks(scores.magnitude(params))
        check_masks(self.prior, params)
        return self.prior


def sample(key, logits, kappa, tau, *, axis: int, hard: bool = False):
    """softmax((kappa logits + Gumbel) / tau) along `axis`.

    With `hard` the one-hot vector of its largest entry, with the gradient of the softmax: a draw from
    softmax(kappa logits), whatever `tau`.

    Returns:
      float32 of the logits' shape, non-negative with sum 1 along `axis`.
    """
    noisy = kappa * logits + jax.random.gumbel(key, logits.shape, jnp.float32)
    soft = jax.nn.softmax(noisy / tau, axis=axis)
    if not hard:
        return soft
    drawn = jax.nn.one_hot(jnp.argmax(noisy, axis=axis), logits.shape[axis], axis=axis, dtype=soft.dtype)
    return drawn + (soft - jax.lax.stop_gradient(soft))


# --- candidates in the place of a group's positions ----------------------------------------------------


def _float32(leaf):
    return leaf.astype(jnp.float32)


def _axis(shape, pattern: NM) -> int:
    """The axis of the candidates in the logits, and of the positions in the grouped weight."""
    return range(len(shape))[pattern.axis] + 1


def _logits_shape(shape, pattern: NM) -> tuple[int, ...]:
    axis = _axis(shape, pattern)
    count = math.comb(pattern.m, pattern.n)
    return (*shape[: axis - 1], shape[axis - 1] // pattern.m, count, *shape[axis:])


def _mix(share, shape, pattern: NM):
    """The mask of `shape` that is the average of the candidates under `share`."""
    axis = _axis(shape, pattern)
    table = jnp.asarray(candidates(pattern.n, pattern.m), share.dtype)
    return jnp.moveaxis(jnp.tensordot(share, table, axes=(axis, 0)), -1, axis).reshape(shape)


def _best(logits, shape, pattern: NM):
    """The bool mask of `shape` with the candidate of the largest logit in every group."""
    axis = _axis(shape, pattern)
    table = jnp.asarray(candidates(pattern.n, pattern.m))
    return jnp.moveaxis(table[jnp.argmax(logits, axis=axis)], -1, axis).reshape(shape)


def _overlap(mask, pattern: NM):
    """How many weights of a group each candidate shares with `mask`, less the mean over the candidates."""
    axis = _axis(mask.shape, pattern)
    split = (*mask.shape[: axis - 1], mask.shape[axis - 1] // pattern.m, pattern.m, *mask.shape[axis:])
    table = jnp.asarray(candidates(pattern.n, pattern.m), jnp.float32)
    overlap = jnp.tensordot(mask.reshape(split).astype(jnp.float32), table, axes=(axis, 1))
    return jnp.moveaxis(overlap - jnp.mean(overlap, axis=-1, keepdims=True), -1, axis)
