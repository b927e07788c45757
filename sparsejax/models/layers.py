"""What transformers have in common beside their modules: checks, and the sizes of every block.

The field `layers` of a model is empty, or has one mapping per block whose entries replace the model's own, so that
a model can be shrunk block by block; `LAYER` lists the names. A decoder's blocks may also have a `stream`.
"""

from collections.abc import Mapping
from dataclasses import fields

from flax import linen
from flax.core import FrozenDict

from sparsejax.masks import choose
from sparsejax.models.blocks import ACTIVATIONS, NORMS, PROJECTIONS

LAYER = ("heads", "kv_heads", "hidden", "experts", "bias", "stream")
BLOCK = (
    "causal",
    "linear",
    "dtype",
    "norm",
    "epsilon",
    "norm_width",
    "qk_norm",
    "window",
    "activation",
    "gated",
)


def frozen(value):
    """Lists as tuples and mappings as `FrozenDict`s, all the way down: what a module needs to have a hash."""
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(part) for key, part in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def layer_sizes(model: linen.Module, i: int) -> dict:
    """The sizes of block `i`, every name of `LAYER` with its value.

    Args:
      model: has the fields `width`, `heads`, `mlp_ratio`, `hidden`, `bias` and `layers`, and maybe others of `LAYER`.
    """
    own = {name: _settings(model).get(name) for name in LAYER}
    own["experts"] = own["experts"] or 0
    if model.hidden is None:
        own["hidden"] = model.mlp_ratio * model.width
    return {**own, **(model.layers[i] if model.layers else {})}


def head_width(model: linen.Module) -> int:
    """The width of one head, in all blocks alike."""
    return _settings(model).get("head_width") or model.width // model.heads


def block_options(model: linen.Module, i: int) -> dict:
    """The keywords of `sparsejax.models.blocks.Block` for block `i`, as far as the model has such fields."""
    sizes = layer_sizes(model, i)
    sizes["hidden_width"] = sizes.pop("hidden")
    if sizes["experts"]:
        sizes["experts_per_token"] = model.experts_per_token
    shared = {name: value for name, value in _settings(model).items() if name in BLOCK}
    return {**shared, **sizes, "head_width": head_width(model)}


def _settings(model: linen.Module) -> dict:
    # not by `getattr`, which for a name that is no field runs the `setup` of a module that is being made
    return {field.name: getattr(model, field.name) for field in fields(model)}


def check_model(kind: str, model: linen.Module) -> None:
    """Raises ValueError, one sentence, for heads, names or layers that the model cannot have; `kind` is "a vit"."""
    choose("activation", model.activation, ACTIVATIONS)
    settings = _settings(model)
    choose("norm", settings.get("norm", "layer"), NORMS)
    if model.heads < 1 or (settings.get("head_width") is None and model.width % model.heads):
        raise ValueError(f"heads={model.heads} of {kind} must divide its width={model.width}")
    if model.layers and len(model.layers) != model.depth:
        raise ValueError(f"layers={len(model.layers)} mappings do not fit depth={model.depth} of {kind}")
    allowed = [name for name in LAYER if name in settings or (name == "stream" and "norm_width" in settings)]
    width = model.width
    for i in range(model.depth):
        for key in model.layers[i] if model.layers else ():
            choose(f"entry of layers[{i}] of {kind}:", key, allowed)
        width = _check_layer(f"block_{i} of {kind}", layer_sizes(model, i), model.linear, width)


def _check_layer(label: str, sizes: dict, linear, width: int) -> int:
    """The width of the residual stream after a block; ValueError for sizes that no block can have."""
    for name in sizes["bias"]:
        choose(f"projection with a bias in {label}:", name, PROJECTIONS)
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    for name in ("heads", "hidden", "experts"):
        if sizes[name] < 0:
            raise ValueError(f"{name}={sizes[name]} in {label} must not be negative")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads={kv_heads} in {label} must divide its heads={heads}")
    if sizes["experts"] and linear is not None:
        raise ValueError(
            f"experts={sizes['experts']} in {label} have dense kernels, not linear={dict(linear)}"
        )
    stream = sizes["stream"]
    if stream is None:
        return width
    if len(stream) != 3 or min(stream) < 1 or stream[0] != width:
        raise ValueError(
            f"stream={stream} in {label} must be three positive widths, the first of them {width}"
        )
    return stream[2]
