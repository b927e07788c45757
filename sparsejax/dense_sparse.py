"""Dense-sparse factorisation of a matrix: W ~ D S with a dictionary D and codes S that are N:M sparse.

Every column of S has N nonzeros in each M consecutive rows, so that each output of a layer `y = (x D) S` is made
of a few atoms (columns of D) of its own, where a low-rank factorisation gives all outputs the same ones. The
rows of W may be divided into blocks of equal height, each with a dictionary and codes to itself. Arrays have the
block as their first axis:

  W: (blocks, height, out)      D: (blocks, height, rank)      S: (blocks, rank, out)

An alternation takes three steps, none of which increases the squared error |W - D S|^2:

  1. atoms are scaled to norm 1, and their rows of S by as much, which leaves D S as it is;
  2. coding, each column s of S by itself: t = s + D^T (w - D s); the N largest |t| of each M positions are the
     new support, on which conjugate gradients approach the least squares; a column that got worse is put back;
  3. dictionary: D = argmin |W - D S|^2 + e |D - D_old|^2, a least-squares problem with a small e that keeps
     unused atoms where they are.

From S = 0 and orthonormal atoms, step 2 keeps the largest entries of D^T W, which is the best there is.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.patterns import NM

CONJUGATE_GRADIENT_STEPS = 8
RIDGE = 1e-6
VALUE_BITS = 32


class Factors(NamedTuple):
    """dense: D, float32 (blocks, height, rank); sparse: S, float32 (blocks, rank, out) with its zeros."""

    dense: jax.Array
    sparse: jax.Array


def product(factors: Factors):
    """D S, `(blocks, height, out)`."""
    return factors.dense @ factors.sparse


def start(weight, rank: int) -> Factors:
    """Atoms to begin with, and no codes: the left singular vectors of each block, largest first.

    Where there are fewer of them than `rank`, columns of the weight follow, evenly spaced.

    Args:
      weight: `(blocks, height, out)`.
      rank: atoms per block, at most `height + out`.
    """
    weight = weight.astype(jnp.float32)
    blocks, _, out = weight.shape
    atoms = jnp.linalg.svd(weight, full_matrices=False)[0][..., :rank]
    missing = rank - atoms.shape[-1]
    if missing:
        columns = jnp.arange(missing) * out // missing
        atoms = jnp.concatenate([atoms, weight[..., columns]], axis=-1)
    return Factors(_unit(atoms)[0], jnp.zeros((blocks, rank, out), jnp.float32))


def code(weight, factors: Factors, pattern: NM) -> Factors:
    """Steps 1 and 2 of an alternation: new codes for the same atoms, scaled to norm 1.

    Args:
      weight: `(blocks, height, out)`.
      factors: of the same weight or another one; the codes may be zero.
      pattern: N:M along the rows of S.
    """
    weight = weight.astype(jnp.float32)
    atoms, norms = _unit(factors.dense)
    codes = factors.sparse * jnp.swapaxes(norms, -1, -2)
    transposed = jnp.swapaxes(atoms, -1, -2)
    gram, target = transposed @ atoms, transposed @ weight
    trial = codes + target - gram @ codes
    support = pattern.select(jnp.abs(trial))
    trial = _solve_on(support, gram, target, jnp.where(support, trial, 0.0))
    better = _energy(gram, target, trial) < _energy(gram, target, codes)
    return Factors(atoms, jnp.where(better, trial, codes))


def fit_dictionary(weight, factors: Factors) -> Factors:
    """Step 3 of an alternation: the best atoms for these codes."""
    weight, (dense, sparse) = weight.astype(jnp.float32), factors
    transposed = jnp.swapaxes(sparse, -1, -2)
    gram = sparse @ transposed
    size = gram.shape[-1]
    ridge = RIDGE * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / size + jnp.finfo(jnp.float32).tiny
    right = weight @ transposed + ridge * dense
    solved = jnp.linalg.solve(gram + ridge * jnp.eye(size), jnp.swapaxes(right, -1, -2))
    return Factors(jnp.swapaxes(solved, -1, -2), sparse)


def alternate(weight, factors: Factors, pattern: NM) -> Factors:
    """One alternation from the given factors; |W - D S|^2 does not increase, up to rounding.

    Args:
      weight: `(blocks, height, out)`, any float dtype.
      factors: warm start, of this weight or of one like it.
      pattern: N:M along the rows of S; N = M makes it a low-rank factorisation.
    """
    with jax.default_matmul_precision("float32"):
        return fit_dictionary(weight, code(weight, factors, pattern))


def factorise(weight, rank: int, pattern: NM, iterations: int = 30) -> Factors:
    """`iterations` alternations from `start`.

    Args:
      weight: `(blocks, height, out)`.
      rank: atoms per block, a multiple of the pattern's M.
      pattern: N:M along the rows of S.
      iterations: 30 are within a few per cent of the error that many more reach.
    """

    def step(factors, _):
        return alternate(weight, factors, pattern), None

    return jax.lax.scan(step, start(weight, rank), length=iterations)[0]


def relative_error(weight, factors: Factors):
    """|W - D S|^2 / |W|^2, a float32 scalar."""
    weight = weight.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(jnp.square(weight)), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(jnp.square(weight - product(factors))) / total


# --- what is stored ----------------------------------------------------------------------------------


def stored_values(shape, rank: int, pattern: NM) -> float:
    """What D and the packed S take, in values of 32 bits: D, the nonzeros of S, and their positions.

    The positions in a group of M are stored as N indices of ceil(log2 M) bits or as M flags, whichever is less;
    at N = M there is nothing to store.

    Args:
      shape: `(blocks, height, out)` of the weight.
      rank: atoms per block.
      pattern: N:M along the rows of S.
    """
    blocks, height, out = shape
    n, m = pattern.n, pattern.m
    bits = min(n * math.ceil(math.log2(m)), m) if n < m else 0
    return blocks * (height * rank + out * rank // m * (n + bits / VALUE_BITS))


def plan(
    shape, budget: float, pattern: NM, block: int | None, label: str
) -> tuple[tuple[int, int, int], int]:
    """How a matrix is factorised: the shape `(blocks, height, out)` it is seen in, and the rank.

    Args:
      shape: `(rows, out)`.
      budget: what the factors may store, as a fraction of the dense matrix, in (0, 1]; the rank is the largest
        multiple of M whose `stored_values` fit.
      pattern: N:M along the rows of S.
      block: height of the blocks, a divisor of the rows; None for all rows.
      label: what errors call the matrix.

    Raises:
      ValueError: one sentence, if the pattern is not N:M along the rows, the shape not that of a matrix, the block does not divide the rows, or
        nothing fits the budget.
    """
    if type(pattern) is not NM or pattern.axis != -2:
        raise ValueError(
            f"the codes of {label} need an N:M pattern along axis -2 such as 5:16, got {pattern!r}"
        )
    if len(shape) != 2:
        raise ValueError(f"dense-sparse factors are those of a matrix, but {label} has shape {tuple(shape)}")
    rows, out = shape
    height = rows if block is None else block
    if not isinstance(height, int) or height < 1 or rows % height:
        raise ValueError(f"block={block} must be an integer that divides the {rows} rows of {label}")
    if not 0 < budget <= 1:
        raise ValueError(f"the budget of {label} must be in (0, 1], got {budget}")
    blocked = (rows // height, height, out)
    least = stored_values(blocked, pattern.m, pattern) / (rows * out)
    groups = int(budget / least + 1e-9)
    if not groups:
        raise ValueError(
            f"budget={budget:g} is too small for {label} of shape {tuple(shape)}: with {pattern.n}:{pattern.m} "
            f"codes and blocks of {height} rows the least is {least:.3g}"
        )
    return blocked, pattern.m * groups


# --- pieces ------------------------------------------------------------------------------------------


def _unit(dense):
    """The atoms scaled to norm 1, and their norms `(blocks, 1, rank)`; a zero atom stays zero."""
    norms = jnp.linalg.norm(dense, axis=-2, keepdims=True)
    return jnp.where(norms > 0, dense / jnp.where(norms > 0, norms, 1.0), 0.0), norms


def _energy(gram, target, codes):
    """|w - D s|^2 - |w|^2 of every column, `(blocks, 1, out)`."""
    return jnp.sum(codes * (gram @ codes - 2.0 * target), axis=-2, keepdims=True)


def _solve_on(support, gram, target, codes):
    """A few steps of conjugate gradients towards the least squares of every column on its support."""

    def dot(a, b):
        return jnp.sum(a * b, axis=-2, keepdims=True)

    def step(_, carry):
        codes, residual, direction, squared = carry
        image = jnp.where(support, gram @ direction, 0.0)
        curvature = dot(direction, image)
        size = jnp.where(curvature > 0, squared / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        codes, residual = codes + size * direction, residual - size * image
        after = dot(residual, residual)
        direction = (
            residual + jnp.where(squared > 0, after / jnp.where(squared > 0, squared, 1.0), 0.0) * direction
        )
        return codes, residual, direction, after

    residual = jnp.where(support, target - gram @ codes, 0.0)
    carry = codes, residual, residual, dot(residual, residual)
    return jax.lax.fori_loop(0, CONJUGATE_GRADIENT_STEPS, step, carry)[0]


__all__ = [
    "Factors",
    "alternate",
    "code",
    "factorise",
    "fit_dictionary",
    "plan",
    "product",
    "relative_error",
    "start",
    "stored_values",
]
