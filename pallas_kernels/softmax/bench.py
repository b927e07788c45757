"""The two-pass softmax against `jax.nn.softmax`, for rows inside and outside of the caches."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.softmax import softmax


class Case(NamedTuple):
    """One line of the bench."""

    rows: int
    columns: int
    dtype: type
    backward: bool

    @property
    def name(self):
        passes = "forward and backward" if self.backward else "forward"
        return f"{self.rows} x {self.columns} {jnp.dtype(self.dtype).name}, {passes}"


def cases(size: int | None = None) -> list[Case]:
    """One row out of cache, and many shorter ones; `size` overrides the numbers in all rows together."""
    size = size or (2**22 if jax.default_backend() == "cpu" else 2**28)
    wide = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shapes = [(1, size), (max(1, size // 32768), min(size, 32768)), (max(1, size // 1024), min(size, 1024))]
    return [Case(*shape, wide, backward) for shape in shapes for backward in (False, True)]


def run(case: Case, repeats: int = timing.REPEATS) -> dict:
    """Two passes against `jax.nn.softmax`; no peer that JAX users could take instead is known to us.

    Where no kernel runs, `softmax` itself would take XLA's own, and two passes have to be named.
    """
    two_passes = functools.partial(softmax, implementation="xla" if jax.default_backend() == "cpu" else None)
    x = 8 * jax.random.normal(jax.random.key(0), (case.rows, case.columns)).astype(case.dtype)

    def passes(function):
        if not case.backward:
            return function
        return lambda x: jax.grad(lambda x: (function(x) * x).astype(jnp.float32).sum())(x)

    # two readings and one writing; backward two of each result and one writing
    moved = x.size * x.dtype.itemsize * (8 if case.backward else 3)
    return timing.compare(
        "softmax",
        case.name,
        timing.blocking(passes(two_passes), x),
        timing.blocking(passes(lambda x: jax.nn.softmax(x, axis=-1)), x),
        {},
        (40.0 * x.size, moved),
        repeats,
    )
