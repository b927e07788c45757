"""Butterfly layers, and the factor chain of a Hankel operator (StNN, Aluvihare et al. 2025).

A butterfly factor of stage s has two entries in each row i, at i and at i xor 2^s:

  (B_s x)[i] = own[s, i] x[i] + other[s, i] x[i xor 2^s],       n a power of two, s = 0 ... log2(n) - 1

The product of all stages on bit-reversed input is a dense n x n matrix with 2 n log2(n) entries to train, under
this fixed pattern of zeros. It can be the discrete Fourier transform (the fast one, of Cooley and Tukey).

StNN: with F the unitary transform of length 2n, J the reversal, P zero padding and Q the cut to outputs n - 1 to
2n - 2, a Hankel matrix is

  H = sqrt(2n) Q F^* diag(c) F P J,       H[j, i] = h[i + j],       c = F h

of which c is trained (of the size of h, so that an optimizer's step moves the matrix as much as a step on h
would), and with `train_factors` the entries of all butterfly factors of F and F^* too, which start as those of
the transform.

A layer has n inputs: a power of two, except that StNN without `train_factors` uses a library's transform of any
length. More outputs than that are those of several n x n matrices, of which the last may be cut; for fewer, the
one matrix is cut.

Departures: the paper's weights are complex; here they are pairs of real numbers, real parts first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from sparsejax.nn.factorised import FactorisedLinear, with_bias
from sparsejax.nn.structured import transform_macs


def fourier_factors(size: int, inverse: bool = False) -> np.ndarray:
    """The butterfly factors of the unitary discrete Fourier transform, complex64 `(log2(size), 2, size)`.

    Args:
      size: a power of two; `butterfly_matmul(x, fourier_factors(size)) * sqrt(size)` is `fft(x)`.
      inverse: those of the inverse transform.
    """
    _check_power_of_two(size)
    factors = np.empty((size.bit_length() - 1, 2, size), np.complex64)
    for stage in range(len(factors)):
        half = 1 << stage
        twiddles = np.exp((1 if inverse else -1) * 1j * np.pi * np.arange(half) / half)
        factors[stage, 0] = np.tile(np.concatenate([np.ones(half), -twiddles]), size // (2 * half))
        factors[stage, 1] = np.tile(np.concatenate([twiddles, np.ones(half)]), size // (2 * half))
    return factors / np.float32(np.sqrt(2))


def _check_power_of_two(size: int) -> None:
    if size < 2 or size & (size - 1):
        raise ValueError(f"butterfly factors need a power of two, got size {size}")


def butterfly_matmul(x, factors):
    """The product of all factors, the first one first, with x in bit-reversed order.

    Args:
      x: `(..., n)`, n a power of two.
      factors: `(log2(n), 2, ..., n)`, real or complex: the entries `own` and `other` of the module's equation;
        further axes are broadcast against those of x.
    """
    _check_power_of_two(x.shape[-1])
    x = x[..., _bit_reversal(x.shape[-1])]
    for stage, (own, other) in enumerate(factors):
        pairs = x.reshape(*x.shape[:-1], -1, 2, 1 << stage)
        x = own * x + other * jnp.flip(pairs, -2).reshape(x.shape)
    return x


class _Stack(FactorisedLinear):
    """A Dense whose outputs are those of one or more n x n matrices, n the number of inputs."""

    def product(self, x, *kernels):
        """`x W`."""
        return self._apply(x, *kernels)

    @linen.nowrap
    def to_dense(self, variables) -> dict[str, jax.Array]:
        """The `kernel` and `bias` of the Dense that equals a layer with these variables."""
        params = variables["params"]
        kernels = [params[name] for name in ("kernel", "butterfly_kernel") if name in params]
        identity = jnp.eye(self._inputs(kernels[0]), dtype=kernels[0].dtype)
        return with_bias({"kernel": self._apply(identity, *kernels)}, params)

    @linen.nowrap
    def _stacks(self, inputs: int) -> int:
        return -(-self.features // inputs)

    @linen.nowrap
    def _check(self, inputs: int) -> None:
        if inputs < 2 or inputs & (inputs - 1):
            raise ValueError(
                f"{self.label}: butterfly factors need a power of two, but it maps {inputs} inputs to "
                f"{self.features} outputs"
            )

    @linen.nowrap
    def _cut(self, y, dtype):
        """The features of `(..., stacks, n)`; the real part of complex outputs."""
        return y.real.reshape(*y.shape[:-2], -1)[..., : self.features].astype(dtype)


class Butterfly(_Stack):
    """A Dense of butterfly products, with one parameter `kernel` and a bias.

    Real layers (`kernel` is `(log2 n, 2, stacks, n)`) start with a random rotation in every pair; complex ones
    (`(2, log2 n, 2, stacks, n)`) start as the Fourier transform and give the real part. Both keep the variance
    of the input.

    Attributes:
      complex: whether the entries are complex.

    Raises:
      ValueError: at `init`, one sentence that names the layer, if the inputs are no power of two.
    """

    complex: bool = False

    def factors(self, inputs: int):
        """The parameter `kernel`."""
        self._check(inputs)
        shape = (inputs.bit_length() - 1, 2, self._stacks(inputs), inputs)
        if self.complex:
            return (self.param("kernel", _fourier, (2, *shape), self.param_dtype),)
        return (self.param("kernel", _rotations, shape, self.param_dtype),)

    @linen.nowrap
    def macs(self, kernel, inputs: int) -> int:
        """One per entry of the factors, four per complex entry."""
        return 2 * kernel.size if self.complex else kernel.size

    @linen.nowrap
    def _apply(self, x, kernel):
        factors = _complex(kernel) if self.complex else kernel
        return self._cut(butterfly_matmul(x[..., None, :], factors), x.dtype)

    @linen.nowrap
    def _inputs(self, kernel) -> int:
        return kernel.shape[-1]


class StNN(_Stack):
    """A Dense of Hankel matrices, trained as the diagonals of their factor chains (see the module).

    Parameters: `kernel`, the diagonals c as `(2, stacks, n + 1)` (the other entries follow, because H is real),
    and `bias`. With `train_factors`, `kernel` is `(2, stacks, 2n)`, and `butterfly_kernel`, of shape
    `(2, 2, log2 2n, 2, 2n)`, holds the factors of F and those of F^*, shared by the stacks; the output is the
    real part, and W does not stay Hankel. W starts Hankel, with entries of variance 1 / inputs.

    Attributes:
      train_factors: whether the butterfly factors are trained too; the inputs must then be a power of two.

    Raises:
      ValueError: at `init`, one sentence that names the layer, if they are not.
    """

    train_factors: bool = False

    def factors(self, inputs: int):
        """The parameters `(kernel,)` or `(kernel, butterfly_kernel)`."""
        if self.train_factors:
            self._check(inputs)
        stacks, size = self._stacks(inputs), 2 * inputs
        length = size if self.train_factors else inputs + 1
        kernel = self.param("kernel", _hankel_spectrum, (2, stacks, length), self.param_dtype, inputs)
        if not self.train_factors:
            return (kernel,)
        shape = (2, 2, size.bit_length() - 1, 2, size)
        return kernel, self.param("butterfly_kernel", _transforms, shape, self.param_dtype)

    @linen.nowrap
    def macs(self, kernel, inputs: int) -> int:
        """Real transforms, one forward and one back per stack, and the products with c, three each.

        With trained factors four multiply-adds per complex entry, those of F^* in every stack.
        """
        stacks, length = self._stacks(inputs), kernel.shape[-1]
        if not self.train_factors:
            return round((1 + stacks) * transform_macs(2 * inputs) + 3 * stacks * length)
        return 2 * kernel.size if kernel.ndim == 3 else (1 + stacks) * kernel.size

    @linen.nowrap
    def _apply(self, x, kernel, butterflies=None):
        n = x.shape[-1]
        diagonal = np.float32(np.sqrt(2 * n)) * _complex(kernel)
        reversed_x = x[..., None, ::-1].astype(diagonal.real.dtype)
        if butterflies is None:
            y = jnp.fft.irfft(diagonal * jnp.fft.rfft(reversed_x, 2 * n), 2 * n)
        else:
            forward, back = _complex(butterflies)
            padded = jnp.concatenate([reversed_x, jnp.zeros_like(reversed_x)], -1)
            y = butterfly_matmul(diagonal * butterfly_matmul(padded, forward), back)
        return self._cut(y[..., n - 1 : 2 * n - 1], x.dtype)

    @linen.nowrap
    def _inputs(self, kernel) -> int:
        return kernel.shape[-1] // 2 if self.train_factors else kernel.shape[-1] - 1


# --- pieces ------------------------------------------------------------------------------------------


def _complex(pair):
    """Complex numbers from `(2, ...)`, in float32 at least."""
    real, imaginary = pair.astype(jnp.promote_types(pair.dtype, jnp.float32))
    return jax.lax.complex(real, imaginary)


def _pair(values, dtype):
    return jnp.stack([values.real, values.imag]).astype(dtype)


def _rotations(key, shape, dtype):
    """Factors that rotate every pair by a random angle: their product is orthogonal."""
    factors = []
    for stage, stage_key in enumerate(jax.random.split(key, shape[0])):
        pairs = (*shape[2:-1], shape[-1] >> (stage + 1), 1, 1 << stage)
        angles = jax.random.uniform(stage_key, pairs, jnp.float32, 0, 2 * np.pi)
        own = jnp.broadcast_to(jnp.cos(angles), (*pairs[:-2], 2, pairs[-1]))
        other = jnp.sin(angles) * jnp.array([[-1.0], [1.0]])
        factors.append(jnp.stack([own.reshape(shape[2:]), other.reshape(shape[2:])]))
    return jnp.stack(factors).astype(dtype)


def _fourier(key, shape, dtype):
    """The factors of the Fourier transform, scaled so that the real part keeps the variance."""
    del key
    factors = fourier_factors(shape[-1]) * 2 ** (0.5 / shape[1])
    return jnp.broadcast_to(_pair(factors, dtype)[..., None, :], shape)


def _hankel_spectrum(key, shape, dtype, inputs: int):
    """c of Hankel matrices whose entries are normal of variance 1 / inputs."""
    entries = jax.random.normal(key, (shape[1], 2 * inputs - 1)) * inputs**-0.5
    return _pair(jnp.fft.fft(entries, 2 * inputs, norm="ortho")[:, : shape[-1]], dtype)


def _transforms(key, shape, dtype):
    del key
    chain = [fourier_factors(shape[-1]), fourier_factors(shape[-1], inverse=True)]
    return _pair(jnp.asarray(np.stack(chain)), dtype)


def _bit_reversal(size: int) -> np.ndarray:
    order = np.zeros(1, np.int64)
    while len(order) < size:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


__all__ = ["Butterfly", "StNN", "butterfly_matmul", "fourier_factors"]
