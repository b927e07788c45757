"""Products with an N:M weight in XLA: the weight is decompressed in one elementwise pass, then comes a dense dot.

The pass reads half of the dense weight for 2:4 and writes all of it, which costs little beside a dot with a large
batch. XLA does not fuse it into the dot, so with a small batch the dense product is faster.
"""

import jax.numpy as jnp

from pallas_kernels.nm_matmul.layout import unpack
from pallas_kernels.sums import matmul as multiply

# Comparing every entry of a group with every position is fast while there are few; XLA's scatter and gather, slow on
# CPUs, visit each entry once.
SELECT = 16


def decompress(values, indices, n: int, m: int):
    """The dense weight `(K, N)` of `values (K / m n, N)` and packed `indices`."""
    entries, columns = values.shape
    codes = unpack(indices, entries, m)
    if n > SELECT:
        rows = jnp.arange(entries)[:, None] // n * m + codes
        weight = jnp.zeros((entries // n * m, columns), values.dtype)
        return weight.at[rows, jnp.arange(columns)].set(values, unique_indices=True)
    codes, values = (array.reshape(-1, n, columns) for array in (codes, values))
    position = jnp.arange(m, dtype=jnp.uint8)[:, None]
    weight = jnp.zeros((entries // n, m, columns), values.dtype)
    for entry in range(n):
        weight = jnp.where(codes[:, entry, None] == position, values[:, entry, None], weight)
    return weight.reshape(-1, columns)


def sample(dense, indices, n: int, m: int):
    """The entries of a dense `(K, N)` that an N:M weight keeps, `(K / m n, N)`."""
    columns = dense.shape[1]
    entries = dense.shape[0] // m * n
    codes = unpack(indices, entries, m).reshape(-1, n, columns)
    groups = dense.reshape(-1, m, columns)
    if m > SELECT:
        return jnp.take_along_axis(groups, codes, axis=1).reshape(entries, columns)
    found = jnp.zeros(codes.shape, dense.dtype)
    for position in range(m):
        found = jnp.where(codes == position, groups[:, position, None], found)
    return found.reshape(entries, columns)


def matmul(x, values, indices, n: int, m: int):
    """`x @ W`: `(M, K)` to `(M, N)`."""
    return multiply(x, decompress(values, indices, n, m))
