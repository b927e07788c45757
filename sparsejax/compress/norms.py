"""Norms without parameters: a `Transformer` whose norms only divide, with the same function.

An RMS norm's scale g goes into the layers that read it, W <- diag(g) W. A LayerNorm is an RMS norm of what is left
when the mean over the channels is taken away, with a scale and a bias b:

  everything that writes into the residual stream writes without its mean over the channels (embeddings, the outputs
  of `out` and `down`),  W <- diag(g) W,  bias <- bias + b W,

so that the readers get biases. A tied head becomes one of its own. After that the residual stream may be rotated by
any orthogonal matrix (Ashkboos et al. 2024).
"""

from collections.abc import Mapping

import numpy as np

from sparsejax.compress.shrink import as_leaf, copied, sizes_of, with_sizes
from sparsejax.models import Transformer
from sparsejax.models.layers import layer_sizes

READERS = {"norm_0": ("attention", ("query", "key", "value")), "norm_1": ("mlp", ("up", "gate", "router"))}
WRITERS = (("attention", "out"), ("mlp", "down"))


def fold_norms(model: Transformer, params: Mapping) -> tuple[Transformer, dict]:
    """The model with RMS norms whose scales are one, and its parameters.

    Args:
      model: a `Transformer` of dense layers.
      params: its parameters; any mapping over `model.parts()`.

    Returns:
      `(model, params)`; computed in float64 on the host, in the dtypes and on the devices of the given ones.

    Raises:
      ValueError: for a LayerNorm before a router, which has no place for its bias.
    """
    centred = model.norm == "layer"
    if centred and any(layer_sizes(model, i)["experts"] for i in range(model.depth)):
        raise ValueError("the LayerNorm before a router cannot be folded, because routers have no bias")
    parts = {name: copied(params[name]) for name in model.parts()}
    if model.tied:
        parts["head"] = {"kernel": parts["embed"]["embedding"].T}
    for i in range(model.depth):
        part = parts[f"block_{i}"]
        for norm, (sub, readers) in READERS.items():
            for layer in (part[sub][name] for name in readers if name in part.get(sub, {})):
                _fold(part[norm], layer, centred)
        for sub, name in WRITERS if centred else ():
            if sub in part:
                part[sub][name] = {key: _centred(leaf) for key, leaf in part[sub][name].items()}
        for norm in READERS:
            if norm in part:
                part[norm] = {"scale": as_leaf(np.ones(part[norm]["scale"].shape), part[norm]["scale"])}
    _fold(parts["norm"], parts["head"], centred)
    parts["norm"] = {"scale": as_leaf(np.ones(parts["norm"]["scale"].shape), parts["norm"]["scale"])}
    if not centred:
        return model.clone(tied=False), parts
    for name in ("embed", "positions"):
        if name in parts:
            parts[name] = {"embedding": _centred(parts[name]["embedding"])}
    gained = ("query", "key", "value", "up", "gate")
    sizes = [sizes_of(model, i) for i in range(model.depth)]
    sizes = [{**size, "bias": tuple(dict.fromkeys((*size["bias"], *gained)))} for size in sizes]
    bias = tuple(dict.fromkeys((*model.bias, *gained)))
    return with_sizes(model.clone(norm="rms", tied=False, head_bias=True, bias=bias), sizes), parts


def _fold(norm: Mapping, layer: dict, centred: bool) -> None:
    """Multiplies a kernel by a norm's scale, and adds its bias times the kernel to the layer's, in place."""
    kernel = layer["kernel"]
    wide = np.asarray(kernel, np.float64)
    if centred:
        bias = np.asarray(norm["bias"], np.float64) @ wide
        layer["bias"] = as_leaf(np.asarray(layer.get("bias", 0), np.float64) + bias, kernel)
    layer["kernel"] = as_leaf(np.asarray(norm["scale"], np.float64)[:, None] * wide, kernel)


def _centred(leaf):
    wide = np.asarray(leaf, np.float64)
    return as_leaf(wide - wide.mean(-1, keepdims=True), leaf)


__all__ = ["fold_norms"]
