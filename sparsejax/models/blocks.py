"""The parts of a transformer that decoders, encoders and vision transformers share.

Attention and a feed-forward network in residual blocks (Vaswani et al. 2017), normalised before (Radford et al.
2019, Dosovitskiy et al. 2021) or after each of the two (Devlin et al. 2019). Every projection is made by
`sparsejax.nn.linear`, so that a structured layer can take the place of a dense one, and is called `query`, `key`,
`value`, `out`, `up`, `gate` or `down`.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen

from sparsejax import nn
from sparsejax.masks import choose
from sparsejax.models.rotary import rotate

ACTIVATIONS = {
    "gelu": partial(linen.gelu, approximate=False),
    "gelu_tanh": linen.gelu,
    "relu": linen.relu,
    "silu": linen.silu,
}
NORMS = ("layer", "rms")
PROJECTIONS = ("query", "key", "value", "out", "up", "gate", "down")


def norm(kind: str, **kwargs) -> linen.Module:
    """The normalisation that `kind`, one of `NORMS`, names; `width` is for `nn.RMSNorm` only."""
    choose("norm", kind, NORMS)
    return nn.RMSNorm(**kwargs) if kind == "rms" else nn.LayerNorm(**kwargs)


class Attention(linen.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(width / heads)) v per head, then `out`.

    Attributes:
      width: of the queries over all heads.
      heads: number of heads; it must divide `width`.
      causal: whether a position sees only itself and those before it.
      linear: which layer makes the projections, see `sparsejax.nn.linear`; None for dense ones.
      dtype: dtype of the computation, None for that of the inputs and parameters together.
      kv_heads: heads of the keys and values, None for `heads`; each serves `heads / kv_heads` neighbouring query
        heads (Ainslie et al. 2023).
      features: width of the output, None for `width`.
      bias: the projections that have a bias.
      qk_norm: whether an RMS norm with a `scale` of one head's width is applied to every query and key.
      epsilon: of those norms.
      window: how many positions a position sees, itself included; None for all. Only with `causal`.

    Raises:
      ValueError: if `heads` does not divide `width`, or `kv_heads` not `heads`; for a window that is not positive or
        without `causal`; at a call, for a mask beside a cache, or positions that exceed the cache.
    """

    width: int
    heads: int
    causal: bool = False
    linear: Mapping | None = None
    dtype: str | None = None
    kv_heads: int | None = None
    features: int | None = None
    bias: tuple[str, ...] = PROJECTIONS
    qk_norm: bool = False
    epsilon: float = 1e-6
    window: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} of an attention layer must divide its width={self.width}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"kv_heads={self.kv_heads} of an attention layer must divide its heads={self.heads}"
            )

        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(
                f"window={self.window} of an attention layer must be at least 1, and the layer causal"
            )

    @linen.compact
    def __call__(self, x, cos=None, sin=None, mask=None, cache=None, offset=0):
        """Sequences `(batch, length, features)` for sequences `(batch, length, inputs)`.

        Args:
          cos, sin: float32 tables of rotary positions `(length, width / heads / 2)`, see `sparsejax.models.rotary`.
          mask: bool `(batch, length)`, the positions that may be seen; None for all. Not with a cache.
          cache: None, or the keys and values seen so far, `{"key", "value"}` of `(batch, capacity, kv_heads,
            width / heads)`, the first `offset` positions filled; then the result is (sequences, new cache).
          offset: int, or int32 scalar: position of the first of `x`. Only an int is held against the capacity.
        """
        if cache is not None and mask is not None:
            raise ValueError("attention with a cache sees every position before its own, so it takes no mask")
        size, kv_heads = self.width // self.heads, self.kv_heads or self.heads

        def project(name, features, inputs):
            layer = nn.linear(self.linear, features, use_bias=name in self.bias, dtype=self.dtype, name=name)
            return layer(inputs)

        def split(name, heads):
            return project(name, heads * size, x).reshape(*x.shape[:-1], heads, size)

        query, key, value = split("query", self.heads), split("key", kv_heads), split("value", kv_heads)
        if self.qk_norm:
            query = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name="query_norm")(query)
            key = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name="key_norm")(key)
        if cos is not None:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is None:
            y = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal, **self._seen(mask))
        else:
            y, cache = self._continue(query, key, value, cache, offset)
        y = project("out", self.features or self.width, y.reshape(*y.shape[:-2], self.width))
        return y if cache is None else (y, cache)

    @linen.nowrap
    def _seen(self, mask) -> dict:
        """Keywords of `jax.nn.dot_product_attention` for a padding mask and a window."""
        keywords = {} if mask is None else {"mask": mask[:, None, None, :]}
        return keywords if self.window is None else {**keywords, "local_window_size": (self.window - 1, 0)}

    @linen.nowrap
    def _continue(self, query, key, value, cache, offset):
        """Attention of new positions, from `offset` on, to those in the cache and to themselves; the new cache."""
        capacity = cache["key"].shape[1]
        # `dynamic_update_slice` would move them to the front, over positions that are filled already
        if isinstance(offset, int) and offset + query.shape[1] > capacity:
            raise ValueError(
                f"{query.shape[1]} positions after {offset} exceed the cache's capacity of {capacity}"
            )
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], part.astype(cache[name].dtype), offset, 1)
            for name, part in (("key", key), ("value", value))
        }
        ages = offset + jnp.arange(query.shape[1])[:, None] - jnp.arange(capacity)
        seen = ages >= 0 if self.window is None else (ages >= 0) & (ages < self.window)
        keys, values = (cache[name].astype(query.dtype) for name in ("key", "value"))
        return jax.nn.dot_product_attention(query, keys, values, mask=seen[None, None]), cache


