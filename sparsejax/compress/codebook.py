"""Kernels whose weights are shared: short vectors of weights that are all taken from a codebook.

A kernel `(in, out)` is cut into vectors of `dim` consecutive inputs of one output. The outputs are cut into `books`
contiguous groups of one size, each with a codebook of `codewords` vectors, and every vector holds the number of its
codeword there. `books=1` shares one codebook over the kernel, `books=out` gives every output its own.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks import map_with_name


class Codebook(NamedTuple):
    """values: float32 `(books, codewords, dim)`; codes: int32 `(in / dim, out)`."""

    values: jnp.ndarray
    codes: jnp.ndarray


def dense(codebook: Codebook):
    """The kernel `(in, out)`, float32. The gradient of a codeword is the sum over the vectors that hold it."""
    values, codes = codebook
    return _join(values[_books(values, codes.shape[1]), codes])


def nearest(values, kernel):
    """The number of the nearest codeword of every vector of a kernel: int32 `(in / dim, out)`; ties to the lowest.

    Args:
      values: `(books, codewords, dim)`.
      kernel: `(in, out)`.
    """
    own = values[_books(values, kernel.shape[1])]

    def row(vectors):
        return jnp.argmin(jnp.sum((vectors[:, None] - own) ** 2, axis=-1), axis=-1).astype(jnp.int32)

    return lax.map(row, split(kernel, values.shape[-1]))


def kmeans(
    kernel, mask=None, *, codewords: int, dim: int = 1, books: int = 1, iterations: int = 25, seed: int = 0
):
    """The codebook of a kernel by Lloyd's algorithm.

    It begins with quantiles of the weights (dim 1), or different vectors at random. Codewords that no vector is
    nearest to stay as they are.

    Args:
      kernel: `(in, out)`.
      mask: bool of its shape, or None: weights that count (all, for dim above 1).
      codewords, dim, books: see the module.
      iterations: of the algorithm.
      seed: of the start for dim above 1.

    Returns:
      A `Codebook`.

    Raises:
      ValueError: for a kernel of other than two axes; for numbers below 1, or that do not divide the kernel, or more
        codewords than vectors; for a mask with dim above 1.
    """
    check(kernel.shape, codewords, dim, books)
    outputs = kernel.shape[1]
    vectors = split(kernel, dim).reshape(-1, books, outputs // books, dim).swapaxes(0, 1)
    vectors = vectors.reshape(books, -1, dim).astype(jnp.float32)
    if mask is not None and dim > 1:
        raise ValueError(f"a codebook of vectors (dim={dim}) cannot leave out single weights")
    weights = jnp.ones(vectors.shape[:2], jnp.int32) if mask is None else _by_book(mask, books)
    values = _lloyd(vectors, weights, jax.random.key(seed), codewords, iterations)
    return Codebook(values, nearest(values, kernel))


def check(shape, codewords: int, dim: int = 1, books: int = 1, name: str = "the kernel") -> None:
    """Raises ValueError unless a kernel of this shape can have such codebooks, see `kmeans`."""
    if len(shape) != 2:
        raise ValueError(f"only kernels (in, out) have codebooks, but {name} has shape {tuple(shape)}")
    if min(codewords, dim, books) < 1 or shape[0] % dim or shape[1] % books:
        raise ValueError(
            f"a codebook needs dim={dim} to divide the inputs and books={books} the outputs of {name} of shape "
            f"{tuple(shape)}, and at least one codeword, got {codewords}"
        )
    vectors = shape[0] * shape[1] // (dim * books)
    if codewords > vectors:
        raise ValueError(f"{codewords} codewords are more than the {vectors} vectors of a book of {name}")


def insert(params, codebooks: Mapping[str, Codebook]):
    """Nested dicts with the dense values of `codebooks` {path: Codebook} in place of the kernels."""
    return map_with_name(
        lambda name, leaf: dense(codebooks[name]).astype(leaf.dtype) if name in codebooks else leaf, params
    )


def split(kernel, dim: int):
    """The vectors of a kernel `(in, out)`: `(in / dim, out, dim)`."""
    return kernel.reshape(-1, dim, kernel.shape[1]).swapaxes(1, 2)


def _join(vectors):
    return vectors.swapaxes(1, 2).reshape(-1, vectors.shape[1])


def _books(values, outputs: int):
    """The codebook of every output, int `(out,)`."""
    return np.arange(outputs) // (outputs // len(values))


def _by_book(mask, books: int):
    grouped = mask.reshape(mask.shape[0], books, -1).swapaxes(0, 1)
    return grouped.reshape(books, -1).astype(jnp.int32)


def _start(vectors, weights, key, codewords: int):
    """The first codewords `(books, codewords, dim)`."""
    if vectors.shape[-1] == 1:
        kept = jnp.sum(weights, axis=1)[:, None]
        order = jnp.sort(jnp.where(weights > 0, vectors[..., 0], jnp.inf), axis=1)
        ranks = jnp.floor((jnp.arange(codewords) + 0.5) / codewords * kept).astype(jnp.int32)
        found = jnp.take_along_axis(order, ranks, axis=1)[..., None]
        return jnp.where(jnp.isfinite(found), found, 0.0)
    keys = jax.random.split(key, len(vectors))
    return jax.vmap(lambda key, rows: jax.random.choice(key, rows, (codewords,), replace=False))(
        keys, vectors
    )


@jax.jit(static_argnums=(3, 4))
def _lloyd(vectors, weights, key, codewords: int, iterations: int):
    """The codewords `(books, codewords, dim)` of vectors `(books, n, dim)` with weights 0 or 1, int32 `(books, n)`."""

    def book(vectors, weights, values):
        def step(_, values):
            # |v - c|^2 without the |v|^2 that all codewords share
            distance = jnp.sum(values**2, -1) - 2 * jnp.matmul(
                vectors, values.T, precision=lax.Precision.HIGHEST
            )
            codes = jnp.argmin(distance, axis=1)
            count = jnp.zeros(len(values), jnp.int32).at[codes].add(weights)  # float32 stops at 2^24
            total = jnp.zeros(values.shape).at[codes].add(weights[:, None] * vectors)
            return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], values)

        return lax.fori_loop(0, iterations, step, values)

    start = _start(vectors, weights, key, codewords)
    return lax.map(lambda leaves: book(*leaves), (vectors, weights, start))
