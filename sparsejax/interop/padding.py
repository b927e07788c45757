"""Checkpoints have one width for all layers: uneven ones are padded with zero heads and channels.

A padded head has zero rows in `out`, a padded channel zero rows in `down`, so that the padded network is exactly
the same function. With grouped heads both the groups and the queries in each are padded, since a query finds its
keys by its place.
"""

import numpy as np

from sparsejax.interop.configs import with_biases
from sparsejax.interop.families import Family


def uniform(model, family: Family):
    """The model with every layer as large as the largest, and the biases that the family's checkpoints have.

    Raises:
      ValueError: for layers that differ in what zeros cannot pad: experts, or the width of the residual stream.
    """
    bias = with_biases(family, _biases(model))
    if not getattr(model, "layers", ()):
        return model.clone(bias=bias, linear=None)
    layers = [model.layer(i) for i in range(model.depth)]
    sliced = next((i for i, layer in enumerate(layers) if layer["stream"] is not None), None)
    if sliced is not None:
        raise ValueError(
            f"block_{sliced} has stream={tuple(layers[sliced]['stream'])}, but a checkpoint of "
            f"{family.architecture} has no shortcuts between residual streams of its own width"
        )
    experts = {layer["experts"] for layer in layers}
    if len(experts) > 1:
        raise ValueError(
            f"the blocks have {', '.join(map(str, sorted(experts)))} experts, but a checkpoint of "
            f"{family.architecture} has one number of experts"
        )
    size = model.head_width or model.width // model.heads
    pairs = [_groups(layer) for layer in layers if layer["heads"]] or [(1, 1)]
    kv_heads, group = (max(values) for values in zip(*pairs, strict=True))
    if "head_width" not in family.keys:
        kv_heads = max(kv_heads, model.width // size)  # there, heads have to fill the width
    return model.clone(
        layers=(),
        linear=None,
        bias=bias,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_width=size,
        hidden=max(1, *(layer["hidden"] for layer in layers)),
        experts=experts.pop(),
    )


def pad(leaves: dict, layer: dict, target, shapes: dict) -> dict:
    """The leaves of a block, by path, in the shapes of the uniform model.

    Args:
      leaves: NumPy arrays.
      layer: the block's sizes, as `Transformer.layer` gives them.
      target: the uniform model.
      shapes: shape of every leaf of its block.
    """
    found = {path: _pad(path, leaf, layer, target) for path, leaf in leaves.items()}
    dtype = next(iter(leaves.values())).dtype if leaves else np.float32
    for path, shape in shapes.items():
        if path not in found:  # a bias, or a sub-block that is gone
            found[path] = np.full(shape, path.endswith("scale"), dtype)
    return found


def _biases(model) -> set[str]:
    if not getattr(model, "layers", ()):
        return set(model.bias)
    return set().union(*(model.layer(i)["bias"] for i in range(model.depth)))


def _groups(layer: dict) -> tuple[int, int]:
    """Heads of keys, and queries for each."""
    kv_heads = layer["kv_heads"] or layer["heads"]
    return kv_heads, layer["heads"] // kv_heads


def _pad(path: str, leaf, layer: dict, target):
    module = path.split("/")[-2] if "/" in path else ""
    last, hidden = leaf.ndim - 1, target.hidden
    if module in ("up", "gate"):
        return _grow(leaf, last, (layer["hidden"],), (hidden,))
    if module == "down" and path.endswith("kernel"):
        return _grow(leaf, last - 1, (layer["hidden"],), (hidden,))
    size = target.head_width or target.width // target.heads
    if module in ("query", "key", "value") or (module == "out" and path.endswith("kernel")):
        has, wants = _groups(layer), _groups({"heads": target.heads, "kv_heads": target.kv_heads})
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
