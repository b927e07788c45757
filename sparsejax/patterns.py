"""Patterns: which masks are allowed.

A pattern divides a weight array into *units*, the smallest things that are kept or dropped together: single
weights, blocks, channels, or labelled groups. Methods work on unit scores and never look inside:

    units = pattern.pool(scores)                  # unit scores
    chosen = pattern.select(units, k)             # bool, exactly k units (N:M: n of every m)
    mask = pattern.expand(chosen, scores.shape)   # bool mask of the weight's shape

`pattern.mask(scores, sparsity)` does all three. Axes follow Flax kernels, `(in, out)` and
`(height, width, in, out)`, so that axis -2 is the contracted one.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks import check_sparsity, choose
from sparsejax.selection import top_k_mask


class Pattern:
    """What all patterns share; as it stands here, every weight is a unit of its own."""

    def check(self, name: str, shape) -> None:
        """Raises ValueError, naming the leaf, if the pattern cannot be laid over `shape`."""

    def units(self, shape) -> int:
        """The number of units in an array of `shape`."""
        return int(np.prod(shape, dtype=object))

    def unit_sizes(self, shape):
        """How many weights each unit holds: an int array that broadcasts against the unit scores."""
        del shape
        return np.ones((), np.int64)

    def kept(self, shape, k: int) -> int:
        """How many units a final mask keeps when the budget asks for `k`; k itself unless the pattern
        decides."""
        del shape
        return k

    def pool(self, scores):
        """Unit scores from weight scores."""
        return scores

    def select(self, unit_scores, k, *, candidates=None, keep=None):
        """Exactly `k` units (int or traced): first `keep`, then `candidates` by score, ties by position."""
        return top_k_mask(unit_scores, k, candidates=candidates, keep=keep)

    def expand(self, units, shape):
        """A mask of `shape` from one value per unit."""
        del shape
        return units

    def reduce(self, mask):
        """One bool per unit from a mask that obeys the pattern; the inverse of `expand`."""
        return self.pool(mask.astype(jnp.float32)) > 0

    def mask(self, scores, sparsity: float | None = None):
        """The allowed mask that keeps the highest scores.

        Args:
          scores: array of the weight's shape.
          sparsity: fraction of units to drop, in [0, 1); the count kept is round((1 - sparsity) * units).
            N:M fixes its own, so that it may be left out there and anything else is refused.
        """
        self.check("scores", scores.shape)
        units = self.units(scores.shape)
        k = self.kept(scores.shape, round((1 - check_sparsity(sparsity)) * units))
        return self.expand(self.select(self.pool(scores), k), scores.shape)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any mask is allowed: every weight is a unit."""


