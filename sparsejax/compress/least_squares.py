"""Masked least squares: the best weights for a given mask (the last step of ALPS, Meng et al. 2024).

For a kernel W `(in, out)`, inputs X and a mask with support S in an output, the refit minimises

    E(V) = 1/2 tr((W - V)^T H (W - V)),  H = 2/n X^T X + lambda I,      so that  H_SS v_S = H_S: w

for every output by itself. All outputs are solved together by conjugate gradients preconditioned with H's diagonal,
in which the residual is masked in every step. E falls in every step, so that the result is never worse than the
start, and the updates of other methods are approximations to it. lambda is `damping` times the mean of H's diagonal
over the inputs that are not always 0, as in SparseGPT.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.compress.base import Layerwise, masked
from sparsejax.compress.wanda import wanda


def masked_least_squares(
    kernel, mask, gram, *, start=None, damping: float = 0.01, tolerance: float = 1e-6, iterations: int = 300
):
    """The kernel with this mask whose outputs are nearest to those of `kernel`; jit-able.

    Args:
      kernel: `(in, out)` float32.
      mask: bool of its shape.
      gram: X^T X / n, `(in, in)`, positive semidefinite.
      start: where the iteration begins, zero outside the mask; None for the masked kernel.
      damping: lambda, see the module.
      tolerance: of the residual of an output, relative to the norm of H w.
      iterations: at most so many.

    Returns:
      float32 `(in, out)`, exactly 0 outside the mask.
    """
    start = masked(kernel, mask) if start is None else start
    return _solve(kernel, mask, gram, start, damping, tolerance, iterations)


@jax.jit
def _solve(kernel, mask, gram, start, damping, tolerance, iterations):
    diagonal = jnp.diagonal(gram)
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(diagonal > 0), 1)
    shift = damping * jnp.where(mean > 0, mean, 1.0)
    scale = jnp.maximum(diagonal + shift, jnp.finfo(jnp.float32).tiny)[:, None]

    def product(x):
        return jnp.matmul(gram, x, precision=lax.Precision.HIGHEST) + shift * x

    def dot(a, b):
        return jnp.sum(a * b, axis=0)

    def unfinished(carry):
        step, _, residual, _, _ = carry
        return (step < iterations) & jnp.any(dot(residual, residual) > limit)

    def improve(carry):
        step, x, residual, direction, size = carry
        image = product(direction)
        curvature = dot(direction, image)
        rate = jnp.where(curvature > 0, size / curvature, 0.0)
        x = x + rate * direction
        residual = residual - rate * masked(image, mask)
        moved = residual / scale
        new = dot(residual, moved)
        direction = moved + jnp.where(size > 0, new / size, 0.0) * direction
        return step + 1, x, residual, direction, new

    residual = masked(product(kernel - start), mask)
    goal = product(kernel)
    limit = tolerance**2 * dot(goal, goal)
    direction = residual / scale
    carry = (0, start, residual, direction, dot(residual, direction))
    return masked(lax.while_loop(unfinished, improve, carry)[1], mask)


def least_squares(
    initial: Layerwise | None = None, *, damping: float = 0.01, tolerance: float = 1e-6, iterations: int = 300
) -> Layerwise:
    """Another method's mask with the best weights for it.

    Args:
      initial: gives the mask and the weights to start from; None for Wanda.
      damping, tolerance, iterations: as in `masked_least_squares`.

    Raises:
      ValueError: for a damping or tolerance that is not finite or below 0, and iterations below 0.
    """
    initial = wanda() if initial is None else initial
    options = {"damping": damping, "tolerance": tolerance, "iterations": iterations}
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"least_squares needs a finite {name} >= 0, got {value}")
    solve = partial(masked_least_squares, **options)

    def prune(kernel, stats, sparsity, pattern="unstructured"):
        start, mask = initial.prune(kernel, stats, sparsity, pattern)
        return solve(kernel, mask, stats["gram"], start=start), mask

    needs = tuple(dict.fromkeys((*initial.needs, "gram")))
    rules = initial.wrapped_rules(partial(least_squares, **options))
    settings = {"initial": dict(initial.settings), **options}
    name = f"{initial.name}+least_squares"
    return Layerwise(name, needs, prune, initial.patterns, initial.host, rules, settings)


__all__ = ["least_squares", "masked_least_squares"]
