"""N:M sparse arrays: of every M consecutive weights along axis -2, N are stored.

For a matrix view (K, N_out) with E = K / M * N stored weights per column:

  values   (E, N_out)                   the kept weights of each group, in order of position
  indices  (ceil(E b / 8), N_out) uint8  their positions inside the group, b = log2(M) bits each: entry i of a
                                        column is bits [i b, (i+1) b) of the little-endian bit stream of the column

2:4 in bfloat16 takes 1 + 1/8 bytes per dense weight of 2. Groups lie along axis -2 of the weight, the contracted
one; since that axis is the fastest of the rows, they are also consecutive rows of the matrix view.
"""

import jax.numpy as jnp
import numpy as np

from sparsejax.formats.base import (
    Packed,
    check_pair,
    check_shape,
    expect,
    index_of,
    inner_rows,
    is_traced,
    on_host,
    register,
    static,
)

SIZES = (2, 4, 8, 16, 32)  # group sizes that `find_nm` tries
_MAX_M = 256  # a position is at most one byte


@register
class NMArray(Packed):
    """An array with `n` of every `m` consecutive weights along axis -2; see the module for the layout.

    Attributes:
      values: the kept weights.
      indices: uint8, their packed positions.
      shape: the dense shape.
      n, m: the pattern; m is a power of two from 2 to 256.
    """

    values: jnp.ndarray
    indices: jnp.ndarray
    shape: tuple[int, ...] = static()
    n: int = static()
    m: int = static()

    NAME = "nm"
    DATA = "values"

    @property
    def format(self):
        return f"{self.n}:{self.m}"

    @property
    def data(self):
        """`values`."""
        return self.values

    @classmethod
    def from_dense(cls, w, mask, *, n: int | None = None, m: int | None = None, name: str = "weight"):
        """Packs the weights that `mask` keeps.

        Args:
          w: array of any dtype with at least two axes.
          mask: bool (or soft) array of the same shape with exactly `n` of every `m` kept.
          n, m: the pattern; without them, the one with the smallest `m` of `SIZES` is found.
          name: what errors call the weight.

        Under `jax.jit`, n and m must be given, and the mask is not checked: a group that keeps fewer than n
        stores other weights of the group in their place, one that keeps more loses the last.

        Raises:
          ValueError: if the mask is not N:M, naming the first group in which it is not.
        """
        if (n is None) != (m is None):
            raise ValueError(f"N:M packing of {name} needs both n and m or neither, got n={n} and m={m}")
        if is_traced(w, mask):
            return cls._from_traced(w, mask, n, m, name)
        shape = np.shape(w)
        w, mask = on_host(w, mask, name, "N:M")
        if n is None:
            found = find_nm(mask, inner_rows(shape))
            if found is None:
                raise ValueError(_why_not(mask, shape, name))
            n, m = found
        counts = _counts(mask, shape, n, m, name)
        if (wrong := counts != n).any():
            group, column = np.unravel_index(np.argmax(wrong), wrong.shape)
            raise ValueError(
                f"{name} is not {n}:{m} along axis -2: the {m} weights from {index_of(group * m, column, shape)} "
                f"keep {counts[group, column]}"
            )
        groups = mask.reshape(-1, m, shape[-1]).swapaxes(1, 2)
        positions = (np.flatnonzero(groups) % m).reshape(-1, shape[-1], n).swapaxes(1, 2)
        return cls._gather(np, w, positions, shape, m)

    @classmethod
    def _from_traced(cls, w, mask, n, m, name):
        if n is None:
            raise ValueError(f"{name} can be packed inside jax.jit only as N:M with n and m given")
        w, mask = jnp.asarray(w), jnp.asarray(mask)
        check_pair(w, mask, name)
        _check_divides(w.shape, n, m, name)
        if mask.dtype != bool:
            w, mask = w * mask.astype(w.dtype), mask != 0
        rank = jnp.cumsum(mask.reshape(-1, m, w.shape[-1]), axis=1, dtype=jnp.int32)
        positions = jnp.stack([jnp.argmax(rank == j + 1, axis=1) for j in range(n)], axis=1)
        return cls._gather(jnp, w, positions, w.shape, m)

    @classmethod
    def _gather(cls, xp, w, positions, shape, m):
        """From the positions of the kept weights, `(K / m, n, N_out)`, with `xp` numpy or `jax.numpy`."""
        values = xp.take_along_axis(w.reshape(-1, m, shape[-1]), positions, axis=1).reshape(-1, shape[-1])
        packed = pack_bits(positions.reshape(values.shape).astype(xp.uint8), _bits(m), xp)
        return cls(jnp.asarray(values), jnp.asarray(packed), tuple(shape), positions.shape[1], int(m))

    def positions(self):
        """The position of each stored weight inside its group, uint8 of the shape of `values`."""
        return unpack_bits(self.indices, _bits(self.m), self.values.shape[0])

    def _scatter(self, stored, background):
        """Dense array with `stored[i]` at the position of entry i; selects only, so that every bit survives."""
        k, columns = self.matrix_shape
        grouped = (k // self.m, self.n, columns)
        stored, positions = stored.reshape(grouped), self.positions().reshape(grouped)
        place = jnp.arange(self.m, dtype=jnp.uint8)[:, None]
        dense = jnp.full((k // self.m, self.m, columns), background)
        for j in range(self.n):
            dense = jnp.where(positions[:, j : j + 1] == place, stored[:, j : j + 1], dense)
        return dense.reshape(self.shape)

    def to_dense(self):
        return self._scatter(self.values, jnp.zeros((), self.dtype))

    def mask(self):
        return self._scatter(jnp.ones(self.values.shape, bool), False)

    def check(self, name="array"):
        check_shape(self.shape, name)
        _check_divides(self.shape, self.n, self.m, name)
        k, columns = self.matrix_shape
        entries = k // self.m * self.n
        expect(name, "values", self.values, (entries, columns))
        expect(name, "indices", self.indices, (-(-entries * _bits(self.m) // 8), columns), "uint8")
        positions = np.asarray(self.positions()).astype(np.int32).reshape(-1, self.n, columns)
        if (np.diff(positions, axis=1) <= 0).any():
            raise ValueError(f"indices of {name} do not ascend inside every group of {self.format}")


def pack_bits(entries, bits: int, xp=jnp):
    """`bits`-bit unsigned integers as little-endian bit streams, one per column.

    Args:
      entries: uint8 `(E, N)`, each below 2**bits.
      xp: `jax.numpy` or `numpy`.

    Returns:
      uint8 `(ceil(E bits / 8), N)`.
    """
    planes = entries[:, None] >> xp.arange(bits, dtype=xp.uint8)[:, None] & 1
    return xp.packbits(planes.reshape(len(entries) * bits, -1), axis=0, bitorder="little")


def unpack_bits(packed, bits: int, entries: int):
    """The inverse of `pack_bits`: uint8 `(entries, N)`; jit-safe."""
    planes = jnp.unpackbits(packed, axis=0, count=entries * bits, bitorder="little")
    planes = planes.reshape(entries, bits, packed.shape[1]) << jnp.arange(bits, dtype=jnp.uint8)[:, None]
    return jnp.sum(planes, axis=1, dtype=jnp.uint8)


def find_nm(mask, inner: int) -> tuple[int, int] | None:
    """The N:M pattern with the smallest M of `SIZES` that a mask obeys, or None; masks of n = 0 or m do not.

    Args:
      mask: bool numpy array `(K, N)`.
      inner: entries of axis -2 of the weight, which the group size must divide.
    """
    counts = mask.astype(np.uint8)
    for m in SIZES:
        if inner % m:
            return None
        counts = counts[0::2] + counts[1::2]
        if 0 < (n := int(counts[0, 0])) < m and (counts == n).all():
            return n, m
    return None


def _bits(m: int) -> int:
    return m.bit_length() - 1


def _counts(mask, shape, n, m, name):
    """How many weights each group keeps, `(K / m, N)`."""
    _check_divides(shape, n, m, name)
    return mask.reshape(-1, m, mask.shape[1]).sum(axis=1)


def _check_divides(shape, n, m, name):
    if not 2 <= m <= _MAX_M or m & (m - 1) or not 0 < n <= m:
        raise ValueError(
            f"{name} cannot be packed as {n}:{m}: m must be a power of two from 2 to {_MAX_M} and n from 1 to m"
        )
    if inner_rows(shape) % m:
        raise ValueError(
            f"{n}:{m} needs axis -2 of {name} to be divisible by {m}, but its shape is {tuple(shape)}"
        )


def _why_not(mask, shape, name) -> str:
    """The sentence for a mask that is N:M for no M of `SIZES`; a larger M allows all that smaller ones do."""
    sizes = [m for m in SIZES if inner_rows(shape) % m == 0]
    if not sizes:
        return f"N:M needs axis -2 of {name} to be even, but its shape is {tuple(shape)}"
    m = sizes[-1]
    counts = _counts(mask, shape, 1, m, name)
    tried = f"{name} is not N:M along axis -2 for M in {', '.join(map(str, sizes))}"
    if (counts == counts[0, 0]).all():
        return f"{tried}: it keeps {'all' if counts[0, 0] else 'none'} of its weights"
    group, column = np.unravel_index(np.argmax(counts != counts[0, 0]), counts.shape)
    return (
        f"{tried}: the {m} weights from {index_of(group * m, column, shape)} keep {counts[group, column]}, those "
        f"from {index_of(0, 0, shape)} {counts[0, 0]}"
    )
