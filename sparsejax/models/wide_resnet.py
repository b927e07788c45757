"""Wide ResNet (Zagoruyko & Komodakis 2016): pre-activation blocks, depth 6n + 4, channels times a width."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import he_normal

from sparsejax import nn
from sparsejax.models.widths import check_inner, new_widths


class WideResNet(linen.Module):
    """WRN-depth-width for 32x32 images; the default, WRN-22-2, is a usual model of sparse-training papers.

    Attributes:
      classes: number of outputs.
      depth: 6n + 4: 10, 16, 22, 28, 40.
      width: multiplier of the channels 16, 32, 64 of the three stages.
      stem: channels of the first convolution, at most 16.
      inner: channels between the two convolutions of every block, in order; None for as many as the block's
        outputs.
      dtype: dtype of the computation, None for the inputs'.
    """

    classes: int
    depth: int = 22
    width: int = 2
    stem: int = 16
    inner: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(
                f"depth={self.depth} of a wide_resnet must be 6n + 4 with n >= 1: 10, 16, 22, 28, 34, 40, ..."
            )
        if not 1 <= self.stem <= 16:
            raise ValueError(f"stem={self.stem} of a wide_resnet must be in [1, 16]")
        check_inner(self.inner, len(self.blocks))

    @property
    def blocks(self) -> dict[str, int]:
        """The number of output channels of every block, by name."""
        each = range((self.depth - 4) // 6)
        return {f"block_{stage}_{i}": 16 * self.width * 2**stage for stage in range(3) for i in each}

    def narrowed(self, widths: Mapping[str, int]) -> "WideResNet":
        """The same network with other widths of the stem and inside the blocks, by the convolution's path."""
        names = ["conv_0", *(f"{block}/conv_0" for block in self.blocks)]
        old = (self.stem, *(self.inner or self.blocks.values()))
        stem, *inner = new_widths(names, old, widths)
        return self.clone(stem=stem, inner=tuple(inner))

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for images; `train` uses and updates the batch statistics."""
        x = nn.Conv(
            self.stem, (3, 3), use_bias=False, kernel_init=he_normal(), dtype=self.dtype, name="conv_0"
        )(x)
        width = 16 * self.width
        for (name, channels), inner in zip(
            self.blocks.items(), self.inner or self.blocks.values(), strict=True
        ):
            stride = 2 if channels > width else 1
            width = channels
            x = PreActivationBlock(channels, inner, stride=stride, dtype=self.dtype, name=name)(x, train)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm")
        x = linen.relu(norm(x)).mean((1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class PreActivationBlock(linen.Module):
    """Norm, ReLU, 3x3 convolution, twice; a 1x1 convolution `shortcut` where the shape changes."""

    channels: int
    inner: int
    stride: int = 1
    dtype: str | None = None

    @linen.compact
    def __call__(self, x, train: bool):
        """Images `(batch, height / stride, width / stride, channels)`, rounded up."""
        conv = partial(nn.Conv, use_bias=False, kernel_init=he_normal(), dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        active = linen.relu(norm(name="norm_0")(x))
        y = conv(self.inner, (3, 3), strides=self.stride, name="conv_0")(active)
        y = conv(self.channels, (3, 3), name="conv_1")(linen.relu(norm(name="norm_1")(y)))
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = conv(self.channels, (1, 1), strides=self.stride, name="shortcut")(active)
        return x + y
