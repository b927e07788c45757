"""Round-to-nearest quantisation on group grids that hold zero exactly, and what trains on them.

A grid belongs to a group of `group` consecutive inputs of one output: kernel `(in, out)`, grids `(in / group, out)`.
With lo = min(w, 0) and hi = max(w, 0) over the group and L = 2^bits - 1,

  scale = (hi - lo) / L      zero = round(-lo / scale)      (a group of zeros: scale 1, zero 0)
  code  = clip(round(w / scale) + zero, 0, L)
  w^    = scale (code - zero)

|w - w^| <= scale / 2. Zero always is a level, so a mask survives: a weight of 0 comes back as 0.

`fake` is the same map with straight-through rounding: dw^/dw = 1 inside the grid and 0 where it clips, and the
gradients of scale and zero are those of the formula with round(u) = u + constant (Esser et al. 2020, learned step
size quantisation).

GPTQ (Frantar et al. 2022) is SparseGPT's sweep with every weight rounded before its error is passed on, for which
`rounding` makes the function. It fits the grids of a block of inputs when the sweep comes to the block; the released
code does so group by group.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.compress.base import Layerwise, layer_budget

MAX_BITS = 16


class Grid(NamedTuple):
    """scale, zero: `(in / group, out)`, the scale in the dtype that is stored, zero float32; zero is in units of codes,
    and an integer unless it was trained."""

    scale: jnp.ndarray
    zero: jnp.ndarray


class Quantised(NamedTuple):
    """codes: uint8 (uint16 above 8 bits) `(in, out)`; grid; mask: bool `(in, out)`, False where the weight is 0."""

    codes: jnp.ndarray
    grid: Grid
    mask: jnp.ndarray


def check_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is 1 to 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")


def check(kernel, bits: int, group: int, name: str = "the kernel") -> None:
    """Raises ValueError unless `bits` is 1 to 16 and groups of `group` inputs fill a kernel `(in, out)`."""
    check_bits(bits)
    if kernel.ndim != 2:
        raise ValueError(
            f"only kernels (in, out) are quantised in groups, but {name} has shape {kernel.shape}"
        )
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or kernel.shape[0] % group:
        raise ValueError(
            f"groups of {group!r} inputs do not divide the {kernel.shape[0]} inputs of {name}; group must be a divisor"
        )


def check_dense(name: str, sparsity: float | None, pattern) -> None:
    """Raises ValueError unless the budget of a method that keeps every weight is sparsity 0."""
    sparsity, _ = layer_budget(name, sparsity, pattern)
    if sparsity:
        raise ValueError(
            f"{name} without an initial method prunes nothing, so sparsity must be 0, got {sparsity:g}"
        )


def fit(kernel, *, bits: int = 4, group: int = 16) -> Grid:
    """The grids of a kernel `(in, out)`, see the module; ValueError as `check`."""
    check(kernel, bits, group)
    w = kernel.astype(jnp.float32).reshape(-1, group, kernel.shape[1])
    low, high = jnp.minimum(w.min(1), 0.0), jnp.maximum(w.max(1), 0.0)
    scale = (high - low) / (2**bits - 1)
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)
    return Grid(scale, jnp.round(-low / scale))


def encode(kernel, grid: Grid, bits: int):
    """The nearest codes: uint8 (uint16 above 8 bits) of the shape of `kernel`."""
    scale, zero = spread(grid, kernel.shape[0])
    codes = jnp.clip(jnp.round(kernel.astype(jnp.float32) / scale) + jnp.round(zero), 0, 2**bits - 1)
    return codes.astype(jnp.uint8 if bits <= 8 else jnp.uint16)


def decode(codes, grid: Grid):
    """scale (code - zero), float32 of the shape of `codes`; differentiable in the grid."""
    scale, zero = spread(grid, codes.shape[0])
    return scale * (codes.astype(jnp.float32) - zero)


def spread(grid: Grid, inputs: int) -> Grid:
    """The scale and zero of every weight: both float32 `(inputs, out)`."""
    return Grid(*(jnp.repeat(leaf.astype(jnp.float32), inputs // leaf.shape[0], axis=0) for leaf in grid))


def round_to_nearest(kernel, mask=None, *, bits: int = 4, group: int = 16) -> Quantised:
    """A kernel on its own grids.

    Args:
      kernel: `(in, out)`; weights outside the mask count as 0.
      mask: bool of the same shape, or None for all True.
      bits, group: see the module.

    Raises:
      ValueError: as `check`.
    """
    mask = jnp.ones(kernel.shape, bool) if mask is None else mask
    kernel = jnp.where(mask, kernel, 0)
    grid = fit(kernel, bits=bits, group=group)
    return Quantised(encode(kernel, grid, bits), grid, mask)


def dense(quantised: Quantised):
    """The float32 kernel, exactly 0 outside the mask; differentiable in the grid."""
    return jnp.where(quantised.mask, decode(quantised.codes, quantised.grid), 0.0)


def straight_through_round(x):
    """round(x) with the gradient of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def fake(kernel, grid: Grid, mask, *, bits: int):
    """`dense(Quantised(encode(kernel, grid, bits), grid, mask))`, differentiable in kernel, scale and zero.

    A zero point that is not an integer is rounded, with the gradient of the identity.
    """
    scale, zero = spread(grid, kernel.shape[0])
    zero = straight_through_round(zero)
    codes = straight_through_round(kernel / scale) + zero
    # `jnp.clip` would halve the gradient of codes that lie on a bound, as many do.
    limit = jnp.where(codes < 0, 0.0, 2.0**bits - 1)
    codes = jnp.where((codes < 0) | (codes > 2**bits - 1), limit, codes)
    return jnp.where(mask, scale * (codes - zero), 0.0)


