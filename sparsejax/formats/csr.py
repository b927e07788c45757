"""Compressed sparse rows, one for each output: the CSR of the transposed matrix view (N, K).

As kernels for `x @ w` want it (Elsen et al. 2020, Fast Sparse ConvNets), so that an output is one sum:

  data     (nnz,)                           the kept weights, by column of the matrix view
  inputs   (nnz,) uint16 if K <= 2**16, else int32   their rows in it, ascending for each column
  indptr   (N + 1,) int32                   column j holds entries `indptr[j]` up to `indptr[j + 1]`

Kernels take `indices`, the inputs as int32. `sparsejax.formats.to_scipy` gives the CSR of the matrix view itself.
"""

import jax.numpy as jnp
import numpy as np

from sparsejax.formats.base import Packed, check_shape, expect, on_host, register, static


@register
class CSRArray(Packed):
    """An array in compressed sparse rows; see the module for the layout.

    Attributes:
      data: the kept weights.
      inputs: uint16 or int32, their rows in the matrix view.
      indptr: int32, where each output begins.
      shape: the dense shape.
    """

    data: jnp.ndarray
    inputs: jnp.ndarray
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
        outputs, inputs = np.nonzero(mask_host.T)
        return cls.from_parts(
            w_host.T[outputs, inputs], inputs, starts(outputs, w_host.shape[1]), np.shape(w)
        )

    @classmethod
    def from_parts(cls, data, inputs, indptr, shape):
        """The array of these leaves, as of scipy's CSR of the transposed matrix view, in the dtypes of the format."""
        index = input_dtype(np.prod(shape[:-1], dtype=int))
        return cls(jnp.asarray(data), jnp.asarray(inputs, index), jnp.asarray(indptr, np.int32), tuple(shape))

    @property
    def indices(self):
        """The inputs as int32."""
        return self.inputs.astype(jnp.int32)

    def output_of_entries(self):
        """The column of the matrix view of each entry, int32 of the shape of `data`; jit-safe."""
        outputs = jnp.arange(len(self.indptr) - 1, dtype=jnp.int32)
        return jnp.repeat(outputs, jnp.diff(self.indptr), total_repeat_length=self.data.shape[0])

    def _scatter(self, stored):
        dense = jnp.zeros(self.matrix_shape[::-1], stored.dtype)
        where = dense.at[self.output_of_entries(), self.indices]
        return where.set(stored, unique_indices=True, indices_are_sorted=True).T.reshape(self.shape)

    def to_dense(self):
        return self._scatter(self.data)

    def mask(self):
        return self._scatter(jnp.ones(self.data.shape, bool))

    def check(self, name="array"):
        check_shape(self.shape, name)
        k, n = self.matrix_shape
        entries = self.data.size
        expect(name, "data", self.data, (entries,))
        expect(name, "inputs", self.inputs, (entries,), str(input_dtype(k)))
        expect(name, "indptr", self.indptr, (n + 1,), "int32")
        indptr, inputs = np.asarray(self.indptr), np.asarray(self.inputs).astype(np.int64)
        if indptr[0] != 0 or indptr[-1] != entries or (np.diff(indptr) < 0).any():
            raise ValueError(f"indptr of {name} must ascend from 0 to its {entries} entries")
        outputs = np.repeat(np.arange(n), np.diff(indptr))
        if (inputs < 0).any() or (inputs >= k).any() or (np.diff(outputs * k + inputs) <= 0).any():
            raise ValueError(f"inputs of {name} must ascend for each output and lie between 0 and {k - 1}")


def starts(sorted_rows, count: int):
    """`(count + 1,)`: where each row begins among the ascending rows of entries, as in scipy's `indptr`."""
    return np.concatenate([[0], np.cumsum(np.bincount(sorted_rows, minlength=count))])


def input_dtype(inputs: int) -> np.dtype:
    """The dtype in which CSR stores positions among so many inputs."""
    return np.dtype(np.uint16 if inputs <= 2**16 else np.int32)
