"""The precision in which operations add up: at least float32."""

import jax.numpy as jnp


def sum_dtype(dtype):
    """The dtype of sums of products in `dtype`: float64 for that, float32 for shorter ones."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul(a, b):
    """`a @ b` for two arrays of one dtype, in which the result is returned."""
    return jnp.matmul(a, b, preferred_element_type=sum_dtype(a.dtype)).astype(a.dtype)
