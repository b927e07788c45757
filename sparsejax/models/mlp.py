"""Multilayer perceptron; the default is LeNet-300-100 (LeCun et al. 1998), usual in pruning papers."""

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import he_normal

from sparsejax import nn


class MLP(linen.Module):
    """ReLU network on flattened inputs.

    Attributes:
      classes: number of outputs.
      hidden: widths of the hidden layers, `dense_0`, `dense_1`, ...
      dtype: dtype of the computation, None for the inputs'.
    """

    classes: int
    hidden: tuple[int, ...] = (300, 100)
    dtype: str | None = None

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for inputs `(batch, ...)`; `train` has no effect."""
        x = x.reshape(len(x), -1)
        for i, width in enumerate(self.hidden):
            x = linen.relu(nn.Dense(width, kernel_init=he_normal(), dtype=self.dtype, name=f"dense_{i}")(x))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
