"""Physical removal of the structures of a `Transformer`: what is masked is gone, and the function stays.

What belongs together, and which axes of which leaves it takes away:

  query head        columns of query, rows of out
  KV head           columns of key and value; it goes with the last query head that it served
  channel           column of up and gate, row of down (of every expert)
  expert            matrices of up, gate and down, column of the router
  residual channel  column of the embeddings, out and down; row of query, key, value, up, gate, router and head;
                    entry of every norm

The arrays of attention are rectangular, so that all KV heads that stay must serve equally many query heads: whole
groups of a KV head with its query heads may go, or as many query heads of every group.

A removed structure equals one whose rows in `out` or `down` are zero (an expert: one that the router never
chooses; a residual channel: one that is zero everywhere). A sub-block without heads or channels still has its bias:
it moves to the sub-block before, or to the embeddings, which gives the same function. RMS norms of fewer residual
channels keep their divisor (`norm_width`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.models import Transformer
from sparsejax.models.layers import head_width, layer_sizes

CONSUMERS = {"attention": "out", "mlp": "down"}  # the layer of a sub-block whose inputs are its structures
_READERS = ("query", "key", "value", "up", "gate", "router")  # read the residual stream


def shrink(
    model: Transformer,
    params: Mapping,
    *,
    heads: Mapping[int, Sequence[int]] | None = None,
    channels: Mapping[int, Sequence[int]] | None = None,
    experts: Mapping[int, Sequence[int]] | None = None,
    width: Sequence[int] | None = None,
) -> tuple[Transformer, dict]:
    """The model and the parameters of the structures that are kept.

    Args:
      model: a `Transformer` of dense layers.
      params: its parameters; any mapping over `model.parts()`, which is read part by part.
      heads: {block: query heads that it keeps}, in any order; an empty one removes attention from the block.
      channels: {block: channels of the feed-forward network (or of every expert) that it keeps}; an empty one
        removes the network.
      experts: {block: experts that it keeps}, at least one.
      width: residual channels that are kept, at least one; all norms must be RMS norms.

    Returns:
      `(model, params)`: blocks that are not named stay as they are, and with nothing to remove so do both.

    Raises:
      ValueError: for a block or an index that does not exist or appears twice, heads that leave KV heads with
        unequal groups, removal that a model cannot have (experts without a router, residual channels under a
        LayerNorm or in a sliced model), and a bias of a removed sub-block that has no place to go.
    """
    asked = {"heads": dict(heads or {}), "channels": dict(channels or {}), "experts": dict(experts or {})}
    for kind, blocks in asked.items():
        for i in blocks:
            if i not in range(model.depth):
                raise ValueError(f"{kind} names block {i}, but the blocks are 0 to {model.depth - 1}")
    if model.linear is not None:
        raise ValueError(f"only dense layers can shrink, got a model with linear={dict(model.linear)}")
    parts = {name: params[name] for name in model.parts()}
    sizes, orphans = [], []
    for i in range(model.depth):
        own = {kind: blocks[i] for kind, blocks in asked.items() if i in blocks}
        size, parts[f"block_{i}"], lost = _shrink_block(model, i, parts[f"block_{i}"], **own)
        sizes.append(size)
        orphans += [(i, sub, bias) for sub, bias in lost.items() if np.any(np.asarray(bias))]
    for i, sub, bias in orphans:
        _move_bias(model, sizes, parts, i, sub, bias)
    model = with_sizes(model, sizes)
    return (model, parts) if width is None else _shrink_width(model, parts, width)


def with_sizes(model: Transformer, sizes: Sequence[Mapping]) -> Transformer:
    """The model whose blocks have these sizes, one mapping per block as `sizes_of` gives it."""
    usual = sizes_of(model.clone(layers=()), 0)
    layers = tuple(
        {key: value for key, value in size.items() if value != usual[key] and (key != "kv_heads" or value)}
        for size in sizes
    )
    return model.clone(layers=layers if any(layers) else ())


def sizes_of(model: Transformer, i: int) -> dict:
    """`layer_sizes` of block `i` with the number of KV heads filled in (0 for a block without attention)."""
    size = layer_sizes(model, i)
    size["kv_heads"] = (size["kv_heads"] or size["heads"]) if size["heads"] else 0
    return size


def add_bias(size: dict, part: dict, sub: str, bias) -> None:
    """Adds a vector to the output of a sub-block, in place; its bias comes into being if it had none.

    Args:
      size: of the block, as `sizes_of`.
      part: the block's parameters; nested dicts that may be written to.
      sub: `attention` or `mlp`.
      bias: `(width,)`.
    """
    name = CONSUMERS[sub]
    layer = part[sub][name]
    kernel = layer["kernel"]
    old = layer.get("bias", np.zeros((*kernel.shape[:-2], kernel.shape[-1]), kernel.dtype))
    layer["bias"] = _sum(old, bias, kernel)
    if name not in size["bias"]:
        size["bias"] = (*size["bias"], name)


def copied(part: Mapping) -> dict:
    """Nested dicts of the same leaves."""
    return {key: copied(leaf) if isinstance(leaf, Mapping) else leaf for key, leaf in part.items()}


def as_leaf(array, leaf):
    """A numpy array in the dtype of a leaf; on its devices too, if that is a JAX array."""
    array = np.asarray(array).astype(leaf.dtype)
    if isinstance(leaf, jax.Array):
        return jax.device_put(array, leaf.sharding) if array.shape == leaf.shape else jnp.asarray(array)
    return array


def linear_weights(params: Mapping, depth: int) -> int:
    """How many weights the linear layers of the blocks have: kernels and shortcuts, without biases and norms."""
    return sum(_weights(params[f"block_{i}"]) for i in range(depth))


def _weights(part: Mapping) -> int:
    return sum(
        _weights(leaf)
        if isinstance(leaf, Mapping)
        else int(np.prod(leaf.shape)) * (key == "kernel" or key.startswith("shortcut"))
        for key, leaf in part.items()
    )


# --- one block ---------------------------------------------------------------------------------------


def _shrink_block(model, i, part, heads=None, channels=None, experts=None):
    """The sizes and parameters of block `i`, and {sub-block: bias} of those that are gone."""
    size, part, lost = sizes_of(model, i), copied(part), {}
    if heads is not None:
        groups, kept = _kept_groups(i, size, _indices("head", i, heads, size["heads"]))
        width = head_width(model)
        if kept.size:
            part["attention"] |= _take(part["attention"], ("query",), _spread(kept, width), -1)
            part["attention"] |= _take(part["attention"], ("key", "value"), _spread(groups, width), -1)
            part["attention"] |= _take(part["attention"], ("out",), _spread(kept, width), -2)
        else:
            lost |= _remove(part, "attention", "norm_0")
        size |= {"heads": kept.size, "kv_heads": groups.size}
    if experts is not None:
        if not size["experts"]:
            raise ValueError(f"block {i} has no experts to remove")
        kept = _indices("expert", i, experts, size["experts"])
        if not kept.size:
            raise ValueError(f"block {i} must keep at least one of its {size['experts']} experts")
        for name, layer in part["mlp"].items():
            axis = -1 if name == "router" else 0
            part["mlp"][name] = {key: leaf.take(kept, axis=axis) for key, leaf in layer.items()}
        size["experts"] = kept.size
    if channels is not None:
        kept = _indices("channel", i, channels, size["hidden"])
        if kept.size:
            part["mlp"] |= _take(part["mlp"], ("up", "gate"), kept, -1)
            part["mlp"] |= _take(part["mlp"], ("down",), kept, -2)
        else:
            if size["experts"] and "bias" in part.get("mlp", {}).get("down", {}):
                raise ValueError(f"the experts of block {i} have biases, so that it must keep a channel")
            lost |= _remove(part, "mlp", "norm_1")
        size["hidden"] = kept.size
    return size, part, lost


def _indices(kind: str, i: int, kept, count: int):
    """The kept indices in order, checked."""
    kept = np.sort(np.asarray(kept, np.int64).reshape(-1))
    if kept.size and (kept[0] < 0 or kept[-1] >= count or np.any(np.diff(kept) == 0)):
        raise ValueError(
            f"each {kind} that block {i} keeps must be named once and lie in 0 to {count - 1}, got {kept.tolist()}"
        )
    return kept


def _kept_groups(i: int, size: Mapping, heads):
    """The KV heads that stay with these query heads, and the query heads."""
    if not heads.size:
        return heads, heads
    served = heads // (size["heads"] // size["kv_heads"])
    groups, counts = np.unique(served, return_counts=True)
    if np.any(counts != counts[0]):
        raise ValueError(
            f"the KV heads that block {i} keeps must serve equally many query heads, but KV heads {groups.tolist()} "
            f"would serve {counts.tolist()}"
        )
    return groups, heads


def _spread(heads, width: int):
    """The columns of heads of `width` columns."""
    return (heads[:, None] * width + np.arange(width)).ravel()


def _take(layers: Mapping, names, index, axis: int) -> dict:
    """The named layers with some of their outputs (axis -1, also of the bias) or of their inputs (axis -2)."""
    found = {}
    for name in names:
        if name in layers:
            leaves = layers[name].items()
            found[name] = {
                key: leaf.take(index, axis=axis) if key == "kernel" or axis == -1 else leaf
                for key, leaf in leaves
            }
    return found


def _remove(part: dict, sub: str, norm: str) -> dict:
    """Takes a sub-block with its norm out of a block; {sub: its bias} if it had one."""
    layers = part.pop(sub, {})
    part.pop(norm, None)
    bias = layers.get(CONSUMERS[sub], {}).get("bias")
    return {} if bias is None else {sub: bias}


def _move_bias(model, sizes, parts, i: int, sub: str, bias) -> None:
    """Adds the bias of a sub-block that is gone to the last one before it that is left, or to the embeddings.

    Experts all get it, because the weights of a position's experts add up to 1.
    """
    if any(size["stream"] for size in sizes[: i + 1]):
        raise ValueError(f"the bias of {sub} in block {i} cannot move in a model with shortcuts")
    before = [(j, kind) for j in range(i + 1) for kind in CONSUMERS]
    for j, kind in reversed(before[: before.index((i, sub))]):
        if kind in parts[f"block_{j}"]:
            return add_bias(sizes[j], parts[f"block_{j}"], kind, bias)
    name = "positions" if model.positions == "learned" else "embed"
    if name == "embed" and model.tied:
        raise ValueError(f"the bias of {sub} in block {i} has no place to go: the block must keep some of it")
    table = parts[name]["embedding"]
    parts[name] = {**parts[name], "embedding": _sum(table, bias, table)}
    return None


def _sum(a, b, like):
    """a + b, added in float32, as an array of the kind and the dtype of `like`."""
    return as_leaf(np.asarray(a, np.float32) + np.asarray(b, np.float32), like)


# --- residual channels -------------------------------------------------------------------------------


def _shrink_width(model, parts, width):
    """The model and its parameters on the residual channels that are kept."""
    if not 0 < len(width) <= model.width or len({*width}) != len(width) or {*width} - {*range(model.width)}:
        raise ValueError(
            f"each residual channel that is kept must be named once and lie in 0 to {model.width - 1}, got {list(width)}"
        )
    if model.norm != "rms":
        raise ValueError(f"residual channels can be removed under norm='rms' only, got norm={model.norm!r}")
    sizes = [sizes_of(model, i) for i in range(model.depth)]
    if any(size["stream"] for size in sizes):
        raise ValueError("residual channels cannot be removed from a model with shortcuts")
    kept = np.sort(np.asarray(width, np.int64))
    found = {name: _take_stream(part, (name,), kept) for name, part in parts.items()}
    changed = model.clone(
        width=kept.size,
        hidden=model.mlp_ratio * model.width if model.hidden is None else model.hidden,
        head_width=head_width(model),
        norm_width=model.norm_width or model.width,
        layers=(),
    )
    return with_sizes(changed, sizes), found


def _take_stream(part, path, kept):
    """A subtree whose axes along the residual stream hold the kept channels."""
    found = {}
    for key, leaf in part.items():
        if isinstance(leaf, Mapping):
            found[key] = _take_stream(leaf, (*path, key), kept)
        elif path[-1] in _READERS or path == ("head",):
            found[key] = leaf.take(kept, axis=-2) if key == "kernel" else leaf
        else:  # embeddings, what writes into the stream, norms: but not those of queries and keys
            inside = path[-1] in ("query_norm", "key_norm")
            found[key] = leaf if inside else leaf.take(kept, axis=-1)
    return found


__all__ = ["CONSUMERS", "add_bias", "as_leaf", "copied", "linear_weights", "shrink", "sizes_of", "with_sizes"]
