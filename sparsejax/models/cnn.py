"""A small convolutional network, cheap enough for many seeds on a CPU."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import he_normal

from sparsejax import nn
from sparsejax.models.widths import new_widths


class CNN(linen.Module):
    """3x3 convolutions of stride 2 without padding, then a dense hidden layer and the head.

    Strides rather than pooling, and no padding: on a CPU the step is several times faster than with pooled,
    padded convolutions of the same widths.

    Attributes:
      classes: number of outputs.
      channels: output channels of the convolutions, `conv_0`, `conv_1`, ...
      hidden: width of the dense layer `dense_0`.
      dtype: dtype of the computation, None for the inputs'.
    """

    classes: int
    channels: tuple[int, ...] = (16, 32)
    hidden: int = 128
    dtype: str | None = None

    def narrowed(self, widths: Mapping[str, int]) -> "CNN":
        """The same network with layers of other widths, by layer name."""
        names = [*(f"conv_{i}" for i in range(len(self.channels))), "dense_0"]
        *channels, hidden = new_widths(names, (*self.channels, self.hidden), widths)
        return self.clone(channels=tuple(channels), hidden=hidden)

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for images `(batch, height, width, channels)`; `train` has no effect."""
        init = {"kernel_init": he_normal(), "dtype": self.dtype}
        for i, channels in enumerate(self.channels):
            x = linen.relu(nn.Conv(channels, (3, 3), 2, "VALID", name=f"conv_{i}", **init)(x))
        x = linen.relu(nn.Dense(self.hidden, name="dense_0", **init)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
