"""A transformer encoder (BERT, Devlin et al. 2019; RoBERTa, Liu et al. 2019; MiniLM, Wang et al. 2020).

Embeddings of tokens, types and positions are summed and normalised; then come blocks that are normalised after
each residual sum, and see the whole sequence but its padding. RoBERTa has `types=1`, `pad=1`,
`position_offset=2` and `epsilon=1e-5`.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import normal, zeros

from sparsejax import nn
from sparsejax.masks import choose
from sparsejax.models.blocks import ACTIVATIONS, PROJECTIONS, Block
from sparsejax.models.layers import block_options, check_model, frozen

POOLS = ("first", "mean")


class Encoder(nn.MaskedParams):
    """Outputs for every token, or with `pool` for every sequence.

    Attributes:
      classes: number of outputs; 0: there is no head, and the outputs are the hidden states.
      depth: number of blocks, `block_0`, `block_1`, ...
      width: of the hidden states.
      heads: attention heads; they must divide `width`.
      mlp_ratio: hidden width of the feed-forward networks, in widths.
      max_length: positions that are learned, and the longest sequence.
      linear: which layer makes the projections of the blocks, see `sparsejax.nn.linear`.
      dtype: dtype of the computation, None for that of the parameters.
      vocabulary: size of the vocabulary, None for `classes`.
      hidden: hidden width of the feed-forward networks, None for `mlp_ratio * width`.
      epsilon: of the norms.
      activation: a key of `sparsejax.models.blocks.ACTIVATIONS`.
      bias: the projections of the blocks that have a bias.
      types: kinds of tokens (first and second sentence), 0 for no such embedding.
      position_offset: row of the learned positions that the first token gets.
      pad: the token that fills up short sequences and that no other sees, None if there is none. With a
        `position_offset` it gets the row before the first, and does not count, as in RoBERTa.
      pool: what the outputs are made from: None for every token, `first` for the first token, `mean` for the mean
        of all tokens but the padding.
      pooler: whether tanh(dense(x)) comes after the pool.
      tied: whether the logits are those of BERT's masked tokens: products of norm(act(dense(x))), the layers
        `transform` and `transform_norm`, with the embedding of the tokens, plus `head_bias`.
      layers: as in `Transformer`, without experts and streams.

    Raises:
      ValueError: for heads that do not divide the width, an unknown name, settings that exclude each other; for a
        sequence longer than `max_length` at the first call.
    """

    classes: int
    depth: int = 2
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    max_length: int = 256
    linear: Mapping | None = None
    dtype: str | None = None
    vocabulary: int | None = None
    hidden: int | None = None
    epsilon: float = 1e-12
    activation: str = "gelu"
    bias: tuple[str, ...] = PROJECTIONS
    types: int = 2
    position_offset: int = 0
    pad: int | None = None
    pool: str | None = None
    pooler: bool = False
    tied: bool = False
    layers: tuple[Mapping, ...] = ()

    def __post_init__(self):
        for name in ("linear", "bias", "layers"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        super().__post_init__()
        check_model("an encoder", self)
        if self.pool is not None:
            choose("pool", self.pool, POOLS)
        if self.pooler and self.pool is None:
            raise ValueError("an encoder with a pooler needs a pool, got None")
        if self.tied and (self.pool is not None or self.vocabulary not in (None, self.classes)):
            raise ValueError(
                f"a tied encoder gives every token a logit for each of its vocabulary of {self.vocabulary}, but has "
                f"classes={self.classes} and pool={self.pool!r}"
            )
        if not (self.vocabulary or self.classes):
            raise ValueError(f"an encoder with classes={self.classes} needs its vocabulary, got None")

    @property
    def reads_masks(self) -> bool:
        """As in `MLP`."""
        return nn.reads_masks(self.linear)

    def setup(self):
        def embedding(rows, name, **kwargs):
            return nn.Embed(rows, self.width, embedding_init=normal(0.02), name=name, **kwargs)

        def dense(features, name, **kwargs):
            return nn.Dense(features, dtype=self.dtype, name=name, **kwargs)

        def layer_norm(name):
            return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

        self._embed = embedding(self.vocabulary or self.classes, "embed", dtype=self.dtype)
        self._positions = embedding(self.max_length + self.position_offset, "positions")
        if self.types:
            self._types = embedding(self.types, "types")
        self._embed_norm = layer_norm("embed_norm")
        self._blocks = [Block(**self._of_block(i), name=f"block_{i}") for i in range(self.depth)]
        if self.pooler:
            self._pooler = dense(self.width, "pooler")
        if self.tied:
            self._transform, self._transform_norm = (
                dense(self.width, "transform"),
                layer_norm("transform_norm"),
            )
        elif self.classes:
            self._head = dense(self.classes, "head")

    def __call__(self, x, train: bool = False, types=None, mask=None):
        """float32 outputs `(batch, length, classes)`, with `pool` `(batch, classes)`; `train` has no effect.

        Args:
          x: int32 tokens `(batch, length)`.
          types: int32 `(batch, length)`, None for zeros.
          mask: bool or 0/1 `(batch, length)`, False at padding; None for the tokens that are not `pad`.
        """
        return self.finish(self.encode(x, types, mask), mask=self.context(x, mask).get("mask"))

    def encode(self, tokens, types=None, mask=None):
        """Hidden states `(batch, length, width)` after the last block; arguments as of a call."""
        context = self.context(tokens, mask)
        x = self.start(tokens, types)
        for block in self._blocks:
            x = block(x, **context)
        return x

    def start(self, tokens, types=None):
        """Hidden states before the first block; needs `embed`, `positions`, `types` and `embed_norm`."""
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"sequences of {tokens.shape[1]} tokens exceed max_length={self.max_length}")
        x = self._embed(tokens)
        if self.types:
            x = x + self._types(jnp.zeros_like(tokens) if types is None else types).astype(x.dtype)
        places = jnp.arange(tokens.shape[1]) + self.position_offset
        if self.pad is not None and self.position_offset:
            counts = tokens != self.pad  # whatever a mask says
            places = jnp.where(counts, jnp.cumsum(counts, axis=1), 0) + self.position_offset - 1
        return self._embed_norm(x + self._positions(places).astype(x.dtype))

    @linen.compact  # for `head_bias`, which `start` must not need
    def finish(self, x, mask=None):
        """float32 outputs for hidden states; needs what `parts` names after the last block, `embed` if tied.

        Args:
          mask: as `context` gives it; only the mean pool reads it.
        """
        if self.pool is not None:
            x = pool_tokens(x, self.pool, mask)
        if self.pooler:
            x = jnp.tanh(self._pooler(x))
        if self.tied:
            x = self._transform_norm(ACTIVATIONS[self.activation](self._transform(x)))
            x = self._embed.attend(x) + self.param("head_bias", zeros, (self.classes,)).astype(x.dtype)
        elif self.classes:
            x = self._head(x)
        return x.astype(jnp.float32)

    @linen.nowrap
    def block(self, i: int) -> Block:
        """The module of block `i`: `block.apply({"params": params["block_i"]}, hidden, **context)`."""
        return Block(**self._of_block(i), parent=None)

    @linen.nowrap
    def context(self, tokens, mask=None) -> dict:
        """Arrays that every block takes as keywords: the `mask` of the tokens that are not padding, if there is any.

        Args:
          tokens: `(batch, length)`, or the length of sequences without padding.
          mask: as of a call.
        """
        if mask is not None:
            return {"mask": jnp.asarray(mask).astype(bool)}
        return {} if self.pad is None or isinstance(tokens, int) else {"mask": tokens != self.pad}

    @linen.nowrap
    def parts(self) -> tuple[str, ...]:
        """The names of the parameters' subtrees, in the order of their use."""
        first = (
            ("embed", "types", "positions", "embed_norm")
            if self.types
            else ("embed", "positions", "embed_norm")
        )
        last = ("pooler",) if self.pooler else ()
        if self.tied:
            last += ("transform", "transform_norm", "head_bias")
        elif self.classes:
            last += ("head",)
        return (*first, *(f"block_{i}" for i in range(self.depth)), *last)

    @linen.nowrap
    def _of_block(self, i: int) -> dict:
        return dict(block_options(self, i), post_norm=True)


