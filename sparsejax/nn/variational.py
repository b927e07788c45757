"""Mean-field Gaussian layers: every weight is a normal posterior q(w) = N(mu, sigma^2).

`kernel` holds mu and `kernel_rho` holds rho with sigma = softplus(rho). With the RNG stream `sample`
(training) the layers draw their output instead of their weights (local reparametrisation, Kingma et al. 2015):

  y = x mu + b + sqrt(x^2 sigma^2) eps,   eps ~ N(0, 1) for every output of every example

and without it (evaluation) they compute with the means, as the plain layer does. The bias is a number.

One mask serves both leaves: sigma is zero, not softplus(0) = 0.693, wherever the mask of `kernel` is. The
layers can only do so if they see the masks: `model.apply({"params": params, "masks": masks}, x)`. A model
that contains them says so by the attribute `reads_masks = True`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype
from jax import lax

from sparsejax.bayes import inverse_softplus, standard_deviation
from sparsejax.masks import mask_weight
from sparsejax.nn.layers import MaskedParams


class Variational(MaskedParams):
    """What the mean-field layers share; a subclass has `kernel_shape(x)` and `product(x, kernel)`.

    Attributes:
      features: width of the output.
      use_bias: whether to add a bias, zero at initialisation.
      sigma: standard deviation of every weight at initialisation, positive.
      dtype: dtype of the computation, None for that of inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: of the means.
    """

    features: int
    use_bias: bool = True
    sigma: float = 6e-4
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = linen.initializers.lecun_normal()

    reads_masks: ClassVar[bool] = True

    def __post_init__(self):
        if not self.sigma > 0:
            raise ValueError(f"{type(self).__name__} needs a positive sigma, got {self.sigma}")
        super().__post_init__()

    @linen.compact
    def __call__(self, x):
        """The mean output, plus noise of each output's own deviation if there is a stream `sample`."""
        shape, start = self.kernel_shape(x), linen.initializers.constant(inverse_softplus(self.sigma))
        mean = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        rho = self.param("kernel_rho", start, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", linen.initializers.zeros, (self.features,), self.param_dtype)
        sigma = standard_deviation(rho).astype(rho.dtype)
        if self.has_variable("masks", "kernel"):
            sigma = mask_weight(sigma, self.get_variable("masks", "kernel"))
        x, mean, sigma, bias = promote_dtype(x, mean, sigma, bias, dtype=self.dtype)
        y = self.product(x, mean)
        y = y if bias is None else y + bias
        if not self.has_rng("sample"):
            return y
        noise = jax.random.normal(self.make_rng("sample"), y.shape, y.dtype)
        return y + _sqrt(self.product(x**2, sigma**2)) * noise


class VariationalDense(Variational):
    """Mean-field `flax.linen.Dense`: `(..., inputs) -> (..., features)`."""

    def kernel_shape(self, x):
        """(inputs, features)."""
        return (x.shape[-1], self.features)

    def product(self, x, kernel):
        """`x @ kernel`."""
        return x @ kernel


class VariationalConv(Variational):
    """Mean-field `flax.linen.Conv` on images: `(batch, height, width, inputs) -> (..., features)`.

    Attributes:
      kernel_size: height and width of the window.
      strides: of the window, an int or one per axis.
      padding: "SAME", "VALID" or pairs of ints, as for `jax.lax.conv_general_dilated`.
    """

    kernel_size: Sequence[int] = (3, 3)
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"

    def kernel_shape(self, x):
        """(height, width, inputs, features)."""
        return (*self.kernel_size, x.shape[-1], self.features)

    def product(self, x, kernel):
        """The convolution of `x` with `kernel`."""
        strides = (self.strides,) * 2 if isinstance(self.strides, int) else tuple(self.strides)
        return lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def _sqrt(variance):
    """The square root; at zero, where all weights of an output are masked, its gradient is zero."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
