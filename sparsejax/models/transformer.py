"""A decoder-only transformer that becomes GPT-2, OPT, Llama, Mistral, Qwen or Mixtral by its attributes.

Residual blocks with causal attention, see `sparsejax.models.blocks`. The defaults are those of GPT-2 (Radford et
al. 2019) but for an untied head; the others:

  OPT      position_offset=2, activation="relu", tied=True, epsilon=1e-5
  Llama    norm="rms", positions="rotary", activation="silu", gated=True, bias=(), kv_heads=..., epsilon=1e-5
  Mistral  as Llama with window=...; Mixtral also with experts=8
  Qwen2    as Llama with bias=("query", "key", "value"); Qwen3 instead with qk_norm=True and head_width=128

Post-training compression goes from block to block: `start` embeds, `block(i)` is the module of one block with
`context` its keywords, `finish` ends in logits.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import normal

from sparsejax import nn
from sparsejax.masks import choose
from sparsejax.models import rotary
from sparsejax.models.blocks import PROJECTIONS, Block, norm
from sparsejax.models.layers import block_options, check_model, frozen, head_width

POSITIONS = ("learned", "rotary")


class Transformer(linen.Module):
    """Predicts the next token at every position.

    Attributes:
      classes: size of the vocabulary.
      depth: number of blocks, `block_0`, `block_1`, ...
      width: of the residual stream.
      heads: attention heads; they must divide `width`, unless `head_width` is given.
      mlp_ratio: hidden width of the feed-forward networks, in widths.
      max_length: positions that are learned, and the longest sequence.
      linear: which layer makes the projections of the blocks, see `sparsejax.nn.linear`.
      dtype: dtype of the computation, None for that of the parameters.
      kv_heads: heads of keys and values, None for `heads`.
      head_width: width of one head, None for `width / heads`.
      hidden: hidden width of the feed-forward networks, or of every expert; None for `mlp_ratio * width`.
      norm: `layer` or `rms`.
      epsilon: of the norms.
      positions: `learned` or `rotary`.
      rotary_theta, rotary_scaling: see `sparsejax.models.rotary.frequencies`.
      position_offset: row of the learned positions that the first token gets.
      activation: a key of `sparsejax.models.blocks.ACTIVATIONS`.
      gated: whether the feed-forward networks have a `gate`.
      bias: the projections of the blocks that have a bias.
      qk_norm: whether queries and keys are normalised, head by head.
      tied: whether the logits are products with the embedding of the tokens, instead of a `head`.
      head_bias: whether the head has a bias.
      window: how many tokens a token sees, itself included; None for all before it.
      experts: feed-forward networks per block among which a router chooses; 0: one and no router.
      experts_per_token: how many of them a token goes through.
      layers: empty, or one mapping per block whose entries replace the model's `heads`, `kv_heads`, `hidden`,
        `experts` and `bias` in that block, and may give a `stream`, see `sparsejax.models.blocks.Block`; the
        width of a head stays. No heads or a hidden width of 0: the block has no attention, or no feed-forward network.
      norm_width: what RMS norms divide the sum of squares by, None for the actual width.

    Raises:
      ValueError: for heads that do not divide the width, an unknown name, layers that do not fit; for a sequence
        longer than `max_length` at the first call.
    """

    classes: int
    depth: int = 2
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    max_length: int = 256
    linear: Mapping | None = None
    dtype: str | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    hidden: int | None = None
    norm: str = "layer"
    epsilon: float = 1e-6
    positions: str = "learned"
    rotary_theta: float = 1e4
    rotary_scaling: Mapping | None = None
    position_offset: int = 0
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: tuple[str, ...] = PROJECTIONS
    qk_norm: bool = False
    tied: bool = False
    head_bias: bool = False
    window: int | None = None
    experts: int = 0
    experts_per_token: int = 2
    layers: tuple[Mapping, ...] = ()
    norm_width: int | None = None

    def __post_init__(self):
        for name in ("linear", "rotary_scaling", "bias", "layers"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        super().__post_init__()
        choose("positions", self.positions, POSITIONS)
        check_model("a transformer", self)
        if self.positions == "rotary":
            self._rates()
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} of a transformer must be at least 1")
        if self.experts_per_token < 1:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} of a transformer must be at least 1"
            )
        if self.norm_width is not None and self.norm != "rms":
            raise ValueError(
                f"norm_width={self.norm_width} of a transformer needs norm='rms', got {self.norm!r}"
            )
        width = next((layer["stream"][2] for layer in self.layers[::-1] if "stream" in layer), self.width)
        if self.tied and (self.head_bias or width != self.width):
            raise ValueError(
                "a tied transformer has no bias of the head and ends as wide as it begins, but "
                f"head_bias={self.head_bias} and its widths are {self.width} and {width}"
            )

    @property
    def reads_masks(self) -> bool:
        """As in `MLP`."""
        return nn.reads_masks(self.linear)

    def setup(self):
        init = normal(0.02)
        self._embed = nn.Embed(self.classes, self.width, embedding_init=init, dtype=self.dtype, name="embed")
        if self.positions == "learned":
            rows = self.max_length + self.position_offset
            self._positions = nn.Embed(rows, self.width, embedding_init=init, name="positions")
        self._blocks = [Block(**self._of_block(i), name=f"block_{i}") for i in range(self.depth)]
        width = {} if self.norm_width is None else {"width": self.norm_width}
        self._norm = norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm", **width)
        if not self.tied:
            self._head = nn.Dense(self.classes, use_bias=self.head_bias, dtype=self.dtype, name="head")

    def __call__(self, x, train: bool = False):
        """Logits `(batch, length, classes)` for int32 tokens `(batch, length)`; `train` has no effect."""
        context = self.context(x)
        x = self.start(x)
        for block in self._blocks:
            x = block(x, **context)
        return self.finish(x)

    def start(self, tokens, offset=0):
        """Hidden states `(batch, length, width)` for int32 tokens `(batch, length)`; needs `embed`, `positions`.

        Args:
          offset: int, or int32 scalar: position of the first token.
        """
        known = offset if isinstance(offset, int) else 0
        if known + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"sequences of {known + tokens.shape[1]} tokens exceed max_length={self.max_length}"
            )
        x = self._embed(tokens)
        if self.positions == "rotary":
            return x
        places = jnp.arange(tokens.shape[1]) + (offset + self.position_offset)
        return x + self._positions(places).astype(x.dtype)

    def finish(self, x):
        """Logits, float32, for hidden states; needs `norm` and `head`, or `embed` if tied."""
        x = self._norm(x)
        logits = self._embed.attend(x) if self.tied else self._head(x)
        return logits.astype(jnp.float32)

    @linen.nowrap
    def block(self, i: int) -> Block:
        """The module of block `i`: `block.apply({"params": params["block_i"]}, hidden, **context)`."""
        return Block(**self._of_block(i), parent=None)

    @linen.nowrap
    def context(self, tokens, offset=0) -> dict:
        """Arrays that every block takes as keywords: the tables of rotary positions.

        Args:
          tokens: `(batch, length)`, or the length.
          offset: position of the first token.
        """
        if self.positions == "learned":
            return {}
        length = tokens if isinstance(tokens, int) else tokens.shape[1]
        return dict(zip(("cos", "sin"), rotary.tables(self._rates(), length, offset), strict=True))

    @linen.nowrap
    def parts(self) -> tuple[str, ...]:
        """The names of the parameters' subtrees, in the order of their use."""
        first = ("embed", "positions") if self.positions == "learned" else ("embed",)
        last = ("norm",) if self.tied else ("norm", "head")
        return (*first, *(f"block_{i}" for i in range(self.depth)), *last)

    @linen.nowrap
    def _rates(self):
        return rotary.frequencies(head_width(self), self.rotary_theta, self.rotary_scaling)

    @linen.nowrap
    def _of_block(self, i: int) -> dict:
        return dict(block_options(self, i), causal=True)
