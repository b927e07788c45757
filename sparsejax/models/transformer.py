"""A decoder-only transformer (Radford et al. 2019): pre-norm blocks, learned positions, causal attention."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import normal

from sparsejax import nn
from sparsejax.models.blocks import Block


class Transformer(linen.Module):
    """Predicts the next token at every position.

    Attributes:
      classes: size of the vocabulary.
      depth: number of blocks, `block_0`, `block_1`, ...
      width: of the residual stream.
      heads: attention heads; they must divide `width`.
      mlp_ratio: hidden width of the feed-forward networks, in widths.
      max_length: positions that are learned.
      linear: which layer makes the projections of the blocks, see `sparsejax.nn.linear`.
      dtype: dtype of the computation, None for float32.

    Raises:
      ValueError: for heads that do not divide the width, or a sequence longer than `max_length` (at the first
        call).
    """

    classes: int
    depth: int = 2
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    max_length: int = 256
    linear: Mapping | None = None
    dtype: str | None = None

    @property
    def reads_masks(self) -> bool:
        """As in `MLP`."""
        return nn.reads_masks(self.linear)

    @linen.compact
    def __call__(self, x, train: bool = False):
        """Logits `(batch, length, classes)` for int32 tokens `(batch, length)`; `train` has no effect."""
        if x.shape[1] > self.max_length:
            raise ValueError(f"sequences of {x.shape[1]} tokens exceed max_length={self.max_length}")
        positions = nn.Embed(self.max_length, self.width, embedding_init=normal(0.02), name="positions")
        x = nn.Embed(self.classes, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="embed")(x)
        x = x + positions(jnp.arange(x.shape[1])).astype(x.dtype)
        hidden = self.mlp_ratio * self.width
        for i in range(self.depth):
            block = Block(self.heads, hidden, True, self.linear, dtype=self.dtype, name=f"block_{i}")
            x = block(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.classes, use_bias=False, dtype=self.dtype, name="head")(x).astype(jnp.float32)
