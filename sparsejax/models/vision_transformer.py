"""Vision transformer (Dosovitskiy et al. 2021): patches as tokens, pre-norm blocks, one head."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import normal, zeros

from sparsejax import nn
from sparsejax.masks import choose
from sparsejax.models.blocks import Block

POOLS = ("mean", "token")


class VisionTransformer(nn.MaskedParams):
    """Encoder on square patches, with learned positions.

    Attributes:
      classes: number of outputs.
      patch: side of a patch in pixels; it must divide the height and the width of the images.
      width: of the tokens.
      depth: number of blocks, `block_0`, `block_1`, ...
      heads: attention heads; they must divide `width`.
      mlp_ratio: hidden width of the feed-forward networks, in widths.
      pool: what the head reads: the `mean` of all tokens, or an extra class `token` as in the paper.
      linear: which layer makes the projections of the blocks, see `sparsejax.nn.linear`.
      dtype: dtype of the computation, None for the inputs'.

    Raises:
      ValueError: for an unknown pool, or a patch that does not divide the image (at the first call).
    """

    classes: int
    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    pool: str = "mean"
    linear: Mapping | None = None
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        choose("pool", self.pool, POOLS)
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} of a vit must divide its width={self.width}")

    @property
    def reads_masks(self) -> bool:
        """As in `MLP`."""
        return nn.reads_masks(self.linear)

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Outputs `(batch, classes)` for images `(batch, height, width, channels)`; `train` has no effect.

        The output of every block is sown as `features/block` (except by `init`, which makes parameters only).
        """
        x = nn.Dense(self.width, dtype=self.dtype, name="embed")(patches(x, self.patch))
        if self.pool == "token":
            token = self.param("token", zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)).astype(x.dtype), x], axis=1)
        x = x + self.param("positions", normal(0.02), (1, *x.shape[1:])).astype(x.dtype)
        for i in range(self.depth):
            block = Block(
                self.heads,
                self.mlp_ratio * self.width,
                linear=self.linear,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            x = block(x)
            if not self.is_initializing():
                self.sow("features", "block", x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.pool == "token" else x.mean(1)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


def patches(images, side: int):
    """Flattened patches `(batch, tokens, side * side * channels)`, row by row.

    Raises:
      ValueError: if `side` does not divide the height and the width.
    """
    batch, height, width, channels = images.shape
    if side < 1 or height % side or width % side:
        raise ValueError(f"patch={side} of a vit must divide the images' {height}x{width} pixels")
    grid = images.reshape(batch, height // side, side, width // side, side, channels)
    return grid.swapaxes(2, 3).reshape(batch, -1, side * side * channels)
