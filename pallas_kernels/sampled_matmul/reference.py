"""Products at sampled positions by way of the whole product: the oracle."""

import jax.numpy as jnp

from pallas_kernels.sums import matmul


def sampled(a, b, rows, cols):
    """`(a @ b)[rows, cols]`."""
    return matmul(a, b)[rows, cols]


def block_sampled(x, g, indices, block: tuple[int, int]):
    """The stored blocks of `x.T @ g`: `(T, M)` and `(T, N)` to `(N / bn, L, bm, bn)`."""
    (height, width), columns = block, jnp.arange(indices.shape[0])[:, None]
    whole = matmul(x.T, g).reshape(-1, height, g.shape[1] // width, width).transpose(0, 2, 1, 3)
    found = whole[jnp.maximum(indices, 0), columns]
    return jnp.where((indices >= 0)[..., None, None], found, 0)
