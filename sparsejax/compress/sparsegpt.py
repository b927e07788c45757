"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar & Alistarh 2023).

For a kernel W `(in, out)` with inputs X the sweep reduces E(Q) = 1/2 tr((W - Q)^T H (W - Q)), H = 2/n X^T X + lambda I:
inputs are taken one after the other, and the error made on one is passed on to those that are not yet done.

  H^-1 = U^T U with U upper triangular
  for every block [a, b) of inputs:
    unstructured, blocks: mask of [a, b) = the highest W_ij^2 / U_ii^2, over all outputs together
    for i = a ... b - 1:
      N:M, at i = 0 mod M: mask of [i, i + M) = for every output the N highest of those scores
      q = round(W_i * mask_i)        e_i = (W_i - q) / U_ii
      W_j -= U_ij e_i for j in (i, b)      Q_i = q
    W_j -= sum over i in [a, b) of U_ij e_i for j >= b

so that E(Q) = 1/2 sum of e^2 exactly, for any mask. lambda is `damping` times the mean of H's diagonal. Inputs that
are always 0 have no influence: their weights become 0 and their place on the diagonal 1.

Where we depart: U comes from one factorisation instead of three, H = R R^T with R upper triangular and U = R^-1; the
mean of the diagonal is over live inputs, which makes the result independent of the scale of X; of [0, b)
exactly floor(sparsity * b * out) weights are dropped, so that the count is exact in the whole layer; ranks instead
of a threshold, hence no extra weight where scores tie. Within a block, inputs are taken in small groups: what a
group has to subtract for all earlier inputs of the block is one matrix product.
"""

import weakref
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import lapack

from sparsejax.compress.base import Layerwise, dropped, is_traced, layer_budget, warn
from sparsejax.patterns import NM, Block, Pattern

_GROUP = 16  # inputs between two products inside a block
_LIMIT = 10.0  # of the damping: beyond it H is not a Gram matrix
_TAIL = 512  # inputs that the update after a block takes at once
_PIECE = 2**20  # numbers of a factor that are moved at once


def sparsegpt(*, block: int = 128, damping: float = 0.01, quantise: Callable | None = None) -> Layerwise:
    """Prunes input by input and lets the remaining weights make up for it.

    Args:
      block: inputs whose unstructured mask is chosen at once; rounded up to a multiple of a pattern's side.
      damping: in units of the mean diagonal of H, 0 to 10; ten times more, with a warning, for as long as H has no Cholesky
        factor.
      quantise: optional rounding of the kept weights in the sweep (with sparsity 0 this is GPTQ, Frantar et al.
        2022). Called when the sweep comes to a block, with its weights `(block, out)` (the last one may have fewer
        rows; zeros where an unstructured mask is already chosen), it returns a function of `(weights (out,), i)` for
        the i-th input of the block. Both are traced. Its zeros must be zeros: what the mask drops stays 0.

    Raises:
      ValueError: for block < 1 or a damping outside of 0 to 10; when it prunes, for a Gram matrix that is not finite or not positive
        definite with a damping of 10, for a pattern it cannot do, and for traced arrays (it factorises on the host).
    """
    if block < 1:
        raise ValueError(f"sparsegpt needs a block of at least 1 input, got {block}")
    _check_damping(damping)
    factors = _Factors(damping)

    def prune(kernel, stats, sparsity, pattern="unstructured"):
        sparsity, pattern = layer_budget("sparsegpt", sparsity, pattern)
        if sparsity == 0 and quantise is None:
            return kernel, jnp.ones(kernel.shape, bool)
        if sparsity:
            pattern.check("the kernel", kernel.shape)
        if is_traced(kernel, stats["gram"]):
            raise ValueError(
                "sparsegpt factorises on the host, so that its arrays cannot be traced by jax.jit"
            )
        width = _width(block, kernel.shape[0], pattern)
        counts = _kept(kernel.shape, width, sparsity, pattern)
        factor, dead = factors(jnp.asarray(stats["gram"]))
        rule = pattern if sparsity and isinstance(pattern, NM | Block) else None
        return _sweep(jnp.asarray(kernel), factor, dead, counts, width, rule, sparsity == 0, quantise)

    named = quantise and (getattr(quantise, "__qualname__", None) or repr(quantise))
    settings = {"block": block, "damping": damping, "quantise": named}
    return Layerwise("sparsegpt", ("gram",), prune, host=True, settings=settings)


# --- the factor --------------------------------------------------------------------------------------


class _Factors:
    """`inverse_factor` that keeps its last result while that Gram matrix lives: queries, keys and values share one."""

    def __init__(self, damping: float):
        self._damping = damping
        self._forget()

    def __call__(self, gram):
        if self._gram is None or self._gram() is not gram:
            self._forget()  # before there are two
            self._found = _factorise(gram, self._damping)
            self._gram = weakref.ref(gram, self._forget)
        factor, dead, used = self._found
        _warn_damped(self._damping, used)
        return factor, dead

    def _forget(self, _=None):
        self._gram = self._found = None


def inverse_factor(gram, damping: float = 0.01):
    """U with (2 gram + lambda I)^-1 = U^T U, float32 upper triangular, and the dead inputs, bools `(in,)`.

    Computed on the host, in the place of one float64 matrix.

    Args:
      gram: X^T X / n, `(in, in)`.
      damping: lambda in units of the mean diagonal of live inputs, 0 to 10.

    Raises:
      ValueError: for values that are not finite, a damping outside of 0 to 10, and if no damping up to 10 gives a
        Cholesky factor.
    """
    _check_damping(damping)
    factor, dead, used = _factorise(gram, damping)
    _warn_damped(damping, used)
    return factor, dead


def _check_damping(damping: float) -> None:
    if not 0 <= damping <= _LIMIT:
        raise ValueError(f"damping must be in [0, {_LIMIT:g}], got {damping}")


def _warn_damped(damping: float, used: float) -> None:
    if used != damping:
        warn(
            f"the Gram matrix of the inputs is not positive definite with damping {damping:g}; damped by {used:g} "
            "times its mean diagonal instead"
        )


def _factorise(gram, damping: float):
    """(U, dead, the damping that was used), as in `inverse_factor`."""
    gram = np.asarray(gram)
    diagonal = 2.0 * np.diagonal(gram).astype(np.float64)
    if not np.isfinite(gram).all():
        raise ValueError("the Gram matrix of the inputs is not finite; the model's activations overflow")
    dead = diagonal == 0
    live = diagonal[~dead].mean() if not dead.all() else 1.0
    buffer, used = np.empty(gram.size), damping
    while not _invert_reversed(buffer, gram, diagonal + dead + used * live):
        used = max(10 * used, 1e-4)
        if used > _LIMIT:
            raise ValueError(
                f"the Gram matrix of the inputs is not positive definite, even with {_LIMIT:g} times its mean "
                "diagonal added"
            )
    # `jnp.asarray` would copy it
    return jax.device_put(_reversed_float32(buffer).reshape(gram.shape)), jnp.asarray(dead), used


def _invert_reversed(buffer, gram, diagonal) -> bool:
    """Makes of `buffer` (in^2,) U in row-major order from its end to its start; False if there is no Cholesky factor.

    With both axes reversed, the R of H = R R^T is the transpose of LAPACK's upper factor; for a symmetric matrix
    that is the reversal of its flat array.
    """
    np.multiply(gram.reshape(-1)[::-1], 2.0, out=buffer, dtype=np.float64)
    buffer[:: len(gram) + 1] = diagonal[::-1]
    matrix = buffer.reshape(gram.shape).T  # column-major, so that LAPACK works in its place
    _, failed = lapack.dpotrf(matrix, lower=0, clean=1, overwrite_a=1)
    if not failed:
        lapack.dtrtri(matrix, lower=0, overwrite_c=1)
    return not failed


def _reversed_float32(buffer):
    """The values of a float64 buffer from its end to its start, float32, in its memory, of which half is given back."""
    size = len(buffer)
    for start in range(0, size // 2, _PIECE):
        end = min(start + _PIECE, size // 2)
        left, right = buffer[start:end], buffer[size - end : size - start]
        left[:], right[:] = right[::-1].copy(), left[::-1].copy()
    narrow = buffer.view(np.float32)
    for start in range(0, size, _PIECE):
        # written over numbers that are read already; NumPy sees to it where a piece overlaps itself
        narrow[start : min(start + _PIECE, size)] = buffer[start : start + _PIECE]
    buffer.resize(-(-size // 2), refcheck=False)
    return buffer.view(np.float32)[:size]


# --- the sweep ---------------------------------------------------------------------------------------


def _width(block: int, inputs: int, pattern: Pattern) -> int:
    """Inputs per block of the sweep: a multiple of the pattern's side, at most all of them."""
    side = 1
    if isinstance(pattern, NM):
        side = pattern.m
    elif isinstance(pattern, Block) and len(pattern.shape) > 1:
        side = pattern.shape[-2]
    return min(-(-block // side) * side, inputs)


def _kept(shape, width: int, sparsity: float, pattern: Pattern):
    """How many units the mask of every block of the sweep keeps: uint32, exact for all blocks up to each."""
    inputs, outputs = shape
    ends = [*range(width, inputs, width), inputs]
    units = [pattern.units((end, outputs)) for end in ends]
    return np.diff([n - dropped(sparsity, n) for n in units], prepend=0).astype(np.uint32)


@partial(jax.jit, static_argnames=("width", "rule", "keep_all", "quantise"))
def _sweep(kernel, factor, dead, counts, width, rule, keep_all, quantise):
    inputs = len(kernel)
    full, rest = divmod(inputs, width)

    def step(size):
        def run(index, carry):
            weights, mask = carry
            start = index * width
            corner = lax.dynamic_slice(factor, (start, start), (size, size))
            rows = lax.dynamic_slice_in_dim(weights, start, size)
            rows, errors, kept = _block(rows, corner, counts[index], rule, keep_all, quantise)
            weights = lax.dynamic_update_slice_in_dim(weights, rows, start, 0)
            mask = lax.dynamic_update_slice_in_dim(mask, kept, start, 0)
            return _pass_on(weights, factor, errors, start), mask

        return run

    kernel = jnp.where(dead[:, None], 0, kernel)
    carry = lax.fori_loop(0, full, step(width), (kernel, jnp.zeros(kernel.shape, bool)))
    return step(rest)(full, carry) if rest else carry


def _block(rows, factor, count, rule, keep_all, quantise):
    """The sweep of one block: its new rows, errors e and mask, all `(size, out)`; `factor` is U's corner."""
    size = len(rows)
    scale = jnp.diagonal(factor)[:, None] ** -2
    group = rule.m if isinstance(rule, NM) else max(n for n in range(1, _GROUP + 1) if size % n == 0)
    by_group = isinstance(rule, NM)
    mask = jnp.ones(rows.shape, bool)
    if not (by_group or keep_all):
        pattern = rule or Pattern()
        mask = pattern.expand(pattern.select(pattern.pool(rows**2 * scale), count), rows.shape)
    rounding = None if quantise is None else quantise(jnp.where(mask, rows, 0))

    def do_group(g, carry):
        rows, errors, mask = carry
        start = g * group
        columns = lax.dynamic_slice_in_dim(factor, start, group, 1)
        now = lax.dynamic_slice_in_dim(rows, start, group) - _product(columns, errors)
        kept = lax.dynamic_slice_in_dim(mask, start, group)
        if by_group:
            kept = rule.select(now**2 * lax.dynamic_slice_in_dim(scale, start, group))
        corner = lax.dynamic_slice_in_dim(columns, start, group)

        def do_input(i, carry):
            now, found = carry
            row = now[i] - _product(corner[:, i], found)
            q = jnp.where(kept[i], row, 0)
            if rounding is not None:
                q = jnp.where(kept[i], rounding(q, start + i), 0)
            return now.at[i].set(q), found.at[i].set((row - q) / corner[i, i])

        now, found = lax.fori_loop(0, group, do_input, (now, jnp.zeros_like(now)))
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, 0)
            for whole, part in ((rows, now), (errors, found), (mask, kept))
        )

    return lax.fori_loop(0, size // group, do_group, (rows, jnp.zeros_like(rows), mask))


def _pass_on(weights, factor, errors, start):
    """Subtracts U_ij e_i, i in the block that begins at `start`, from all rows j after it, `_TAIL` at a time."""
    size, (inputs, _) = len(errors), weights.shape
    tail = min(_TAIL, inputs)

    def chunk(c, weights):
        # the last chunk may overlap the one before: rows that are done get a factor of 0
        first = start + size + c * tail
        at = jnp.minimum(first, inputs - tail)
        part = lax.dynamic_slice(factor, (start, at), (size, tail))
        part = jnp.where(at + jnp.arange(tail) >= first, part, 0)
        rows = lax.dynamic_slice_in_dim(weights, at, tail)
        return lax.dynamic_update_slice_in_dim(weights, rows - _product(part, errors), at, 0)

    return lax.fori_loop(0, -(-(inputs - start - size) // tail), chunk, weights)


def _product(a, b):
    """a^T b in full float32; `a` is a matrix or a vector."""
    return jnp.matmul(a.T, b, precision=lax.Precision.HIGHEST)


__all__ = ["inverse_factor", "sparsegpt"]
