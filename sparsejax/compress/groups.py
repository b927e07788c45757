"""What structured methods share: units that can go, a budget of weights, and what is left when they are gone.

A *unit* of attention is a KV head with the query heads that it serves (one head, where there are as many of both), a
unit of a feed-forward network is a channel. Their weights are those of the kernels that they take with them,

  head group   head_width ((g + 2) inputs + g outputs)      g query heads per KV head
  channel      (2 if gated else 1) inputs + outputs

and *sparsity* is the share of all weights in the blocks' kernels that is removed: not of biases, norms, embeddings
and the head. Units of different weight never add up exactly; methods come within one unit of the target.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.compress.base import Compressed
from sparsejax.compress.calibration import Observed, observe
from sparsejax.compress.shrink import (
    CONSUMERS,
    add_bias,
    as_leaf,
    copied,
    linear_weights,
    shrink,
    sizes_of,
    with_sizes,
)
from sparsejax.compress.stream import Stream
from sparsejax.masks import check_sparsity, choose
from sparsejax.models import Transformer
from sparsejax.models.layers import head_width, layer_sizes
from sparsejax.patterns import Unstructured, parse

STRUCTURES = {"heads": "attention", "channels": "mlp"}  # what may be removed, and from which sub-block


class Units(NamedTuple):
    """The units of one sub-block: count; weight: kernel weights of one; shared: inputs of its consumer per unit."""

    count: int
    weight: int
    shared: int


def units_of(model: Transformer, structures: Sequence[str]) -> dict[tuple[int, str], Units]:
    """{(block, sub-block): its units}, in the order of use, of the structures that may go.

    Raises:
      ValueError: for a structure that is not in `STRUCTURES`, or none.
    """
    subs = [choose("structure", name, STRUCTURES) for name in structures]
    if not subs:
        raise ValueError(f"no structure may be removed (known: {', '.join(STRUCTURES)})")
    width, found = head_width(model), {}
    for i in range(model.depth):
        size = sizes_of(model, i)
        first, middle, last = size["stream"] or (model.width,) * 3
        if size["heads"]:
            group = size["heads"] // size["kv_heads"]
            weight = width * ((group + 2) * first + group * middle)
            found[i, "attention"] = Units(size["kv_heads"], weight, group * width)
        if size["hidden"]:
            found[i, "mlp"] = Units(size["hidden"], (1 + model.gated) * middle + last, 1)
    return {key: units for key, units in found.items() if key[1] in subs}


def prepare(name: str, model, sparsity, pattern) -> float:
    """The sparsity, checked; the first line of every structured method's `run`.

    Raises:
      ValueError: for a sparsity outside [0, 1), a pattern other than "unstructured", which asks for nothing, and a
        model whose units are not known here.
    """
    if parse(pattern or "unstructured") != Unstructured():
        raise ValueError(f"{name} removes whole structures and takes no pattern, got {pattern!r}")
    if not isinstance(model, Transformer):
        raise ValueError(f"{name} can compress a Transformer, got a {type(model).__name__}")
    if model.linear is not None:
        raise ValueError(f"{name} can compress dense layers, got a model with linear={dict(model.linear)}")
    for i in range(model.depth):
        if layer_sizes(model, i)["experts"]:
            raise ValueError(f"{name} cannot compress experts, which block {i} has")
    return check_sparsity(sparsity)


def watch(model, params, tokens, needs, *, batch: int, progress) -> Iterator[tuple[int, Observed]]:
    """Pairs (block, what was seen of it) of one dense pass; statistics of `out`'s and `down`'s inputs.

    They lie at `seen.stats["attention/out/kernel"]` and `seen.stats["mlp/down/kernel"]`.

    Raises:
      ValueError: naming the layer, for inputs that are not finite.
    """
    layers = [f"{sub}/{layer}/kernel" for sub, layer in CONSUMERS.items()]
    dense = observe(model, params, tokens, needs, layers=layers, batch=batch, progress=progress)
    for i, seen in enumerate(dense):
        for path, stats in seen.stats.items():
            for entry, value in stats.items():
                if not bool(jnp.isfinite(value).all()):
                    raise ValueError(
                        f"the inputs of {seen.name}/{path} are not finite (their {entry}); "
                        "the model's activations overflow"
                    )
        yield i, seen


def consumer(part: Mapping, sub: str):
    """The float64 kernel `(in, out)` that reads the units of a sub-block."""
    return np.asarray(part[sub][CONSUMERS[sub]]["kernel"], np.float64)


# --- which units stay --------------------------------------------------------------------------------


def bound(model: Transformer, keys: Container, compensated: bool = False) -> set:
    """The sub-blocks that must keep a unit, because their bias could not move (`sparsejax.compress.shrink`).

    Those are the first one with a bias in a model with tied embeddings and no learned positions, and all with a bias
    from the first shortcut on.

    Args:
      model: the model.
      keys: the (block, sub-block) that may lose units.
      compensated: whether they get biases, also where they have none.
    """
    found, cut, homeless = set(), False, model.tied and model.positions != "learned"
    for i, sub in units_of(model, tuple(STRUCTURES)):
        key, size = (i, sub), sizes_of(model, i)
        cut |= bool(size["stream"])
        if key in keys and (compensated or CONSUMERS[sub] in size["bias"]) and (cut or homeless):
            found.add(key)
        homeless &= key in keys and key not in found  # one that stays takes the biases of later ones
    return found


def protect(model: Transformer, scores: Mapping, compensated: bool = False) -> None:
    """Gives the best unit of every sub-block that is `bound` the score inf, in place, so that it stays.

    Args:
      model, compensated: as for `bound`.
      scores: {(block, sub-block): one number per unit}.
    """
    for key in bound(model, scores, compensated):
        scores[key][np.argmax(scores[key])] = np.inf


def pooled(scores: Mapping, units: Mapping, budget: float) -> dict:
    """The units of highest score over the whole model whose weights together come nearest to a budget.

    Args:
      scores: {(block, sub-block): one number per unit}; ties go to the earlier unit.
      units: {(block, sub-block): `Units`} of the same.
      budget: weights to keep.

    Returns:
      {(block, sub-block): bool per unit, True for those kept}; never more than half a unit from the budget, unless
      those of score inf exceed it, which all stay.
    """
    flat = np.concatenate([scores[key] for key in units])
    weights = np.repeat([entry.weight for entry in units.values()], [entry.count for entry in units.values()])
    order = np.argsort(-flat, kind="stable")
    totals = np.concatenate([[0], np.cumsum(weights[order])])
    kept, least = np.zeros(flat.size, bool), int(np.isposinf(flat).sum())
    kept[order[: least + np.argmin(np.abs(totals[least:] - budget))]] = True
    return dict(
        zip(units, np.split(kept, np.cumsum([entry.count for entry in units.values()])[:-1]), strict=True)
    )


def uniform(name: str, scores: Mapping, units: Mapping, sparsity: float, total: int) -> dict:
    """The units of highest score of every sub-block, so that every block loses the same share.

    A block loses round(share * KV heads) head groups, and as many channels as then bring it to its share; what is
    left over is made up in the next block. Without channels, head groups do that. Units of score inf stay.

    Args:
      name: of the method.
      scores, units: as in `pooled`.
      sparsity: of all blocks together.
      total: weights of all blocks.

    Returns:
      As `pooled`.
    """
    share = share_of(name, units, sparsity, total)
    kept, target, removed = {}, 0.0, 0
    for i in sorted({block for block, _ in units}):
        own = [key for key in (((i, "attention"), (i, "mlp"))) if key in units]
        target += share * sum(units[key].count * units[key].weight for key in own)
        for key in own:
            count, weight, _ = units[key]
            exact = share * count if key != own[-1] else (target - removed) / weight
            gone = int(np.clip(round(exact), 0, count - np.isposinf(scores[key]).sum()))
            removed += gone * weight
            kept[key] = best(scores[key], count - gone)
    return kept


def share_of(name: str, units: Mapping, sparsity: float, total: int) -> float:
    """The share of the units' own weights that makes up a share of all weights.

    Raises:
      ValueError: if they are too few.
    """
    own = sum(entry.count * entry.weight for entry in units.values())
    if sparsity * total > own:
        raise ValueError(
            f"{name} can remove a share of {own / total:.3g} of the blocks' weights, got {sparsity}"
        )
    return sparsity * total / own if own else 0.0


def best(scores, count: int):
    """Bools: the `count` highest scores, ties to the earlier."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-np.asarray(scores), kind="stable")[:count]] = True
    return kept


