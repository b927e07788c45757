"""Wide ResNet (Zagoruyko & Komodakis 2016): pre-activation blocks, depth 6n + 4, channels times a width."""

from functools import partial

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import he_normal

from sparsejax import nn


class WideResNet(linen.Module):
    """WRN-depth-width for 32x32 images; the default, WRN-22-2, is a usual model of sparse-training papers.

    Attributes:
      classes: number of outputs.
      depth: 6n + 4: 10, 16, 22, 28, 40.
      width: multiplier of the channels 16, 32, 64 of the three stages.
      dtype: dtype of the computation, None for the inputs'.
    """

    classes: int
    depth: int = 22
    width: int = 2
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(
                f"depth={self.depth} of a wide_resnet must be 6n + 4 with n >= 1: 10, 16, 22, 28, 34, 40, ..."
            )

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for images; `train` uses and updates the batch statistics."""
        x = nn.Conv(16, (3, 3), use_bias=False, kernel_init=he_normal(), dtype=self.dtype, name="conv_0")(x)
        for stage in range(3):
            for i in range((self.depth - 4) // 6):
                x = PreActivationBlock(
                    16 * self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    dtype=self.dtype,
                    name=f"block_{stage}_{i}",
                )(x, train)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm")
        x = linen.relu(norm(x)).mean((1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class PreActivationBlock(linen.Module):
    """Norm, ReLU, 3x3 convolution, twice; a 1x1 convolution `shortcut` where the shape changes."""

    channels: int
    stride: int = 1
    dtype: str | None = None

    @linen.compact
    def __call__(self, x, train: bool):
        """Images `(batch, height / stride, width / stride, channels)`, rounded up."""
        conv = partial(nn.Conv, self.channels, use_bias=False, kernel_init=he_normal(), dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        active = linen.relu(norm(name="norm_0")(x))
        y = conv(kernel_size=(3, 3), strides=self.stride, name="conv_0")(active)
        y = conv(kernel_size=(3, 3), name="conv_1")(linen.relu(norm(name="norm_1")(y)))
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = conv(kernel_size=(1, 1), strides=self.stride, name="shortcut")(active)
        return x + y
