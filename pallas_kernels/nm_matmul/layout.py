"""The layout of an N:M weight along its rows: values and packed indices, and the stretches in which both are whole.

Each column is stored by itself. In every group of m rows n values are kept, and entry i of a column, counted from
the top, has its position in its group in bits `[i b, (i + 1) b)` of the column's little-endian bit stream,
b = log2(m).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp


class Period(NamedTuple):
    """The shortest stretch of a column with whole groups and whole bytes: its entries, index bytes and rows."""

    entries: int
    bytes: int
    rows: int


def index_bits(m: int) -> int:
    """Bits of a position among m."""
    return m.bit_length() - 1


def index_bytes(entries: int, m: int) -> int:
    """Bytes that the positions of `entries` values take."""
    return -(-entries * index_bits(m) // 8)


def period(n: int, m: int, multiple: int = 1) -> Period:
    """The period of n:m weights whose index bytes come in a multiple of `multiple`."""
    bits = index_bits(m)
    entries = math.lcm(n, 8 * multiple // math.gcd(8 * multiple, bits))
    return Period(entries, entries * bits // 8, entries // n * m)


def entry_code(index_rows, entry: int, m: int):
    """The position of entry `entry` of a period, from its index bytes as a list of arrays of some integer dtype."""
    bits = index_bits(m)
    byte, shift = divmod(entry * bits, 8)
    code = index_rows[byte] >> shift if shift else index_rows[byte]
    if shift + bits > 8:
        code = code | (index_rows[byte + 1] << (8 - shift))
    return code & (m - 1)


def unpack(indices, entries: int, m: int):
    """Packed `(bytes, N)` to the positions `(entries, N)`, uint8."""
    bits, columns = index_bits(m), indices.shape[1]
    if 8 % bits == 0:
        shifts = (jnp.arange(8 // bits, dtype=jnp.uint8) * bits)[:, None]
        codes = (indices[:, None] >> shifts) & (m - 1)
        return codes.reshape(-1, columns)[:entries]
    whole = period(1, m)
    indices = jnp.pad(indices, ((0, -indices.shape[0] % whole.bytes), (0, 0)))
    index_rows = list(indices.reshape(-1, whole.bytes, columns).swapaxes(0, 1))
    codes = jnp.stack([entry_code(index_rows, entry, m) for entry in range(whole.entries)], axis=1)
    return codes.reshape(-1, columns)[:entries]