def rounding(*, bits: int = 4, group: int = 16) -> Callable:
    """The `quantise` of `sparsejax.compress.sparsegpt`, which makes its sweep GPTQ.

    Given the weights of a block of inputs `(size, out)`, it fits their grids and returns `f(weights (out,), i)`, the
    nearest levels for the i-th input of the block. `group` must divide the sizes of all blocks.
    """

    def quantise(rows):
        grid = fit(rows, bits=bits, group=group)

        def nearest(weights, i):
            scale, zero = (jax.lax.dynamic_index_in_dim(leaf, i // group, 0, keepdims=False) for leaf in grid)
            return scale * (jnp.clip(jnp.round(weights / scale) + zero, 0, 2**bits - 1) - zero)

        return nearest

    quantise.__qualname__ = f"rounding(bits={bits}, group={group})"  # what settings of a method show
    return quantise


def rtn(initial: Layerwise | None = None, *, bits: int = 4, group: int = 16) -> Layerwise:
    """Rounds what another method keeps; the mask is that method's.

    Args:
      initial: prunes first; None keeps every weight, and then only sparsity 0 is possible.
      bits: of a weight, 1 to 16.
      group: inputs that share a grid.

    Raises:
      ValueError: when it prunes, for a sparsity without `initial`, or as `check`.
    """

    def prune(kernel, stats, sparsity, pattern):
        mask = None
        if initial is None:
            check_dense("rtn", sparsity, pattern)
        else:
            kernel, mask = initial.prune(kernel, stats, sparsity, pattern)
        quantised = round_to_nearest(kernel, mask, bits=bits, group=group)
        return dense(quantised), quantised.mask

    name = f"rtn{bits}" if initial is None else f"{initial.name}+rtn{bits}"
    settings = {"bits": bits, "group": group}
    if initial is None:
        return Layerwise(name, (), prune, settings=settings)
    rules = initial.wrapped_rules(partial(rtn, **settings))
    settings["initial"] = dict(initial.settings)
    return Layerwise(name, initial.needs, prune, initial.patterns, initial.host, rules, settings)
