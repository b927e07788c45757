"""Vectors with few non-zeros as a bitmap of their channels and the packed values.

Layout: a vector of D channels is ceil(D / 8) bytes, where bit c % 8 of byte c // 8, counted from the least
significant, says that channel c is stored, and `budget` values: those of the stored channels in order of the channel,
then zeros. The budget is the same for all vectors, so that every vector has its place and a new token is written in
place. A bfloat16 vector of 128 channels takes 16 + 2 * budget bytes, not 256.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packed(NamedTuple):
    """Packed vectors.

    Attributes:
      bitmap: (..., ceil(D / 8)) uint8.
      values: (..., budget).
    """

    bitmap: jax.Array
    values: jax.Array


def pack(x, budget: int) -> Packed:
    """The `budget` entries of largest magnitude of every vector (..., D), ties to the lower channel.

    Exact if no vector has more non-zeros than that. Zeros are never marked as stored.
    """
    x = jnp.asarray(x)
    if x.ndim < 1:
        raise ValueError("x must be vectors (..., D), but it is a single number")
    channels = x.shape[-1]
    if not 1 <= budget <= channels:
        raise ValueError(f"budget is {budget}; it must be from 1 to the {channels} channels")
    chosen = jax.lax.top_k(jnp.abs(x), budget)[1]
    stored = jnp.put_along_axis(jnp.zeros(x.shape, bool), chosen, True, axis=-1, inplace=False) & (x != 0)
    bits = jnp.pad(stored, [(0, 0)] * (x.ndim - 1) + [(0, -channels % 8)])
    first = jnp.argsort(~stored, axis=-1, stable=True)[..., :budget]  # the stored channels, then others
    values = jnp.take_along_axis(jnp.where(stored, x, 0), first, axis=-1)
    return Packed(jnp.packbits(bits, axis=-1, bitorder="little"), values)


def unpack(packed: Packed, channels: int):
    """The vectors (..., channels) with zeros where nothing is stored."""
    bits = jnp.unpackbits(packed.bitmap, axis=-1, count=channels, bitorder="little")
    place = jnp.cumsum(bits, axis=-1, dtype=jnp.int32) - 1
    values = jnp.take_along_axis(packed.values, jnp.clip(place, 0, packed.values.shape[-1] - 1), axis=-1)
    return jnp.where(bits == 1, values, 0)
