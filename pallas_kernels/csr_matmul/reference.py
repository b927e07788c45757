"""The definition: products with the dense weight."""

import jax.numpy as jnp


def rows_of(indices, indptr):
    """The row of each stored entry, `(nnz,)`."""
    rows = jnp.arange(indptr.shape[0] - 1, dtype=jnp.int32)
    return jnp.repeat(rows, jnp.diff(indptr), total_repeat_length=indices.shape[0])


def dense(data, indices, indptr, columns: int):
    """The dense weight, `(K, columns)`."""
    weight = jnp.zeros((indptr.shape[0] - 1, columns), data.dtype)
    where = weight.at[rows_of(indices, indptr), indices]
    return where.set(data, unique_indices=True, indices_are_sorted=True)


def matmul(x, data, indices, indptr, columns: int):
    """`x @ W`."""
    return x @ dense(data, indices, indptr, columns)


def matmul_transposed(g, data, indices, indptr):
    """`g @ W.T`."""
    return g @ dense(data, indices, indptr, g.shape[1]).T


def sampled(x, g, indices, indptr):
    """`x.T @ g` at the stored entries."""
    return (x.T @ g)[rows_of(indices, indptr), indices]