def pool_tokens(x, pool: str, mask=None):
    """One state per sequence, `(batch, width)`, from those of its tokens `(batch, length, width)`.

    Args:
      pool: `first`, or `mean` over the tokens of the mask, in float32.
      mask: bool `(batch, length)`, None for all.
    """
    if choose("pool", pool, POOLS) == "first":
        return x[:, 0]
    if mask is None:
        return x.mean(1, dtype=jnp.float32).astype(x.dtype)
    total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(mask.sum(1, keepdims=True), 1)).astype(x.dtype)


def sentence_embeddings(
    model: Encoder, params, tokens, mask=None, pool: str = "mean", normalise: bool = True
):
    """float32 `(batch, width)`, one vector per sequence (Reimers and Gurevych 2019).

    Args:
      params: of the model, read anew at every call if they are lazy; those after the last block are not used.
      tokens: int32 `(batch, length)`.
      mask: bool or 0/1 `(batch, length)`, False at padding; None for the tokens that are not the model's `pad`.
      pool: what is made of the last hidden states: their `mean` over the mask, or the `first`.
      normalise: whether the vectors get length 1.
    """
    return _sentence_embeddings(model, dict(params), tokens, mask, pool, normalise)


@partial(jax.jit, static_argnames=("model", "pool", "normalise"))
def _sentence_embeddings(model, params, tokens, mask, pool, normalise):
    x = model.apply({"params": params}, tokens, mask=mask, method="encode").astype(jnp.float32)
    x = pool_tokens(x, pool, model.context(tokens, mask).get("mask"))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if normalise else x
