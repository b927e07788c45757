"""A database of every layer compressed to several levels, models stitched from it, and what a model loses.

A *unit* is one matrix `(in, out)`: a linear kernel, or one expert of an expert kernel. Units of equal shape and dtype
lie in one array `(units, levels, in, out)`, so that a stitched model is one gather per kernel with a traced index: all
genomes of a search share one compiled evaluation.

Memory: the database holds `levels` copies of the blocks' kernels, in their dtype, on the host while it is built and on
the device from then on (17 copies for 8 levels on either side of the target), and one bit per weight and level on
the host for the masks. The reference of the KL divergence takes 8 min(top, vocabulary) + 4 bytes per token, on the
host.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import masks as masks_lib
from sparsejax.compress.base import Layerwise
from sparsejax.compress.calibration import prune_layers
from sparsejax.compress.stream import Stream
from sparsejax.compress.topkld import divergence

LOSSES = ("kl", "loss")


class Unit(NamedTuple):
    """leaf: path of the kernel; expert: index in it or None; stack, row: its place in the database."""

    leaf: str
    expert: int | None
    stack: int
    row: int

    @property
    def name(self) -> str:
        return self.leaf if self.expert is None else f"{self.leaf}[{self.expert}]"


class Database(NamedTuple):
    """stacks: an array `(units, levels, in, out)` per shape and dtype; units: all of them; dropped: int `(units,
    levels)`, how many weights the mask of each drops; bits: per unit and level the mask, packed to uint8 on the host."""

    stacks: list[Any]
    units: tuple[Unit, ...]
    dropped: np.ndarray
    bits: list[list[np.ndarray]]


def find_units(model, params: Mapping, tokens) -> tuple[tuple[Unit, ...], list[tuple[int, int, int]]]:
    """The units of a model in order of use, and `(units, in, out)` of every stack."""
    stream = Stream(model, params, np.asarray(tokens)[:1])
    units, counts = [], {}
    for block in stream.blocks:
        leaves = masks_lib.flatten(params[block])
        for name, layer in stream.layers[block].items():
            kind = (layer.shape[-2:], leaves[name].dtype)
            for expert in range(layer.shape[0]) if len(layer.shape) == 3 else (None,):
                row = counts.setdefault(kind, 0)
                units.append(Unit(f"{block}/{name}", expert, list(counts).index(kind), row))
                counts[kind] += 1
    return tuple(units), [(count, *shape) for (shape, _), count in counts.items()]


def build(
    model,
    params: Mapping,
    tokens,
    variants: Callable[[tuple[int, int]], Sequence[tuple[Layerwise, float]]],
    *,
    base: int,
    propagate: str = "dense",
    batch: int = 8,
    progress: bool | None = None,
) -> Database:
    """Compresses every unit to every level, block by block.

    Args:
      model, params, tokens, propagate, batch, progress: as in `prune_layers`.
      variants: for the shape of a unit, (method, sparsity) of every level; as many for each shape.
      base: the index of the level that earlier blocks have if they are propagated "pruned".

    Raises:
      ValueError: as `prune_layers`, and as the methods, naming the layer.
    """
    units, shapes = find_units(model, params, tokens)
    number = len(variants(shapes[0][1:]))
    leaves = masks_lib.flatten(params)
    dtypes = {unit.stack: leaves[unit.leaf].dtype for unit in units}
    stacks = [np.zeros((shape[0], number, *shape[1:]), dtypes[i]) for i, shape in enumerate(shapes)]
    zeros, bits = np.zeros((len(units), number), np.int64), [[] for _ in units]
    waiting = iter(enumerate(units))  # `prune_layers` takes layers and experts in the same order

    def record(kernel, stats, *_):
        i, unit = next(waiting)
        found = [method.prune(kernel, stats, s, "unstructured") for method, s in variants(kernel.shape)]
        for level, (pruned, mask) in enumerate(found):
            mask = np.asarray(mask)
            stacks[unit.stack][unit.row, level] = np.asarray(pruned)
            bits[i].append(np.packbits(mask))
            zeros[i, level] = mask.size - mask.sum()
        return found[base]

    needs = tuple(dict.fromkeys(need for method, _ in variants(shapes[0][1:]) for need in method.needs))
    recorder = Layerwise("levels", needs, record, host=True)
    prune_layers(recorder, model, params, tokens, 0.0, propagate=propagate, batch=batch, progress=progress)
    return Database([jnp.asarray(stack) for stack in stacks], units, zeros, bits)


def stitch(params, stacks, units: Sequence[Unit], levels):
    """Parameters whose kernels come from the database; jit-able.

    Args:
      params: of the model; the kernels in the database may be anything.
      stacks, units: of the `Database`.
      levels: int `(units,)`, an index of a level for each, which may be traced.
    """
    found = {}
    for i, unit in enumerate(units):
        found.setdefault(unit.leaf, []).append(stacks[unit.stack][unit.row, levels[i]])
    experts = {unit.leaf for unit in units if unit.expert is not None}
    return _replaced(params, {k: jnp.stack(v) if k in experts else v[0] for k, v in found.items()})


def stitch_masks(params, database: Database, levels):
    """The masks of a stitched model: a tree like `params` with bools for the kernels of the database."""
    found = {}
    for unit, level, bits in zip(database.units, levels, database.bits, strict=True):
        shape = database.stacks[unit.stack].shape[-2:]
        mask = np.unpackbits(bits[int(level)], count=shape[0] * shape[1]).astype(bool).reshape(shape)
        found.setdefault(unit.leaf, []).append(mask)
    experts = {unit.leaf for unit in database.units if unit.expert is not None}
    found = {k: jnp.asarray(np.stack(v) if k in experts else v[0]) for k, v in found.items()}
    return masks_lib.map_with_name(lambda name, _: found.get(name, jnp.asarray(True)), params)


def without(params, units: Sequence[Unit]):
    """The parameters with scalars in place of the kernels that a database replaces."""
    gone = {unit.leaf for unit in units}
    return masks_lib.map_with_name(lambda name, leaf: jnp.zeros(()) if name in gone else leaf, params)


def _replaced(params, leaves: Mapping):
    return masks_lib.map_with_name(lambda name, leaf: leaves.get(name, leaf), params)


class Loss:
    """What candidates of a search lose on sequences: `loss(genomes (n, units), sequences (b,)) -> n floats`.

    kind "kl": mean over tokens of KL(p || q), p the dense model's predictions, q the candidate's, over the `top`
    tokens of highest p and, as one more outcome, all others together: a lower bound, exact for `top` of the
    vocabulary or more. kind "loss": mean cross entropy of the next token, in nats.
    """

    def __init__(
        self, model, params, tokens, assemble: Callable, kind: str = "kl", top: int = 512, batch: int = 8
    ):
        """Runs the dense model.

        Args:
          model, params: the dense model.
          tokens: int32 `(sequences, length)`.
          assemble: `genome (units,) int, traced -> parameters`, jit-able, made with `jax.tree_util.Partial` so that the
            arrays it holds are arguments of the compiled function.
          kind: of `LOSSES`.
          top: how many tokens of p are kept.
          batch: sequences that go through the model at once.

        Raises:
          ValueError: for an unknown kind, top < 1, or sequences of one token and "loss".
        """
        masks_lib.choose("fitness", kind, LOSSES)
        if top < 1:
            raise ValueError(f"top must be at least 1 token, got {top}")
        self.tokens = np.asarray(tokens)
        if kind == "loss" and self.tokens.shape[1] < 2:
            raise ValueError(
                f"the loss of the next token needs sequences of 2 tokens, got {self.tokens.shape[1]}"
            )
        self._model, self._assemble, self._batch = model, assemble, min(batch, len(self.tokens))
        self._reference = self._run_dense(params, top) if kind == "kl" else None

    def _run_dense(self, params, top: int):
        parts = []
        for first in range(0, len(self.tokens), self._batch):
            tokens = jnp.asarray(self.tokens[first : first + self._batch])
            parts.append(jax.device_get(_top(params, tokens, self._model, top)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def __call__(self, genomes, sequences) -> list[float]:
        sequences = np.asarray(sequences)
        totals = [0.0] * len(genomes)
        genomes = [jnp.asarray(genome) for genome in genomes]
        for first in range(0, len(sequences), self._batch):
            chosen = sequences[first : first + self._batch]
            weights = np.arange(self._batch) < len(chosen)
            chosen = np.resize(chosen, self._batch)  # one shape for all; what is repeated weighs nothing
            tokens, reference = jax.tree.map(
                lambda x, at=chosen: jnp.asarray(x[at]), (self.tokens, self._reference)
            )
            parts = [_loss(self._assemble, g, tokens, reference, weights, self._model) for g in genomes]
            totals = [total + float(part) for total, part in zip(totals, jax.device_get(parts), strict=True)]
        return [total / len(sequences) for total in totals]


@partial(jax.jit, static_argnames=("model", "top"))
def _top(params, tokens, model, top):
    """(log p of the top tokens, their indices, log p of all others or None), each `(batch, length, ...)`."""
    logits = jax.nn.log_softmax(model.apply({"params": params}, tokens))
    values, index = jax.lax.top_k(logits, min(top, logits.shape[-1]))
    return values, index, _others(logits, index)


def _others(logits, index):
    """The log of the sum of exp(logits) outside of `index`; None if nothing is."""
    if index.shape[-1] == logits.shape[-1]:
        return None
    hidden = jnp.put_along_axis(logits, index, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(hidden, axis=-1)


@partial(jax.jit, static_argnames="model")
def _loss(assemble, genome, tokens, reference, weights, model):
    """The sum over the sequences of weight 1 of the mean over their tokens."""
    logits = jax.nn.log_softmax(model.apply({"params": assemble(genome)}, tokens))
    if reference is None:
        chosen = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)
        return -jnp.sum(jnp.mean(chosen[..., 0], axis=1) * weights)
    values, index, others = reference
    kl = divergence(values, jnp.take_along_axis(logits, index, axis=-1))
    if others is not None:
        kl += divergence(others[..., None], _others(logits, index)[..., None])
    return jnp.sum(jnp.mean(kl, axis=1) * weights)
