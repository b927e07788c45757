"""Compressed sparse rows.

For a matrix view (K, N), as in scipy:

  data     (nnz,)                          the kept weights in row-major order
  columns  (nnz,) uint16 if N <= 2**16, else int32   their columns, ascending in each row
  indptr   (K + 1,) int32                  row i holds entries `indptr[i]` up to `indptr[i + 1]`

Kernels take `indices`, the columns as int32.
"""

import jax.numpy as jnp
import numpy as np

from sparsejax.formats.base import Packed, expect, on_host, register, static


@register
class CSRArray(Packed):
    """An array in compressed sparse rows; see the module for the layout.

    Attributes:
      data: the kept weights.
      columns: uint16 or int32, their columns.
      indptr: int32, where each row begins.
      shape: the dense shape.
    """

    data: jnp.ndarray
    columns: jnp.ndarray
    indptr: jnp.ndarray
    shape: tuple[int, ...] = static()

    NAME = "csr"
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
        w_host, mask_host = on_host(w, mask, name, "CSR")
        rows, columns = np.nonzero(mask_host)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(w_host)))])
        return cls.from_parts(w_host[mask_host], columns, indptr, np.shape(w))

    @classmethod
    def from_parts(cls, data, columns, indptr, shape):
        """The array of these leaves, as of scipy's CSR with sorted indices, in the dtypes of the format."""
        index = column_dtype(shape[-1])
        return cls(
            jnp.asarray(data), jnp.asarray(columns, index), jnp.asarray(indptr, np.int32), tuple(shape)
        )

    @property
    def indices(self):
        """The columns as int32."""
        return self.columns.astype(jnp.int32)

    def row_of_entries(self):
        """The row of each entry, int32 of the shape of `data`; jit-safe."""
        rows = jnp.arange(len(self.indptr) - 1, dtype=jnp.int32)
        return jnp.repeat(rows, jnp.diff(self.indptr), total_repeat_length=self.data.shape[0])

    def _scatter(self, stored):
        dense = jnp.zeros(self.matrix_shape, stored.dtype)
        where = dense.at[self.row_of_entries(), self.indices]
        return where.set(stored, unique_indices=True, indices_are_sorted=True).reshape(self.shape)

    def to_dense(self):
        return self._scatter(self.data)

    def mask(self):
        return self._scatter(jnp.ones(self.data.shape, bool))

    def check(self, name="array"):
        k, n = self.matrix_shape
        entries = self.data.size
        expect(name, "data", self.data, (entries,))
        expect(name, "columns", self.columns, (entries,), str(column_dtype(n)))
        expect(name, "indptr", self.indptr, (k + 1,), "int32")
        indptr, columns = np.asarray(self.indptr), np.asarray(self.columns).astype(np.int64)
        if indptr[0] != 0 or indptr[-1] != entries or (np.diff(indptr) < 0).any():
            raise ValueError(f"indptr of {name} must ascend from 0 to its {entries} entries")
        rows = np.repeat(np.arange(k), np.diff(indptr))
        if (columns < 0).any() or (columns >= n).any() or (np.diff(rows * n + columns) <= 0).any():
            raise ValueError(f"columns of {name} must ascend in each row and lie between 0 and {n - 1}")


def column_dtype(columns: int) -> np.dtype:
    """The dtype in which CSR stores the columns of a matrix with so many of them."""
    return np.dtype(np.uint16 if columns <= 2**16 else np.int32)
