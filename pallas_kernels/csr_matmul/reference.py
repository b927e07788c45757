"""The definition: products with the dense weight."""

import jax.numpy as jnp


def outputs_of(indices, indptr):
    """The output of each stored entry, `(nnz,)`."""
    outputs = jnp.arange(indptr.shape[0] - 1, dtype=jnp.int32)
    return jnp.repeat(outputs, jnp.diff(indptr), total_repeat_length=indices.shape[0])


def dense(data, indices, indptr, inputs: int):
    """The dense W.T, `(N, inputs)`."""
    weight = jnp.zeros((indptr.shape[0] - 1, inputs), data.dtype)
    where = weight.at[outputs_of(indices, indptr), indices]
    return where.set(data, unique_indices=True, indices_are_sorted=True)


def matmul(x, data, indices, indptr):
    """`x @ W`."""
    return x @ dense(data, indices, indptr, x.shape[1]).T


def matmul_transposed(g, data, indices, indptr, inputs: int):
    """`g @ W.T`."""
    return g @ dense(data, indices, indptr, inputs)


def sampled(x, g, indices, indptr):
    """`x.T @ g` at the stored entries."""
    return (g.T @ x)[outputs_of(indices, indptr), indices]
