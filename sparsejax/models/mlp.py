"""Multilayer perceptron; the default is LeNet-300-100 (LeCun et al. 1998), usual in pruning papers."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import he_normal

from sparsejax import nn
from sparsejax.models.widths import new_widths


class MLP(linen.Module):
    """ReLU network on flattened inputs.

    Attributes:
      classes: number of outputs.
      hidden: widths of the hidden layers, `dense_0`, `dense_1`, ...
      linear: which layer they are, see `sparsejax.nn.linear`; None for dense ones.
      dtype: dtype of the computation, None for the inputs'.
    """

    classes: int
    hidden: tuple[int, ...] = (300, 100)
    linear: Mapping | None = None
    dtype: str | None = None

    @property
    def reads_masks(self) -> bool:
        """Whether the layers need to know what is masked, instead of getting masked parameters."""
        return nn.reads_masks(self.linear)

    def narrowed(self, widths: Mapping[str, int]) -> "MLP":
        """The same network with hidden layers of other widths, by layer name."""
        names = [f"dense_{i}" for i in range(len(self.hidden))]
        return self.clone(hidden=new_widths(names, self.hidden, widths))

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for inputs `(batch, ...)`; `train` has no effect."""
        x = x.reshape(len(x), -1)
        for i, width in enumerate(self.hidden):
            layer = nn.linear(
                self.linear, width, kernel_init=he_normal(), dtype=self.dtype, name=f"dense_{i}"
            )
            x = linen.relu(layer(x))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
