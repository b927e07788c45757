"""Products with an N:M weight by way of the dense weight: the oracle."""

import jax
import jax.numpy as jnp

from pallas_kernels.sums import matmul as multiply


def dense(values, indices, n: int, m: int):
    """The dense weight `(K, N)` of an N:M one."""
    entries, columns = values.shape
    bits = m.bit_length() - 1
    stream = jnp.unpackbits(indices, axis=0, bitorder="little")[: entries * bits]
    codes = jnp.einsum(
        "ebc,b->ec", stream.reshape(entries, bits, columns).astype(jnp.int32), 2 ** jnp.arange(bits)
    )
    kept = jax.nn.one_hot(codes, m, axis=1, dtype=values.dtype)  # (entries, m, N)
    groups = (kept * values[:, None]).reshape(entries // n, n, m, columns)
    return groups.sum(1).reshape(-1, columns)


def matmul(x, values, indices, n: int, m: int):
    """`x @ W`: `(M, K)` to `(M, N)`."""
    return multiply(x, dense(values, indices, n, m))
