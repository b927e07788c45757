"""Group-quantised sparse arrays: groups of G consecutive inputs of an output are dropped, or kept in 4 bits.

By outputs, as block-CSR with blocks of 1 x G weights of the transposed kernel (out, in). Group e of `nnz`:

  indptr  (out + 1,) int32       output r holds groups `indptr[r]` up to `indptr[r + 1]`
  groups  (nnz,) uint16 if in / G <= 2**16, else int32    which group of inputs, ascending for each output
  codes   (nnz, G / 2) uint8     two codes of 0 ... 15 a byte, the first in the low half
  scales, zeros  (nnz,) float    weight = scale (code - zero), in the dtype of the scales

The format does not hold any weights, only such; it is what GQSA (Zeng et al. 2025) stores. Its product cuts the kept
groups, whatever output they are of, into chunks of one size, so that outputs with many groups hold up no others.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.formats.base import Packed, expect, is_traced, register, static
from sparsejax.formats.csr import input_dtype, starts

CHUNK = 1024  # groups of a product that are unpacked at a time


@register
class GroupQuantisedArray(Packed):
    """A kernel `(in, out)` in groups of 4-bit codes; see the module for the layout.

    Attributes:
      scales, zeros: of the kept groups.
      codes: packed.
      groups, indptr: which they are.
      shape: (in, out).
      group: G.
    """

    scales: jnp.ndarray
    zeros: jnp.ndarray
    codes: jnp.ndarray
    groups: jnp.ndarray
    indptr: jnp.ndarray
    shape: tuple[int, ...] = static()
    group: int = static()

    NAME = "group_quantised"
    DATA = "scales"

    @property
    def format(self):
        return f"group_quantised:{self.group}"

    @property
    def data(self):
        """`scales`: like them, gradients are per group."""
        return self.scales

    @classmethod
    def from_codes(cls, codes, scale, zero, keep, *, name: str = "weight"):
        """Packs the groups that `keep` keeps; host only.

        Args:
          codes: integers 0 ... 15, `(in, out)`.
          scale, zero: float `(in / G, out)`; weight = scale (code - zero).
          keep: bool `(in / G, out)`.
          name: what errors call the weight.

        Raises:
          ValueError: under `jax.jit`; for codes that are no integers or that 4 bits do not hold, or shapes that do not
            fit with an even G.
        """
        if is_traced(codes, scale, zero, keep):
            raise ValueError(
                f"{name} cannot be packed inside jax.jit, where the count of kept groups is unknown"
            )
        codes, scale, zero, keep = map(np.asarray, (codes, scale, zero, keep))
        rows = len(keep)
        group = codes.shape[0] // max(rows, 1)
        if codes.ndim != 2 or not rows or group * rows != codes.shape[0] or group % 2:
            raise ValueError(
                f"{rows} groups do not divide the inputs of {name} of shape {codes.shape} into groups of even size"
            )
        for field, array in (("scale", scale), ("zero", zero), ("keep", keep)):
            expect(name, field, array, (rows, codes.shape[1]))
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes of {name} must be integers, got {codes.dtype}")
        if codes.size and not 0 <= codes.min() <= codes.max() <= 15:
            raise ValueError(
                f"codes of {name} must be 0 ... 15, but range from {codes.min()} to {codes.max()}"
            )
        outputs, groups = np.nonzero(keep.T)
        kept = codes.reshape(rows, group, -1)[groups, :, outputs]
        return cls(
            jnp.asarray(scale[groups, outputs]),
            jnp.asarray(zero[groups, outputs]),
            pack_int4(jnp.asarray(kept)),
            jnp.asarray(groups.astype(input_dtype(rows))),
            jnp.asarray(starts(outputs, codes.shape[1]).astype(np.int32)),
            tuple(codes.shape),
            group,
        )

    def to_codes(self):
        """`(codes, scale, zero, keep)` as `from_codes` takes them; dropped groups have 0, 1, 0, False."""
        where = (self.groups.astype(jnp.int32), self._outputs())
        grid = (self.shape[0] // self.group, self.shape[1])
        codes = jnp.zeros((grid[0], self.shape[1], self.group), jnp.uint8)
        codes = codes.at[where].set(unpack_int4(self.codes)).swapaxes(1, 2).reshape(self.shape)
        scale = jnp.ones(grid, self.dtype).at[where].set(self.scales)
        zero = jnp.zeros(grid, self.zeros.dtype).at[where].set(self.zeros)
        return codes, scale, zero, jnp.zeros(grid, bool).at[where].set(True)

    def to_dense(self):
        return self._scatter(_weights(self.scales, self.zeros, self.codes))

    def mask(self):
        return self._scatter(jnp.ones((len(self.groups), self.group), bool))

    def _scatter(self, stored):
        dense = jnp.zeros((self.shape[0] // self.group, self.shape[1], self.group), stored.dtype)
        dense = dense.at[self.groups.astype(jnp.int32), self._outputs()].set(stored)
        return dense.swapaxes(1, 2).reshape(self.shape)

    def _outputs(self):
        """The output of each group, int32 `(nnz,)`; jit-safe."""
        outputs = jnp.arange(self.shape[1], dtype=jnp.int32)
        return jnp.repeat(outputs, jnp.diff(self.indptr), total_repeat_length=len(self.groups))

    def check(self, name="array"):
        inputs, outputs = self.shape
        stored = len(self.groups)
        if self.group < 2 or self.group % 2 or inputs % self.group:
            raise ValueError(
                f"groups of {self.group} inputs do not fit the {inputs} inputs of {name} in bytes"
            )
        rows = inputs // self.group
        expect(name, "scales", self.scales, (stored,))
        expect(name, "zeros", self.zeros, (stored,))
        expect(name, "codes", self.codes, (stored, self.group // 2), "uint8")
        expect(name, "groups", self.groups, (stored,), str(input_dtype(rows)))
        expect(name, "indptr", self.indptr, (outputs + 1,), "int32")
        indptr, groups = np.asarray(self.indptr), np.asarray(self.groups).astype(np.int64)
        if indptr[0] != 0 or indptr[-1] != stored or (np.diff(indptr) < 0).any():
            raise ValueError(f"indptr of {name} must ascend from 0 to its {stored} groups")
        position = np.repeat(np.arange(outputs), np.diff(indptr)) * rows + groups
        if (groups < 0).any() or (groups >= rows).any() or (np.diff(position) <= 0).any():
            raise ValueError(f"groups of {name} must ascend for each output and lie between 0 and {rows - 1}")


def group_quantised_matmul(x, w: GroupQuantisedArray, *, chunk: int = CHUNK):
    """`x @ w.to_dense()` from the packed form, `chunk` groups at a time; jit-safe and differentiable.

    Args:
      x: `(..., in)`.
      w: the kernel.
      chunk: groups that are unpacked at once; their inputs take chunk x G x batch numbers, their products chunk x
        batch.

    Returns:
      `(..., out)` of the dtype that x and the scales promote to; sums are in float32 at least.
    """
    dtype = jnp.promote_types(x.dtype, w.dtype)
    exact = jnp.promote_types(dtype, jnp.float32)
    stored, outputs = len(w.groups), w.shape[1]
    y = jnp.zeros((outputs, math.prod(x.shape[:-1])), exact)
    if stored:
        chunk = min(chunk, stored)
        inputs = x.reshape(y.shape[1], w.shape[0]).T.astype(exact)
        inputs = inputs.reshape(w.shape[0] // w.group, w.group, y.shape[1])
        leaves = (w.scales, w.zeros, w.codes, w.groups.astype(jnp.int32), w._outputs())
        pads = (0, 0, 0, 0, outputs - 1)  # groups of scale 0, which keep the outputs sorted
        leaves = [_chunks(leaf, chunk, pad) for leaf, pad in zip(leaves, pads, strict=True)]

        def add(y, leaves):
            *packed, groups, output = leaves
            weights = _weights(*packed).astype(exact)
            products = jnp.einsum("cg,cgb->cb", weights, inputs[groups])
            return y.at[output].add(products, indices_are_sorted=True), None

        y = lax.scan(add, y, leaves)[0]
    return y.T.reshape(*x.shape[:-1], outputs).astype(dtype)


def _weights(scales, zeros, codes):
    """scale (code - zero) in the dtype of the scales, computed in float32 at least: `(nnz, G)`."""
    exact = jnp.promote_types(scales.dtype, jnp.float32)
    weights = scales.astype(exact)[:, None] * (
        unpack_int4(codes).astype(exact) - zeros.astype(exact)[:, None]
    )
    return weights.astype(scales.dtype)


def _chunks(leaf, size: int, pad):
    """`(chunks, size, ...)`, the last one filled up with `pad`."""
    widths = [(0, -len(leaf) % size)] + [(0, 0)] * (leaf.ndim - 1)
    return jnp.pad(leaf, widths, constant_values=pad).reshape(-1, size, *leaf.shape[1:])


def pack_int4(codes):
    """Two codes of 0 ... 15 a byte along the last axis, the first in the low half: uint8 `(..., n / 2)`.

    Raises:
      ValueError: if the last axis is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"codes are packed two a byte, but the last axis of {codes.shape} is odd")
    codes = codes.astype(jnp.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_int4(packed):
    """The codes of `pack_int4`: uint8 `(..., 2 n)`."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
