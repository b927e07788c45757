"""The parts of a transformer that decoders, encoders and vision transformers share.

Attention and a feed-forward network in pre-norm residual blocks (Vaswani et al. 2017; the order of Radford et
al. 2019 and Dosovitskiy et al. 2021). Every projection is made by `sparsejax.nn.linear`, so that a structured
layer can take the place of a dense one, and is called `query`, `key`, `value`, `out`, `up` or `down`.
"""

from collections.abc import Mapping

import jax
from flax import linen

from sparsejax import nn


class Attention(linen.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(width / heads)) v per head, then `out`.

    Attributes:
      width: of the queries, keys, values and the output, over all heads.
      heads: number of heads; it must divide `width`.
      causal: whether a position sees only itself and those before it.
      linear: which layer makes the projections, see `sparsejax.nn.linear`; None for dense ones.
      dtype: dtype of the computation, None for the inputs'.

    Raises:
      ValueError: if `heads` does not divide `width`.
    """

    width: int
    heads: int
    causal: bool = False
    linear: Mapping | None = None
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} of an attention layer must divide its width={self.width}")

    @linen.compact
    def __call__(self, x):
        """Sequences `(batch, length, width)` for sequences `(batch, length, features)`."""

        def project(name, inputs):
            return nn.linear(self.linear, self.width, dtype=self.dtype, name=name)(inputs)

        def split(inputs):
            return inputs.reshape(*inputs.shape[:-1], self.heads, self.width // self.heads)

        query, key, value = (split(project(name, x)) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        return project("out", y.reshape(*y.shape[:-2], self.width))


class FeedForward(linen.Module):
    """down(gelu(up(x))) at every position.

    Attributes:
      hidden_width: width between `up` and `down`; the output is as wide as the input.
      linear, dtype: as in `Attention`.
    """

    hidden_width: int
    linear: Mapping | None = None
    dtype: str | None = None

    @linen.compact
    def __call__(self, x):
        """Arrays of the shape of `x`, `(..., features)`."""
        hidden = nn.linear(self.linear, self.hidden_width, dtype=self.dtype, name="up")(x)
        return nn.linear(self.linear, x.shape[-1], dtype=self.dtype, name="down")(linen.gelu(hidden))


class Block(linen.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      heads, causal, linear, dtype: as in `Attention`; the width is that of the input.
      hidden_width: as in `FeedForward`.
    """

    heads: int
    hidden_width: int
    causal: bool = False
    linear: Mapping | None = None
    dtype: str | None = None

    @linen.compact
    def __call__(self, x):
        """Sequences of the shape of `x`, `(batch, length, width)`."""
        attention = Attention(
            x.shape[-1], self.heads, self.causal, self.linear, dtype=self.dtype, name="attention"
        )
        mlp = FeedForward(self.hidden_width, self.linear, dtype=self.dtype, name="mlp")
        x = x + attention(nn.LayerNorm(dtype=self.dtype, name="norm_0")(x))
        return x + mlp(nn.LayerNorm(dtype=self.dtype, name="norm_1")(x))
