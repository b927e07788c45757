"""Checkpoints have one width for all layers: uneven ones are padded with zero heads and channels.

A padded head has zero rows in `out`, a padded channel zero rows in `down`, so that the padded network is exactly
the same function. With grouped heads both the groups and the queries in each are padded, since a query finds its
keys by its place.
"""

import numpy as np

from sparsejax.interop.configs import with_biases
from sparsejax.interop.family import Family
from sparsejax.models.encoder import Encoder
from sparsejax.models.layers import head_width, layer_sizes


def uniform(model, family: Family):
    """The model with every layer as large as the largest, and the biases that the family's checkpoints have.

    Raises:
      ValueError: for layers that differ in what zeros cannot pad: experts, the width of the residual stream, or a
        norm after a sub-block that is gone.
    """
    layers = [layer_sizes(model, i) for i in range(model.depth)]
    bias = with_biases(family, model, set().union(*(layer["bias"] for layer in layers)))
    fields = dict(bias=bias, linear=None)
    if layers[0]["experts"]:  # transformers picks no more experts than there are
        fields["experts_per_token"] = min(model.experts_per_token, layers[0]["experts"])
    if not model.layers:
        return model.clone(**fields)
    _check(layers, model, family)
    size = head_width(model)
    pairs = [_groups(layer) for layer in layers if layer["heads"]] or [(1, 1)]
    kv_heads, group = (max(values) for values in zip(*pairs, strict=True))
    if "head_width" not in family.keys:
        kv_heads = max(kv_heads, model.width // size)  # there, heads have to fill the width
    fields |= dict(layers=(), heads=kv_heads * group, hidden=max(1, *(layer["hidden"] for layer in layers)))
    if hasattr(model, "kv_heads"):
        fields |= dict(kv_heads=kv_heads, head_width=size, experts=layers[0]["experts"])
    return model.clone(**fields)


def _check(layers: list[dict], model, family: Family) -> None:
    name = family.variants[0].architecture
    for i, layer in enumerate(layers):
        if layer["stream"] is not None:
            raise ValueError(
                f"block_{i} has stream={tuple(layer['stream'])}, but a checkpoint of {name} has no shortcuts between "
                "residual streams of other widths"
            )
        if layer["experts"] != layers[0]["experts"]:
            raise ValueError(
                f"block_{i} has {layer['experts']} experts and block_0 {layers[0]['experts']}, but a checkpoint of "
                f"{name} has one number for all"
            )
        gone = [size for size in ("heads", "hidden") if not layer[size]]
        if gone and isinstance(model, Encoder):
            raise ValueError(
                f"block_{i} has {gone[0]}=0 and no norm there, but a checkpoint of {name} has both norms everywhere"
            )


def pad(leaves: dict, layer: dict, target, shapes: dict, dtype) -> dict:
    """The leaves of a block, by path, in the shapes of the uniform model.

    Args:
      leaves: NumPy arrays.
      layer: the block's sizes, as `sparsejax.models.layers.layer_sizes` gives them.
      target: the uniform model.
      shapes: shape of every leaf of its block.
      dtype: of leaves that are new.
    """
    found = {path: _pad(path, leaf, layer, target) for path, leaf in leaves.items()}
    for path, shape in shapes.items():
        if path not in found:  # a bias, or a sub-block that is gone
            found[path] = np.full(shape, path.endswith("scale"), dtype)
    return found


def _groups(layer: dict) -> tuple[int, int]:
    """Heads of keys, and queries for each."""
    kv_heads = layer["kv_heads"] or layer["heads"]
    return kv_heads, layer["heads"] // kv_heads


def _pad(path: str, leaf, layer: dict, target):
    module = path.split("/")[-2] if "/" in path else ""
    last, hidden = leaf.ndim - 1, layer_sizes(target, 0)["hidden"]
    if module in ("up", "gate"):
        return _grow(leaf, last, (layer["hidden"],), (hidden,))
    if module == "down" and path.endswith("kernel"):
        return _grow(leaf, last - 1, (layer["hidden"],), (hidden,))
    size = head_width(target)
    if module in ("query", "key", "value") or (module == "out" and path.endswith("kernel")):
        has, wants = _groups(layer), _groups(layer_sizes(target, 0))
        if module in ("key", "value"):
            has, wants = has[:1], wants[:1]
        axis = last - 1 if module == "out" else last
        return _grow(leaf, axis, (*has, size), (*wants, size))
    return leaf


def _grow(leaf, axis: int, has: tuple[int, ...], wants: tuple[int, ...]):
    """Zeros behind every part of an axis that consists of parts `has`, so that they become `wants`."""
    if has == wants:
        return leaf
    split = leaf.reshape(*leaf.shape[:axis], *has, *leaf.shape[axis + 1 :])
    widths = [(0, 0)] * split.ndim
    widths[axis : axis + len(has)] = [(0, more - less) for less, more in zip(has, wants, strict=True)]
    padded = np.pad(split, widths)
    return padded.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 1 :])
