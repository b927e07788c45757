"""Linear layers whose matrix is circulant, Toeplitz or Hankel, multiplied by FFT in O(n log n).

With parameters k, and A = W^T the matrix that maps inputs i to outputs j (y = A x):

  circulant  A[j, i] = k[(j - i) mod n]              n parameters, square
  Toeplitz   A[j, i] = k[j - i + inputs - 1]         inputs + features - 1 parameters
  Hankel     A[j, i] = k[i + j]                      inputs + features - 1 parameters

A circulant is F^* diag(F k) F with F the discrete Fourier transform, a Toeplitz matrix T is a corner of a
circulant of twice the size, and a Hankel matrix is H = T J with J the reversal of the input. H is the operator
of time-delay measurements in the structured network of Aluvihare et al. 2025, whose factor chain is
`sparsejax.nn.StNN`.

One such matrix may be too poor for a layer. With `block` the matrix is a grid of square blocks of that side,
each structured by itself (block-circulant, ...), which share the transforms of their inputs and outputs.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen

from sparsejax.nn.factorised import FactorisedLinear, with_bias


class _Structured(FactorisedLinear):
    """What the layers of this module share: the grid of blocks, the transforms and their cost."""

    block: int | None = None

    def factors(self, inputs: int):
        """The parameter `kernel`, `(inputs / block, features / block, length)`, of variance 1 / inputs."""
        (p, q), (rows, columns) = self._grid(inputs)
        init = linen.initializers.normal(inputs**-0.5)
        return (self.param("kernel", init, (p, q, self._length(rows, columns)), self.param_dtype),)

    def product(self, x, kernel):
        """`x W` by fast Fourier transforms, in float32 at least."""
        (p, _), (rows, columns) = self._grid(x.shape[-1])
        y = self._blocks(x.reshape(*x.shape[:-1], p, rows), kernel, columns)
        return y.reshape(*x.shape[:-1], self.features).astype(x.dtype)

    @linen.nowrap
    def to_dense(self, variables) -> dict[str, jax.Array]:
        """The `kernel` and `bias` of the Dense that equals a layer with these variables."""
        kernel = variables["params"]["kernel"]
        rows = self.block or self._rows(kernel.shape[-1])
        blocks = kernel[..., self._index(rows, self.block or self.features)]
        dense = blocks.swapaxes(1, 2).reshape(kernel.shape[0] * rows, self.features)
        return with_bias({"kernel": dense}, variables["params"])

    @linen.nowrap
    def macs(self, kernel, inputs: int) -> int:
        """One transform per block of inputs and of outputs, and their complex products; see `transform_macs`.

        A product of complex numbers is counted as three multiply-adds and the sum of two as one.

        The transforms of the kernel serve the whole batch and are left out.
        """
        (p, q), (rows, columns) = self._grid(inputs)
        size = self._size(rows, columns)
        return round((p + q) * transform_macs(size) + q * (4 * p - 1) * (size // 2 + 1))

    @linen.nowrap
    def _grid(self, inputs: int):
        """How many blocks there are along inputs and outputs, and the inputs and outputs of each."""
        if self.block is None:
            return (1, 1), (inputs, self.features)
        if (
            not isinstance(self.block, int)
            or self.block < 1
            or inputs % self.block
            or self.features % self.block
        ):
            raise ValueError(
                f"{self.label}: block={self.block} must be an integer that divides both its {inputs} inputs and {self.features} outputs"
            )
        return (inputs // self.block, self.features // self.block), (self.block, self.block)

    # --- what a structure defines, for one block of `rows` inputs and `columns` outputs ---------------

    def _blocks(self, x, kernel, columns: int):
        """`(..., p, rows), (p, q, length) -> (..., q, columns)`."""
        raise NotImplementedError

    @linen.nowrap
    def _index(self, rows: int, columns: int):
        """The entry of the kernel at every place of W: ints `(rows, columns)`."""
        raise NotImplementedError

    @linen.nowrap
    def _length(self, rows: int, columns: int) -> int:
        return rows + columns - 1

    @linen.nowrap
    def _rows(self, length: int) -> int:
        return length - self.features + 1

    @linen.nowrap
    def _size(self, rows: int, columns: int) -> int:
        """Length of the transforms."""
        return rows + columns


class Circulant(_Structured):
    """A Dense with a circulant matrix: `kernel` is the first column, as of `scipy.linalg.circulant`.

    Attributes:
      block: side of square circulant blocks; None for one, which needs as many features as inputs.

    Raises:
      ValueError: at `init`, one sentence that names the layer, for sizes that do not fit.
    """

    @linen.nowrap
    def _grid(self, inputs):
        if self.block is None and inputs != self.features:
            raise ValueError(
                f"{self.label}: a circulant is square, but {inputs} inputs and {self.features} outputs differ; "
                "give a block that divides both"
            )
        return super()._grid(inputs)

    def _blocks(self, x, kernel, columns):
        return _convolve(x, kernel, columns)

    @linen.nowrap
    def _index(self, rows, columns):
        return (jnp.arange(columns) - jnp.arange(rows)[:, None]) % rows

    @linen.nowrap
    def _length(self, rows, columns):
        return rows

    @linen.nowrap
    def _rows(self, length):
        return length

    @linen.nowrap
    def _size(self, rows, columns):
        return rows


class Toeplitz(_Structured):
    """A Dense with a Toeplitz matrix, `scipy.linalg.toeplitz(k[inputs - 1:], k[inputs - 1::-1])`.

    Attributes:
      block: side of square Toeplitz blocks; None for one, of any shape.

    Raises:
      ValueError: at `init`, one sentence that names the layer, if the block does not divide its sizes.
    """

    def _blocks(self, x, kernel, columns):
        # Products that wrap around end on the first `rows - 1` outputs, which are not among those wanted.
        rows = x.shape[-1]
        return _convolve(x, kernel, rows + columns)[..., rows - 1 : rows - 1 + columns]

    @linen.nowrap
    def _index(self, rows, columns):
        return jnp.arange(columns) - jnp.arange(rows)[:, None] + rows - 1


class Hankel(Toeplitz):
    """A Dense with a Hankel matrix, `scipy.linalg.hankel(k[:features], k[features - 1:])`; see `Toeplitz`."""

    def _blocks(self, x, kernel, columns):
        return super()._blocks(x[..., ::-1], kernel, columns)

    @linen.nowrap
    def _index(self, rows, columns):
        return jnp.arange(columns) + jnp.arange(rows)[:, None]


def transform_macs(size: int) -> float:
    """Multiply-adds of a real FFT: half of the usual 2.5 n log2 n operations."""
    return 1.25 * size * math.log2(size) if size > 1 else 0.0


def _convolve(x, kernel, size: int):
    """Circular convolutions of length `size`, summed over the blocks of inputs.

    `(..., p, rows), (p, q, length) -> (..., q, size)`.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    spectrum = jnp.fft.rfft(x.astype(wide), size)
    transfer = jnp.fft.rfft(kernel.astype(wide), size)
    return jnp.fft.irfft(jnp.einsum("...pf,pqf->...qf", spectrum, transfer), size)


__all__ = ["Circulant", "Hankel", "Toeplitz", "transform_macs"]
