"""Layer-wise compression of a model, one block after the other, from calibration tokens.

For every block, in order:
  1. it runs as it is on the hidden states that reached it; the statistics of its linear layers' inputs add up;
  2. every linear kernel is compressed with the statistics of its inputs;
  3. the compressed block runs on the same states, which gives the inputs of the next block (Frantar & Alistarh 2023).

Only one block's parameters and statistics are in memory at a time, if the parameters are a mapping that reads its
parts when asked and a `sink` takes the results; hidden states wait on the host. With `resume` every finished block is
written to a folder, from which the same call goes on after an interruption at any moment.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparsejax.compress import statistics
from sparsejax.compress.base import (
    Compressed,
    CompressionWarning,
    Layerwise,
    check_pattern,
    collect,
    layer_budget,
    warn,
)
from sparsejax.compress.resume import Resume
from sparsejax.compress.stream import Layer, Stream
from sparsejax.formats.base import is_packed
from sparsejax.masks import best_rule, check_sparsity, choose, count, matches
from sparsejax.patterns import NM

PROPAGATE = ("pruned", "dense")


class Observed(NamedTuple):
    """A block of a dense pass over the calibration tokens.

    Attributes:
      name: of the block.
      params: its parameters.
      layers: {path in the block: `sparsejax.compress.stream.Layer`}.
      stats: {path in the block: statistics of that layer's inputs}.
      inputs, outputs: hidden states before and after, numpy `(sequences, length, width)`.
    """

    name: str
    params: Any
    layers: Mapping[str, Layer]
    stats: Mapping[str, statistics.Statistics]
    inputs: np.ndarray
    outputs: np.ndarray


def observe(
    model, params: Mapping, tokens, needs, *, layers=("*",), batch: int = 8, progress=None
) -> Iterator[Observed]:
    """Goes through the blocks of the model as it is, for methods that look before they cut.

    Args:
      model, params, tokens, batch, progress: as in `prune_layers`.
      needs: entries of `sparsejax.compress.statistics`.
      layers: shell patterns on paths in a block, as "attention/out/kernel": of the inputs of these.

    Yields:
      `Observed`, block by block.
    """
    stream = Stream(model, params, tokens, batch)
    with tqdm(stream.blocks, disable=_hidden(progress), unit="block", desc="observe") as bar:
        for name in bar:
            # nothing of a block is bound here, so that it can go before the next one is read
            yield _look(stream, name, params[name], needs, layers)


def _look(stream: Stream, name: str, tree, needs, layers) -> Observed:
    """Observes one block and moves the stream behind it."""
    found = {path: layer for path, layer in stream.layers[name].items() if matches(path, layers)}
    inputs = stream.hidden
    stats, stream.hidden = stream.observe(stream.block(name), tree, found, needs)
    of_layers = {path: stats[layer.source] for path, layer in found.items()}
    return Observed(name, tree, found, of_layers, inputs, stream.hidden)


def prune_layers(
    method: Layerwise,
    model,
    params: Mapping,
    tokens,
    sparsity: float | None,
    pattern="unstructured",
    *,
    allocation: str | Mapping[str, float] | Callable = "uniform",
    propagate: str = "pruned",
    batch: int = 8,
    sink: MutableMapping | None = None,
    resume=None,
    progress: bool | None = None,
) -> Compressed:
    """Compresses every linear kernel of the model's blocks; embeddings, norms, routers and the head stay.

    Args:
      method: one layer's method, such as `sparsejax.compress.wanda()`.
      model: a module with the block interface (`start`, `block`, `context`, `finish`, `parts`).
      params: its parameters by part; any mapping, each part is read when its turn comes. Sharded ones work.
      tokens: calibration sequences, int32 `(sequences, length)`, or whatever `model.start` takes; padding counts
        unless the model's context has a mask of it. Sharded along their first axis, the hidden states are too.
      sparsity: fraction to drop of each layer, in [0, 1). None with N:M, which has its own, or where `allocation`
        knows all.
      pattern: `sparsejax.patterns` object or its name.
      allocation: "uniform"; {shell pattern on `block_0/attention/query/kernel`: sparsity}, where the most specific
        pattern wins and layers without one get `sparsity`; or a function `({layer: shape struct}, sparsity) ->
        {layer: sparsity}`, as those of `sparsejax.allocation` on shapes. Sparsity 0 leaves a layer as it is. With
        N:M, a layer gets another N of the same M if its sparsity says so.
      propagate: whether the inputs of a block come from "pruned" or from "dense" blocks before it.
      batch: sequences that go through a block at once.
      sink: receives `sink[part] = subtree` for every part in order, instead of the result.
      resume: a folder (made if missing) for the finished blocks and the hidden states. A call with the same
        arguments goes on after the last finished block, with the same bits in its result; empty it when done.
      progress: whether a bar is shown; None: if stderr is a terminal.

    Returns:
      `Compressed`: parameters in their dtypes (the sink, if there is one) and masks (None with a sink: the masks of
      a model that does not fit into memory do not either). The report has "method", "pattern", "propagate",
      "sequences", "length", "sparsity" (reached, over all layers) and "layers": for each its "sparsity", "density",
      "error", which is ||X (W - W')|| / ||X W|| over the first batch of its inputs X before the block was
      compressed, "notes", the sentences of warnings about it, and what the method itself notes.

    Raises:
      ValueError: before any work for a sparsity, pattern, allocation or tokens that cannot be; naming the layer, for
        inputs or weights that are not finite and for what the method cannot do; for a `resume` folder of another call.

    Experts are compressed one by one with the statistics of the tokens that were routed to them (of which each batch
    counts as one sequence); an expert that saw none as if its inputs were uncorrelated and of equal size, with a
    warning.
    """
    text = str(pattern)
    pattern = check_pattern(method.name, pattern, method.patterns)
    choose("propagate", propagate, PROPAGATE)
    if allocation == "uniform":
        _check_uniform(sparsity, pattern)
    statistics.init(method.needs, 1)
    asked = {
        "method": method.name,
        "pattern": text,
        "sparsity": None if sparsity is None else float(sparsity),
        "propagate": propagate,
        "batch": int(batch),
    }
    runner = _Runner(method, model, sparsity, pattern, propagate)
    stream = Stream(model, params, tokens, batch)
    runner.budgets = runner.allocate(stream, allocation)
    settings = {f"{name} of the method": value for name, value in method.settings.items()}
    about = {**asked, "budgets": runner.budgets, **settings}
    saved = None if resume is None else Resume(resume, about, stream, model)
    out, masks, layers, done = {} if sink is None else sink, {}, {}, 0 if saved is None else saved.done

    def one(part, bar):
        # a function of its own, so that nothing of a block is bound while the next one is read
        old, report = params[part], {}
        if part not in stream.blocks:
            tree, mask = old, _dense_masks(old)
        elif stream.blocks.index(part) < done:
            tree, mask, report = saved.read(part, old)
            tree, mask = _like(tree, old), jax.tree.map(jnp.asarray, mask)
        else:
            bar.set_description(part)
            tree, mask, report = runner.block(stream, part, old, bar)
            if saved is not None:
                saved.write(part, old, tree, mask, report, stream.hidden)
            bar.update()
        layers.update(report)
        out[part] = tree
        if sink is None:
            masks[part] = mask

    with tqdm(total=len(stream.blocks), initial=done, disable=_hidden(progress), unit="block") as bar:
        for part in model.parts():
            one(part, bar)
    return Compressed(model, out, masks if sink is None else None, _report(asked, stream, layers))


class _Runner:
    """What stays the same from block to block."""

    def __init__(self, method, model, sparsity, pattern, propagate):
        self.method, self.model = method, model
        self.sparsity, self.pattern, self.propagate = sparsity, pattern, propagate
        self.budgets = {}

    def allocate(self, stream: Stream, allocation) -> dict[str, float | None]:
        """The sparsity of every layer, checked against the pattern and the layer's shape."""
        shapes = {
            f"{part}/{path}": layer.shape
            for part, layers in stream.layers.items()
            for path, layer in layers.items()
        }
        if not shapes:
            raise ValueError(
                f"{type(self.model).__name__} has no linear layer in its blocks ({', '.join(stream.blocks)})"
            )
        for rule in self.method.rules or ():
            if not any(matches(name.partition("/")[2], (rule,)) for name in shapes):
                raise ValueError(
                    f"rule {rule!r} of {self.method.name} matches no layer (layers: {', '.join(list(shapes)[:8])} ...)"
                )
        budgets = _allocated(allocation, shapes, self.sparsity)
        for name, shape in shapes.items():
            try:
                share, pattern = layer_budget(
                    self.method.name, budgets[name], self.pattern, self.method.patterns
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if share:
                pattern.check(name, shape[-2:])
        return budgets

    def block(self, stream: Stream, part: str, old, bar):
        """Compresses one block and moves the stream behind it: (parameters, masks, {layer: report})."""
        block, layers = stream.block(part), stream.layers[part]
        dense = self.propagate == "dense"
        _check_dense(part, old, layers)
        stats, outputs = stream.observe(block, old, layers, self.method.needs, outputs=dense)
        new, masks, report = _copy(old), _dense_masks(old), {}
        last = {layer.source: path for path, layer in layers.items()}
        for path, layer in layers.items():
            name = f"{part}/{path}"
            bar.set_postfix_str(path)
            *above, key = path.split("/")
            with collect() as noted:
                kernel, mask, notes = self.layer(name, _node(old, above)[key], stats[layer.source])
            _node(new, above)[key], _node(masks, above)[key] = kernel, mask
            density = _kept(mask) / mask.size
            report[name] = {"sparsity": 1 - density, "density": density, "size": mask.size, "notes": notes}
            report[name] |= noted
            if last[layer.source] == path:
                del stats[layer.source]
        for path, error in stream.errors(block, old, new, layers).items():
            report[f"{part}/{path}"]["error"] = error
        bar.set_postfix_str("")
        if dense:
            stream.hidden = outputs
        else:
            stream.advance(block, new)
        return new, masks, report

    def layer(self, name: str, kernel, stats):
        """(kernel in its dtype, mask, warnings) of one layer, or of all experts of one."""
        for entry, value in stats.items():
            if not _finite(value):
                raise ValueError(
                    f"the inputs of {name} are not finite (their {entry}); the model's activations overflow"
                )
        if not _finite(kernel):
            raise ValueError(f"the weights of {name} are not finite")
        with naming(name) as notes:
            new, mask = self._prune(name, jnp.asarray(kernel).astype(jnp.float32), stats)
        new = jnp.where(mask, new, 0).astype(kernel.dtype)
        if not _finite(new):
            raise ValueError(f"the compressed weights of {name} are not finite as {kernel.dtype}")
        if isinstance(kernel, jax.Array):
            new, mask = jax.device_put(new, kernel.sharding), jax.device_put(mask, kernel.sharding)
        return new, mask, notes

    def _prune(self, name: str, kernel, stats):
        rules = self.method.rules or {}
        rule = best_rule(name.partition("/")[2], rules)
        method, sparsity = self.method if rule is None else rules[rule], self.budgets[name]
        if kernel.ndim == 2:
            return method.prune(kernel, stats, sparsity, self.pattern)
        pairs = []
        for index, matrix in enumerate(kernel):
            own = jax.tree.map(lambda x, index=index: x[index], stats)
            if not own["count"]:
                warn(f"expert {index} saw no calibration token; its inputs are taken as uncorrelated")
                own = statistics.isotropic(own)
            pairs.append(method.prune(matrix, own, sparsity, self.pattern))
        return tuple(jnp.stack(arrays) for arrays in zip(*pairs, strict=True))


# --- helpers -----------------------------------------------------------------------------------------


def _allocated(allocation, shapes: Mapping[str, tuple], sparsity) -> dict[str, float | None]:
    """{layer: sparsity} before it is checked against the pattern."""
    if callable(allocation):
        found = allocation(
            {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}, sparsity
        )
        if set(found) != set(shapes):
            raise ValueError(
                f"the allocation must give a sparsity for every layer, but only one side has {min(set(found) ^ set(shapes))}"
            )
    elif isinstance(allocation, Mapping):
        for rule in allocation:
            if not any(matches(name, (rule,)) for name in shapes):
                raise ValueError(
                    f"allocation rule {rule!r} matches no layer (layers: {', '.join(list(shapes)[:8])} ...)"
                )
        rules = {name: best_rule(name, allocation) for name in shapes}
        found = {name: sparsity if rule is None else allocation[rule] for name, rule in rules.items()}
    else:
        choose("allocation", allocation, ("uniform",))
        found = dict.fromkeys(shapes, sparsity)
    return {name: None if found[name] is None else float(found[name]) for name in shapes}


def _check_uniform(sparsity, pattern) -> None:
    if not isinstance(pattern, NM):
        check_sparsity(sparsity)
    elif sparsity and abs(check_sparsity(sparsity) - pattern.sparsity) > 1e-9:
        raise ValueError(f"{pattern.n}:{pattern.m} has sparsity {pattern.sparsity:g}, got {sparsity}")


def _report(asked: dict, stream: Stream, layers: dict) -> dict:
    size = sum(layer["size"] for layer in layers.values())
    kept = sum(layer["density"] * layer["size"] for layer in layers.values())
    sequences, length = stream.hidden.shape[:2]
    return {
        **asked,
        "sparsity": 1 - kept / size,
        "asked": asked["sparsity"],
        "sequences": sequences,
        "length": length,
        "layers": layers,
    }


@contextmanager
def naming(layer: str):
    """Puts the layer's name before what methods warn of or raise; gives the list of those warnings."""
    notes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CompressionWarning)
        try:
            yield notes
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
    for found in caught:
        text = found.message
        if issubclass(found.category, CompressionWarning):
            notes.append(str(text))
            text = f"{layer}: {text}"
        warnings.warn_explicit(text, found.category, found.filename, found.lineno)


def _node(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@jax.jit
def _finite(array):
    return jnp.isfinite(array).all()


def _kept(mask) -> int:
    return int(count(mask))


def _copy(tree, leaf=lambda x: x):
    """Nested dicts, which may be changed, from nested mappings."""
    if isinstance(tree, Mapping):
        return {key: _copy(part, leaf) for key, part in tree.items()}
    return leaf(tree)


def _dense_masks(tree):
    return _copy(tree, lambda _: jnp.asarray(True))


def _check_dense(part: str, params, layers) -> None:
    for path in layers:
        if is_packed(_node(params, path.split("/"))):
            raise ValueError(f"{part}/{path} is packed, and only dense kernels can be compressed; unpack it")


def _like(tree, example):
    """A tree of host arrays laid out as the arrays of another."""

    def place(leaf, old):
        return jax.device_put(leaf, old.sharding) if isinstance(old, jax.Array) else leaf

    return jax.tree.map(place, tree, example)


def _hidden(progress: bool | None) -> bool | None:
    """tqdm's `disable`, whose None asks whether stderr is a terminal."""
    return None if progress is None else not progress
