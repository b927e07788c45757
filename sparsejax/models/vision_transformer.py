"""Vision transformer (Dosovitskiy et al. 2021): patches as tokens, pre-norm blocks, one head."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import normal, zeros

from sparsejax import nn
from sparsejax.masks import choose
from sparsejax.models.blocks import PROJECTIONS, Block
from sparsejax.models.layers import block_options, check_model, frozen

POOLS = ("mean", "token")


class VisionTransformer(nn.MaskedParams):
    """Encoder on square patches, with learned positions.

    Attributes:
      classes: number of outputs; 0: there is no head, and the outputs are the pooled tokens.
      patch: side of a patch in pixels; it must divide the height and the width of the images.
      width: of the tokens.
      depth: number of blocks, `block_0`, `block_1`, ...
      heads: attention heads; they must divide `width`.
      mlp_ratio: hidden width of the feed-forward networks, in widths.
      pool: what the head reads: the `mean` of all tokens, or an extra class `token` as in the paper.
      linear: which layer makes the projections of the blocks, see `sparsejax.nn.linear`.
      dtype: dtype of the computation, None for that of the images and parameters together.
      hidden: hidden width of the feed-forward networks, None for `mlp_ratio * width`.
      epsilon: of the norms.
      activation: a key of `sparsejax.models.blocks.ACTIVATIONS`; the paper's is `gelu`.
      bias: the projections of the blocks that have a bias.
      layers: empty, or one mapping per block that replaces `heads`, `hidden` or `bias` there, as in `Transformer`.

    Raises:
      ValueError: for an unknown name, layers that do not fit the depth; at a call, for a patch that does not divide
        the images, or images of another size than the positions are for.
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
    hidden: int | None = None
    epsilon: float = 1e-6
    activation: str = "gelu_tanh"
    bias: tuple[str, ...] = PROJECTIONS
    layers: tuple[Mapping, ...] = ()

    def __post_init__(self):
        for name in ("linear", "bias", "layers"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        super().__post_init__()
        choose("pool", self.pool, POOLS)
        check_model("a vit", self)

    @property
    def reads_masks(self) -> bool:
        """As in `MLP`."""
        return nn.reads_masks(self.linear)

    def __call__(self, x, train: bool = False):
        """float32 outputs `(batch, classes)` for images `(batch, height, width, channels)`; `train` has no effect.

        Without classes the outputs are `(batch, width)`.
        The output of every block is sown as `features/block` (except by `init`, which makes parameters only).
        """
        return self._run(x, ("start", "blocks", "finish"))

    def start(self, x):
        """Tokens `(batch, tokens, width)` for images; needs what `parts` names before the first block."""
        return self._run(x, ("start",))

    def finish(self, x):
        """Outputs, float32, for the tokens after the last block; needs `norm` and, if there is one, `head`."""
        return self._run(x, ("finish",))

    # The number of positions is that of the first image, so the parameters cannot be declared in a `setup`.
    @linen.compact
    def _run(self, x, stages: tuple[str, ...]):
        if "start" in stages:
            x = nn.Dense(self.width, dtype=self.dtype, name="embed")(patches(x, self.patch))
            if self.pool == "token":
                token = self.param("token", zeros, (1, 1, self.width))
                token = jnp.broadcast_to(token, (len(x), 1, self.width)).astype(x.dtype)
                x = jnp.concatenate([token, x], axis=1)
            self._check_positions(x)
            x = x + self.param("positions", normal(0.02), (1, *x.shape[1:])).astype(x.dtype)
        if "blocks" in stages:
            for i in range(self.depth):
                x = Block(**block_options(self, i), name=f"block_{i}")(x)
                if not self.is_initializing():
                    self.sow("features", "block", x)
        if "finish" in stages:
            x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
            x = x[:, 0] if self.pool == "token" else x.mean(1)
            if self.classes:
                x = nn.Dense(self.classes, dtype=self.dtype, name="head")(x)
            x = x.astype(jnp.float32)
        return x

    @linen.nowrap
    def _check_positions(self, x) -> None:
        if not self.has_variable("params", "positions"):
            return
        known = self.get_variable("params", "positions").shape[1]
        if x.shape[1] != known:
            raise ValueError(f"images of {x.shape[1]} tokens do not fit the {known} positions of a vit")

    @linen.nowrap
    def block(self, i: int) -> Block:
        """The module of block `i`: `block.apply({"params": params["block_i"]}, hidden)`."""
        return Block(**block_options(self, i), parent=None)

    @linen.nowrap
    def context(self, images=None) -> dict:
        """Keywords of every block: none, for any images."""
        return {}

    @linen.nowrap
    def parts(self) -> tuple[str, ...]:
        """The names of the parameters and their subtrees, in the order of their use."""
        first = ("embed", "token", "positions") if self.pool == "token" else ("embed", "positions")
        last = ("norm", "head") if self.classes else ("norm",)
        return (*first, *(f"block_{i}" for i in range(self.depth)), *last)


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
