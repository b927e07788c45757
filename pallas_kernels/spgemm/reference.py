"""Products of sparse matrices by way of dense ones: the oracle."""

import jax.numpy as jnp

from pallas_kernels.sums import matmul, sum_dtype


def dense(values, place, shape):
    """The dense matrix with `values` at the rows and columns `place`; padding, in rows beyond the last, is dropped."""
    whole = jnp.zeros(shape, sum_dtype(values.dtype))
    return whole.at[place].add(values, mode="drop").astype(values.dtype)


def at(whole, place):
    """The entries of a matrix at `place`, 0 in padding."""
    return jnp.asarray(whole).at[place].get(mode="fill", fill_value=0)


def product(x, y, places, lists, sizes):
    """The entries of X Y at the third of `places`, see `pallas_kernels.spgemm`."""
    del lists
    m, k, n = sizes
    x, y = dense(x, places[0], (m, k)), dense(y, places[1], (k, n))
    return at(matmul(x, y), places[2])