@dataclass(frozen=True)
class NM(Pattern):
    """Exactly `n` of every `m` consecutive weights along `axis` are kept (2:4 is `NM(2, 4)`).

    The default axis is the contracted one of a Flax kernel, as sparse tensor cores need it. Every weight is a
    unit, so that topology updates can drop and grow single weights; `select` restores n in every group.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(f"N:M needs 0 < N <= M, got {self.n}:{self.m}")
        if self.m & (self.m - 1):
            raise ValueError(f"N:M needs M to be a power of two, got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        """The only sparsity this pattern has, 1 - n/m."""
        return 1 - self.n / self.m

    def check(self, name, shape):
        if not -len(shape) <= self.axis < len(shape) or shape[self.axis] % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs axis {self.axis} of {name} to be divisible by {self.m}, but its shape is {tuple(shape)}"
            )

    def kept(self, shape, k):
        return self.units(shape) // self.m * self.n

    def select(self, unit_scores, k=None, *, candidates=None, keep=None):
        """n of every group; a larger `k` (gradual pruning on its way) keeps the best of the rest as well."""
        flags = [None if flag is None else self._grouped(flag) for flag in (candidates, keep)]
        best = top_k_mask(
            self._grouped(unit_scores), self.n, self._axis(unit_scores), candidates=flags[0], keep=flags[1]
        )
        best = best.reshape(unit_scores.shape)
        groups = unit_scores.size // self.m * self.n
        if k is None or (isinstance(k, (int, np.integer)) and k <= groups):
            return best
        return top_k_mask(unit_scores, jnp.maximum(k, groups), candidates=candidates, keep=best)

    def mask(self, scores, sparsity=None):
        if sparsity is not None and abs(check_sparsity(sparsity) - self.sparsity) > 1e-9:
            raise ValueError(f"{self.n}:{self.m} has sparsity {self.sparsity:g}, got {sparsity}")
        self.check("scores", scores.shape)
        return self.select(scores)

    def _axis(self, array):
        return range(array.ndim)[self.axis] + 1

    def _grouped(self, array):
        axis = range(array.ndim)[self.axis]
        return array.reshape(
            array.shape[:axis] + (array.shape[axis] // self.m, self.m) + array.shape[axis + 1 :]
        )


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `shape` over the trailing axes are kept or dropped whole.

    Edges that a block does not divide hold smaller blocks. A block's score is the `mean` (default), `sum` or
    `max` of its weights' scores; with `sum`, the smaller blocks at the edges lose to the others.
    """

    shape: tuple[int, ...]
    pooling: Literal["mean", "sum", "max"] = "mean"

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"a block needs positive side lengths, got {self.shape}")
        choose("pooling", self.pooling, ("mean", "sum", "max"))

    def check(self, name, shape):
        if len(self.shape) > len(shape):
            raise ValueError(f"block {self.shape} has more axes than {name} of shape {tuple(shape)}")

    def _window(self, shape):
        return (1,) * (len(shape) - len(self.shape)) + self.shape

    def _grid(self, shape):
        return tuple(-(-size // side) for size, side in zip(shape, self._window(shape), strict=True))

    def units(self, shape):
        return int(np.prod(self._grid(shape), dtype=object))

    def unit_sizes(self, shape):
        sides = [
            np.minimum(side, size - side * np.arange(-(-size // side), dtype=np.int64))
            for size, side in zip(shape, self._window(shape), strict=True)
        ]
        sizes = np.ones((), np.int64)
        for side in sides:
            sizes = np.multiply.outer(sizes, side)
        return sizes

    def pool(self, scores):
        shape, window, grid = scores.shape, self._window(scores.shape), self._grid(scores.shape)
        pads = [(0, g * w - size) for g, w, size in zip(grid, window, shape, strict=True)]
        scores = jnp.pad(scores, pads, constant_values=-jnp.inf if self.pooling == "max" else 0)
        split = scores.reshape([n for pair in zip(grid, window, strict=True) for n in pair])
        inside = tuple(range(1, split.ndim, 2))
        if self.pooling == "max":
            return jnp.max(split, axis=inside)
        total = jnp.sum(split, axis=inside)
        return total if self.pooling == "sum" else total / jnp.asarray(self.unit_sizes(shape), total.dtype)

    def expand(self, units, shape):
        for axis, side in enumerate(self._window(shape)):
            units = jnp.repeat(units, side, axis=axis)
        return lax.slice(units, (0,) * len(shape), shape)


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole slices along `axis` are kept or dropped: -1 for output channels (neurons), -2 for inputs.

    A channel's score is the mean of its weights' scores.
    """

    axis: int = -1

    def check(self, name, shape):
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"channel axis {self.axis} is outside {name} of shape {tuple(shape)}")

    def units(self, shape):
        return int(shape[self.axis])

    def unit_sizes(self, shape):
        return np.asarray(int(np.prod(shape, dtype=object)) // int(shape[self.axis]), np.int64)

    def pool(self, scores):
        axis = range(scores.ndim)[self.axis]
        others = tuple(i for i in range(scores.ndim) if i != axis)
        return jnp.mean(scores, axis=others)

    def expand(self, units, shape):
        axis = range(len(shape))[self.axis]
        return jnp.broadcast_to(units.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


@dataclass(frozen=True, eq=False)
class Group(Pattern):
    """Weights that carry the same label are kept or dropped together.

    Args:
      labels: int array that broadcasts to the weight's shape, with the values 0 ... groups - 1 all in use
        (heads of an attention kernel, experts, tied positions of a convolution ...). A group's score is the
        mean of its weights' scores.
    """

    labels: Any

    def __post_init__(self):
        labels = np.asarray(self.labels)
        object.__setattr__(self, "labels", labels)
        used = np.unique(labels)
        if not np.issubdtype(labels.dtype, np.integer) or used[0] != 0 or used[-1] != used.size - 1:
            raise ValueError(f"group labels must be the integers 0 ... groups-1, all in use, got {used[:8]}")

    def check(self, name, shape):
        try:
            np.broadcast_to(self.labels, shape)
        except ValueError:
            raise ValueError(
                f"group labels of shape {self.labels.shape} do not broadcast to {name} of shape {tuple(shape)}"
            ) from None

    def units(self, shape):
        return int(self.labels.max()) + 1

    def unit_sizes(self, shape):
        return np.bincount(np.broadcast_to(self.labels, shape).ravel(), minlength=self.units(shape))

    def pool(self, scores):
        totals = jnp.zeros(self.units(scores.shape), scores.dtype)
        totals = totals.at[np.broadcast_to(self.labels, scores.shape)].add(scores)
        return totals / jnp.asarray(self.unit_sizes(scores.shape), totals.dtype)

    def expand(self, units, shape):
        return units[np.broadcast_to(self.labels, shape)]


_FORMS = "unstructured, N:M such as 2:4, block:AxB such as block:4x4, channel, channel:AXIS"


def parse(text: str | Pattern) -> Pattern:
    """A pattern from its name in a config: `unstructured`, `2:4`, `block:4x4`, `channel` or `channel:-2`."""
    if isinstance(text, Pattern):
        return text
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d+):(\d+)", str(text)):
        return NM(*map(int, match.groups()))
    if match := re.fullmatch(r"block:(\d+(?:x\d+)*)", str(text)):
        return Block(tuple(map(int, match[1].split("x"))))
    if match := re.fullmatch(r"channel(?::(-?\d+))?", str(text)):
        return Channel(int(match[1] or -1))
    raise ValueError(f"unknown pattern {text!r} (known: {_FORMS})")
