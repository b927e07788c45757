"""Exponentials as pairs of a mantissa and an integer exponent, and sums of them.

Exponents are kept as float32, in which they are exact. Entries beyond +-2**23, between which float32 has no fractions
left, count as +-2**23; minus infinity is exactly 0.
"""

import math

import jax.numpy as jnp
from jax import lax

# ln 2 in three parts; the first two have 8 bits, so that their products with integers of 12 bits are exact
_LN2 = (177 / 2**8, 228 / 2**17)
_LN2 = (*_LN2, math.log(2) - sum(_LN2))
_SERIES = tuple(1 / math.factorial(i) for i in range(7))
_LARGEST = 2.0**23
NOTHING = -(2.0**30)  # exponent of an empty sum: below any, and differences with it stay finite


def exponential(x):
    """exp(x) = m * 2**n for float32 x: m in [0.7, 1.5], or 0 for -inf, or NaN for NaN and +inf; n an integer."""
    empty, special = x == -jnp.inf, x - x  # 0, or NaN for what is not finite
    x = jnp.minimum(jnp.maximum(x, -_LARGEST), _LARGEST)
    n = jnp.round(x * (1 / math.log(2)))
    high = jnp.round(n * 2.0**-12) * 2.0**12  # two parts of at most 12 bits
    low = n - high
    t = (((x - high * _LN2[0]) - low * _LN2[0]) - high * _LN2[1]) - low * _LN2[1] - n * _LN2[2]
    # n may be off by one where x is large; then t in [-ln(2) / 2, ln(2) / 2], where the series is exact
    rest = jnp.round(t * (1 / math.log(2)))
    t, n = t - rest * math.log(2), n + rest
    m = jnp.full_like(t, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        m = m * t + coefficient
    return jnp.where(empty, 0.0, m + special), jnp.where(empty, NOTHING, n)


def power_of_two(n):
    """2**n for float32 integers n <= 0, exactly; 0 below -126."""
    bits = (jnp.maximum(n, -127.0) + 127.0).astype(jnp.int32) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def add(a, b):
    """Sum of two pairs."""
    exponent = jnp.maximum(a[1], b[1])
    return a[0] * power_of_two(a[1] - exponent) + b[0] * power_of_two(b[1] - exponent), exponent


def total(pair):
    """Sum of the pairs along the last axis, which stays with size 1."""
    exponent = pair[1].max(-1, keepdims=True)
    return (pair[0] * power_of_two(pair[1] - exponent)).sum(-1, keepdims=True), exponent


def ratio(pair, whole):
    """pair / whole, at most 1; 0 where the whole is nothing."""
    inverse = 1 / jnp.where(whole[0] == 0, 1.0, whole[0])
    return pair[0] * inverse * power_of_two(pair[1] - whole[1])
