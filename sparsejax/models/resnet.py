"""ResNet for 32x32 images (He et al. 2016a, section 4.2): three stages of n basic blocks, depth 6n + 2."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import he_normal

from sparsejax import nn
from sparsejax.models.widths import check_inner, new_widths


class ResNet(linen.Module):
    """CIFAR-style residual network; its shortcuts have no parameters (the paper's option A).

    Attributes:
      classes: number of outputs.
      depth: 6n + 2: 20, 32, 44, 56, 110 in the paper.
      channels: channels of the first stage; later stages double them.
      inner: channels between the two convolutions of every block, in order; None for as many as the block's
        outputs.
      dtype: dtype of the computation, None for the inputs'.
    """

    classes: int
    depth: int = 20
    channels: int = 16
    inner: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(
                f"depth={self.depth} of a resnet must be 6n + 2 with n >= 1: 8, 14, 20, 26, 32, ..."
            )
        check_inner(self.inner, len(self.blocks))

    @property
    def blocks(self) -> dict[str, int]:
        """The number of output channels of every block, by name."""
        each = range((self.depth - 2) // 6)
        return {f"block_{stage}_{i}": self.channels * 2**stage for stage in range(3) for i in each}

    def narrowed(self, widths: Mapping[str, int]) -> "ResNet":
        """The same network with other widths inside its blocks, by the path of their first convolution."""
        names = [f"{block}/conv_0" for block in self.blocks]
        return self.clone(inner=new_widths(names, self.inner or self.blocks.values(), widths))

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for images; `train` uses and updates the batch statistics."""
        conv = nn.Conv(
            self.channels, (3, 3), use_bias=False, kernel_init=he_normal(), dtype=self.dtype, name="conv_0"
        )
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm_0")
        x = linen.relu(norm(conv(x)))
        width = self.channels
        for (name, channels), inner in zip(
            self.blocks.items(), self.inner or self.blocks.values(), strict=True
        ):
            stride = 2 if channels > width else 1
            width = channels
            x = BasicBlock(channels, inner, stride=stride, dtype=self.dtype, name=name)(x, train)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x.mean((1, 2))).astype(jnp.float32)


class BasicBlock(linen.Module):
    """Two 3x3 convolutions around a shortcut that subsamples and pads channels with zeros where it must."""

    channels: int
    inner: int
    stride: int = 1
    dtype: str | None = None

    @linen.compact
    def __call__(self, x, train: bool):
        """Images `(batch, height / stride, width / stride, channels)`, rounded up."""
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=he_normal(), dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        y = linen.relu(norm(name="norm_0")(conv(self.inner, strides=self.stride, name="conv_0")(x)))
        y = norm(name="norm_1")(conv(self.channels, name="conv_1")(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        missing = self.channels - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        return linen.relu(y + shortcut)
