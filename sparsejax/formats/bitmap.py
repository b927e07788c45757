"""Bitmap arrays: one bit per weight and the kept weights in a row.

For a matrix view (K, N):

  data    (nnz,)                        the kept weights in row-major order
  bitmap  (ceil(K N / 8),) uint8         the row-major mask, little-endian: entry i is bit i % 8 of byte i // 8
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.formats.base import Packed, check_shape, expect, on_host, register, static


@register
class BitmapArray(Packed):
    """An array that stores its mask as bits; see the module for the layout.

    Attributes:
      data: the kept weights.
      bitmap: uint8, the mask.
      shape: the dense shape.
    """

    data: jnp.ndarray
    bitmap: jnp.ndarray
    shape: tuple[int, ...] = static()

    NAME = "bitmap"
    DATA = "data"

    @classmethod
    def from_dense(cls, w, mask, *, name: str = "weight"):
        """Packs the weights that `mask` keeps.

        Args:
          w: array of any dtype with at least one axis.
          mask: bool (or soft) array of the same shape.
          name: what errors call the weight.

        Raises:
          ValueError: under `jax.jit`.
        """
        w_host, mask_host = on_host(w, mask, name, "a bitmap")
        bitmap = np.packbits(mask_host.ravel(), bitorder="little")
        return cls(jnp.asarray(w_host[mask_host]), jnp.asarray(bitmap), tuple(np.shape(w)))

    def _bits(self):
        """Bool, 8 for each byte of the bitmap."""
        return jnp.unpackbits(self.bitmap, bitorder="little").reshape(-1, 8).astype(bool)

    def to_dense(self):
        """The dense array: every entry looks up its rank among the kept ones, in bytes and inside its byte."""
        if not self.data.shape[0]:
            return jnp.zeros(self.shape, self.dtype)
        per_byte = lax.population_count(self.bitmap).astype(jnp.int32)
        below = (jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8)) - 1  # the bits before each
        inside = lax.population_count(self.bitmap[:, None] & below)
        rank = (jnp.cumsum(per_byte) - per_byte)[:, None] + inside
        kept = self.data.at[rank].get(mode="clip", indices_are_sorted=True)
        dense = jnp.where(self._bits(), kept, jnp.zeros((), self.dtype))
        return dense.ravel()[: self.size].reshape(self.shape)

    def mask(self):
        return self._bits().ravel()[: self.size].reshape(self.shape)

    def check(self, name="array"):
        check_shape(self.shape, name)
        expect(name, "bitmap", self.bitmap, (-(-self.size // 8),), "uint8")
        bits = np.unpackbits(np.asarray(self.bitmap), bitorder="little")
        if bits[self.size :].any():
            raise ValueError(f"the bitmap of {name} has bits set beyond its {self.size} entries")
        expect(name, "data", self.data, (int(bits.sum()),))