class FeedForward(linen.Module):
    """down(act(up(x))) at every position; gated: down(act(gate(x)) * up(x)) (Shazeer 2020).

    Attributes:
      hidden_width: width between `up` and `down`; the output is as wide as the input, or `features`.
      linear, dtype, bias, features: as in `Attention`.
      activation: a key of `ACTIVATIONS`; `gelu_tanh` is the approximation with a tanh.
      gated: whether there is a `gate`.
    """

    hidden_width: int
    linear: Mapping | None = None
    dtype: str | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: tuple[str, ...] = PROJECTIONS
    features: int | None = None

    @linen.compact
    def __call__(self, x):
        """Arrays `(..., features)` for `(..., inputs)`."""
        activate = choose("activation", self.activation, ACTIVATIONS)

        def project(name, features, inputs):
            layer = nn.linear(self.linear, features, use_bias=name in self.bias, dtype=self.dtype, name=name)
            return layer(inputs)

        up = project("up", self.hidden_width, x)
        hidden = activate(project("gate", self.hidden_width, x)) * up if self.gated else activate(up)
        return project("down", self.features or x.shape[-1], hidden)


class ExpertFeedForward(linen.Module):
    """Feed-forward networks of which a `router` picks some for every position (Jiang et al. 2024).

        y = sum over the k experts e of the largest p_e of  p_e / (sum of those p) FeedForward_e(x),
        p = softmax(router x)

    Attributes:
      experts: how many networks there are, E.
      experts_per_token: k, at most E.
      others: as in `FeedForward`; the kernels are `(experts, inputs, outputs)`.
    """

    hidden_width: int
    experts: int
    experts_per_token: int = 2
    dtype: str | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: tuple[str, ...] = PROJECTIONS
    features: int | None = None

    @linen.compact
    def __call__(self, x):
        """Arrays `(..., features)` for `(..., inputs)`."""
        activate = choose("activation", self.activation, ACTIVATIONS)
        tokens = x.reshape(-1, x.shape[-1])
        logits = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, name="router")(tokens)
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        chosen = min(self.experts_per_token, self.experts)
        weights, experts = jax.lax.top_k(jax.nn.softmax(wide), chosen)
        weights = weights / weights.sum(-1, keepdims=True)
        order = jnp.argsort(
            experts.ravel()
        )  # stable: rows of one expert lie together, in the order of tokens
        sizes = jnp.bincount(experts.ravel(), length=self.experts)

        def project(name, features, inputs):
            layer = nn.ExpertDense(
                features, self.experts, use_bias=name in self.bias, dtype=self.dtype, name=name
            )
            return layer(inputs, sizes)

        rows = tokens[order // chosen]
        up = project("up", self.hidden_width, rows)
        hidden = activate(project("gate", self.hidden_width, rows)) * up if self.gated else activate(up)
        y = project("down", self.features or x.shape[-1], hidden)[jnp.argsort(order)]
        y = jnp.einsum("tkf,tk->tf", y.reshape(*experts.shape, -1), weights.astype(y.dtype))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Block(nn.MaskedParams):
    """x + attention(norm_0(x)), then x + mlp(norm_1(x)); `post_norm`: norm_0(x + attention(x)), and so on.

    Attributes:
      heads, causal, linear, dtype, kv_heads, qk_norm, window: as in `Attention`; no heads: no attention.
      hidden_width, activation, gated: as in `FeedForward`; a width of 0: no feed-forward network.
      head_width: of one head, None for the input's width divided by `heads`.
      bias: the projections that have a bias, of `PROJECTIONS`.
      norm: a name of `NORMS`; epsilon, norm_width: its small number and what it divides the sum of squares by
        (RMS only; None for the number of features).
      post_norm: whether the norms come after the residual sums.
      experts, experts_per_token: as in `ExpertFeedForward`; no experts: one feed-forward network.
      stream: None, or the widths (in, mid, out) of the residual stream before, within and after the block. The
        residual is then multiplied by the parameters `shortcut_0` (in, mid) and `shortcut_1` (mid, out), as in
        SliceGPT (Ashkboos et al. 2024).
    """

    heads: int
    hidden_width: int
    causal: bool = False
    linear: Mapping | None = None
    dtype: str | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    bias: tuple[str, ...] = PROJECTIONS
    norm: str = "layer"
    epsilon: float = 1e-6
    norm_width: int | None = None
    post_norm: bool = False
    qk_norm: bool = False
    window: int | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    experts: int = 0
    experts_per_token: int = 2
    stream: tuple[int, int, int] | None = None

    @linen.compact
    def __call__(self, x, cos=None, sin=None, mask=None, cache=None, offset=0):
        """Sequences `(batch, length, width)`; arguments and, with a cache, results as of `Attention`."""
        _, middle, width = self.stream or (x.shape[-1],) * 3
        y = None
        if self.heads:
            y = self._attention(x.shape[-1], middle)(self._before(0, x), cos, sin, mask, cache, offset)
            if cache is not None:
                y, cache = y
        x = self._add(0, x, y)
        x = self._add(1, x, self._mlp(width)(self._before(1, x)) if self.hidden_width else None)
        return x if cache is None else (x, cache)

    def _attention(self, inputs: int, features: int) -> Attention:
        return Attention(
            self.heads * self.head_width if self.head_width else inputs,
            self.heads,
            self.causal,
            self.linear,
            dtype=self.dtype,
            kv_heads=self.kv_heads,
            features=features,
            bias=self.bias,
            qk_norm=self.qk_norm,
            epsilon=self.epsilon,
            window=self.window,
            name="attention",
        )

    def _mlp(self, features: int) -> FeedForward | ExpertFeedForward:
        shared = dict(
            dtype=self.dtype,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            features=features,
            name="mlp",
        )
        if self.experts:
            return ExpertFeedForward(self.hidden_width, self.experts, self.experts_per_token, **shared)
        return FeedForward(self.hidden_width, self.linear, **shared)

    def _norm(self, index: int, x):
        width = {} if self.norm_width is None else {"width": self.norm_width}
        return norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name=f"norm_{index}", **width)(x)

    def _before(self, index: int, x):
        """What a sub-block reads."""
        return x if self.post_norm else self._norm(index, x)

    def _add(self, index: int, x, y):
        """The residual stream after a sub-block that gave `y`, None if there is no such sub-block."""
        if self.stream is not None:
            shape = self.stream[index : index + 2]
            shortcut = self.param(f"shortcut_{index}", lambda _, shape: jnp.eye(*shape), shape)
            x = x @ shortcut.astype(x.dtype)
        if y is None:
            return x
        return self._norm(index, x + y) if self.post_norm else x + y