# --- removal -----------------------------------------------------------------------------------------


def remove(
    name: str,
    model: Transformer,
    params: Mapping,
    tokens,
    sparsity: float,
    kept: Mapping,
    *,
    batch: int = 8,
    kernels: Mapping = {},
    biases: Mapping = {},
    findings: Mapping = {},
) -> Compressed:
    """The model without the units that are not kept.

    Args:
      name: of the method.
      model, params, tokens, sparsity: as the method got them.
      kept: {(block, sub-block): bool per unit}; sub-blocks that are not named stay.
      batch: sequences that go through a block at once, and over which errors are measured.
      kernels: {(block, sub-block): new kernel of the consumer, of the old shape}.
      biases: {(block, sub-block): vector `(width,)` that is added to its output}.
      findings: more entries for the report.

    Returns:
      `Compressed`. The report has "method", "asked", "sparsity" (reached), "weights" and "kept" (of the blocks'
      kernels), "biases" (entries of `out` and `down`'s
      that came into being, less those that went), "sequences", "length" and "layers": for each
      `block_i/attention` and `block_i/mlp` the "units" and how many of them are "kept", "size" (weights before),
      "density", "sparsity", and "error": ||X (W - W')|| / ||X W|| of `out` or `down` with the inputs X of the dense
      model, first batch, without biases.
    """
    units, layers = units_of(model, tuple(STRUCTURES)), {}
    stream = Stream(model, params, np.asarray(tokens)[:batch], batch)
    dense = {part: params[part] for part in model.parts()}
    sizes, parts, shrunk = [], dict(dense), {"attention": {}, "mlp": {}}
    for i in range(model.depth):
        size, old = sizes_of(model, i), dense[f"block_{i}"]
        new = copied(old)
        for key in ((i, sub) for sub in CONSUMERS if (i, sub) in kept):
            sub, rows = key[1], np.repeat(kept[key], units[key].shared)
            layer = new[sub][CONSUMERS[sub]]
            layer["kernel"] = _with_rows(layer["kernel"], kernels.get(key), rows)
            group = units[key].shared // head_width(model)
            shrunk[sub][i] = np.flatnonzero(np.repeat(kept[key], group) if sub == "attention" else kept[key])
        present = [sub for sub in CONSUMERS if (i, sub) in units]
        errors = stream.errors(
            stream.block(f"block_{i}"), old, new, [f"{sub}/{CONSUMERS[sub]}/kernel" for sub in present]
        )
        for sub, error in zip(present, errors.values(), strict=True):
            layers[f"block_{i}/{sub}"] = _of_layer(units[i, sub], kept.get((i, sub)), error)
        stream.hidden = stream.run(stream.block(f"block_{i}"), old)
        for sub in (sub for sub in present if (i, sub) in biases):
            add_bias(size, new, sub, biases[i, sub])
        sizes.append(size)
        parts[f"block_{i}"] = new
    before = linear_weights(dense, model.depth)
    small, less = shrink(with_sizes(model, sizes), parts, heads=shrunk["attention"], channels=shrunk["mlp"])
    after = linear_weights(less, model.depth)
    report = {
        "method": name,
        "asked": sparsity,
        "sparsity": 1 - after / before if before else 0.0,
        "weights": before,
        "kept": after,
        "biases": _biases(less) - _biases(dense),
        "sequences": int(np.shape(tokens)[0]),
        "length": int(np.shape(tokens)[1]),
        "layers": layers,
        **findings,
    }
    return Compressed(small, less, None, report)


def _with_rows(old, new, rows):
    """The kernel (the new one, if there is one) with zeros outside of the kept rows, like the old one."""
    return as_leaf(np.where(rows[:, None], np.asarray(old if new is None else new), 0), old)


def _of_layer(units: Units, kept, error: float) -> dict:
    left = units.count if kept is None else int(np.sum(kept))
    density = left / units.count
    return {
        "units": units.count,
        "kept": left,
        "size": units.count * units.weight,
        "density": density,
        "sparsity": 1 - density,
        "error": error,
    }


def _biases(params: Mapping) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(
        {part: params[part] for part in params if part.startswith("block")}
    )
    return sum(
        int(leaf.size)
        for path, leaf in leaves
        if path[-1].key == "bias" and path[-2].key in CONSUMERS.values()
    )


__all__ = [
    "STRUCTURES",
    "Units",
    "best",
    "bound",
    "consumer",
    "pooled",
    "prepare",
    "protect",
    "remove",
    "share_of",
    "uniform",
    "units_of",
    "watch",
]
