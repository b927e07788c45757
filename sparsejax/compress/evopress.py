"""EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search (Sieberling et al. 2024).

How much each part of a model is compressed is searched for, at a fixed total. Three searches, each over genomes of
integer levels (`sparsejax.compress.evolution`):

  sparsity  units: linear layers (matrices). With N_i weights in unit i and Delta = floor(min(s, 1 - s) / (2 levels) N),
            N the weights of the smallest unit, level l drops floor(s N_i) + l Delta weights, |l| <= levels: every
            level moves as many weights in every layer, so that sum l = 0 keeps the total.
  depth     units: attention and feed-forward sub-blocks; level 1: dropped. floor(s n) of the n attentions go, and of the
            feed-forward networks; dropped ones change place within their type.
  bits      units: linear layers; level: bits of a weight, which change place among layers of equal size.

Fitness is the mean KL divergence per token of the candidate from the dense model, or the loss. Layers are compressed
once, to all levels, from the inputs in the dense model; candidates are stitched from them (`sparsejax.compress.levels`,
which tells the memory), so that one evaluation is compiled for all.

Departures: the released search over depth may start from equal genomes; Delta comes from the smallest layer instead
of the square of the width, which is the same without grouped keys; floor(s N_i) weights are dropped at level 0, so
that counts are exact. Bits are searched among consecutive numbers of bits.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import masks as masks_lib
from sparsejax.compress import evolution
from sparsejax.compress.base import Compressed, Layerwise, Whole, check_pattern, dropped
from sparsejax.compress.levels import (
    LOSSES,
    Loss,
    build,
    find_units,
    stitch,
    stitch_masks,
    without,
)
from sparsejax.compress.quantise import rtn
from sparsejax.compress.shrink import CONSUMERS, linear_weights, shrink
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.models import Transformer
from sparsejax.models.layers import layer_sizes
from sparsejax.patterns import Unstructured

# generations (of depth: from k and n), offspring, and (survivors, tokens) of each stage, as published
_DEFAULTS = {
    "sparsity": (400, 64, ((8, 2048), (2, 16384), (1, 65536))),
    "depth": (None, 32, ((2, 2048), (1, 32768))),
    "bits": (150, 128, ((16, 2048), (4, 16384), (1, 131072))),
}
FILE = "search.json"


def evopress(
    method: Layerwise | Callable[[int], Layerwise] | None = None,
    *,
    search: str = "sparsity",
    generations: int | None = None,
    offspring: int | None = None,
    stages: Sequence[tuple[int, int]] | None = None,
    starts: int = 64,
    moves: int = 3,
    levels: int = 8,
    bits: int = 3,
    widths: tuple[int, int] = (2, 6),
    fitness: str = "kl",
    top: int = 512,
    propagate: str = "dense",
    batch: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Whole:
    """Searches how much of each layer (or which sub-blocks) to compress, and compresses so.

    Args:
      method: makes the levels. "sparsity": a `Layerwise` that drops floor(sparsity in out) weights of a layer, default
        `sparsegpt()`. "bits": a function of a number of bits that gives one, default `rtn(bits=...)`. "depth": None.
      search: "sparsity", "depth" or "bits". At sparsity 0 the first two return the model as it is; the sparsity of
        "bits" must be 0 or None.
      generations, offspring, stages: see `evolution.search`, stages as (survivors, tokens), the last with 1 survivor; None
        for the paper's: 400, 64, (8, 2048), (2, 16384), (1, 65536); for depth k (n - k) / 1.5, 32, (2, 2048), (1, 32768)
        with k the dropped of the n sub-blocks of a type; for bits 150, 128, (16, 2048), (4, 16384), (1, 131072). A stage
        takes whole sequences, and at most all there are.
      starts: of "depth": the first parent is the best of so many random genomes.
      moves: largest number of moves of an offspring.
      levels: of "sparsity": steps on either side of the target.
      bits, widths: of "bits": the mean number over layers of one size, where the search starts, and the fewest and
        most.
      fitness: "kl" or "loss"; top: tokens that the KL divergence tells apart, see `levels.Loss`.
      propagate: inputs of a block while levels are made: of "dense" blocks before it, or "pruned" to the uniform level.
      batch: sequences that go through the model at once.
      seed: of the search.
      folder: holds `search.json`, the state after every generation; a call that differs in `generations` only goes on
        from there. None keeps none.

    The report has "search", "sparsity" (reached: dropped weights over those of the linear layers), "units" {name: level,
    bits, or whether it is dropped}, "fitness" {"start" (all equal; of depth, the first sub-blocks dropped), "found"} on
    as many sequences as the last stage has, and "history", one record per generation.

    Raises:
      ValueError: for an unknown search, fitness or number out of its range; when it runs, for a pattern other than
        unstructured, a sparsity that the search cannot have, a method that misses the counts, for depth a model other
        than a `Transformer` of dense layers without biases of experts' last layers, and a `search.json` of another
        search.
    """
    masks_lib.choose("search", search, _DEFAULTS)
    masks_lib.choose("fitness", fitness, LOSSES)
    counts = {"levels": levels, "moves": moves, "starts": starts, "batch": batch, "offspring": offspring}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} of evopress must be at least 1, got {value}")
    if search == "bits" and not widths[0] <= bits <= widths[1]:
        raise ValueError(f"bits={bits} must lie in widths={widths[0]} to {widths[1]}")
    if method is not None and (search == "depth" or isinstance(method, Layerwise) != (search == "sparsity")):
        kinds = {
            "sparsity": "a Layerwise",
            "bits": "a function of bits that gives a Layerwise",
            "depth": "None",
        }
        raise ValueError(f"the method of a search over {search} must be {kinds[search]}, got {method!r}")
    usual = _DEFAULTS[search]
    generations = usual[0] if generations is None else generations
    offspring, stages = offspring or usual[1], stages or usual[2]

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None) -> Compressed:
        check_pattern("evopress", pattern or "unstructured", (Unstructured,))
        target = masks_lib.check_sparsity(0.0 if search == "bits" and sparsity is None else sparsity)
        if search == "bits" and target:
            raise ValueError(
                f"a search over bits keeps every weight, so its sparsity must be 0, got {sparsity}"
            )
        tokens, params = np.asarray(tokens), {name: params[name] for name in model.parts()}
        if search != "bits" and not target:
            return Compressed(
                model, params, masks_lib.dense_masks(params), {"search": search, "sparsity": 0.0}
            )
        if search == "depth":
            problem = _Depth(model, params, target)
        else:
            plan = partial(_sparsity_plan, method, target, levels)
            if search == "bits":
                plan = partial(_bits_plan, method, bits, widths)
            problem = _Layers(model, params, tokens, plan, propagate, batch, progress)
        steps = problem.generations if generations is None else generations
        loss = Loss(model, params, tokens, problem.assemble, fitness, top, batch)
        rounds = [evolution.Stage(survivors, max(1, n // tokens.shape[1])) for survivors, n in stages]
        settings = {"search": search, "sparsity": target, "fitness": fitness, "top": top}
        if folder is not None:
            settings |= {"model": repr(model), "data": _digest(params, tokens), "levels": problem.digest()}
        found = evolution.search(
            problem.space,
            problem.start,
            loss,
            rounds,
            pool=len(tokens),
            generations=steps,
            offspring=offspring,
            moves=moves,
            starts=starts if search == "depth" else 0,
            seed=seed,
            path=None if folder is None else Path(folder) / FILE,
            settings=settings,
            progress=progress,
        )
        sample = np.arange(min(rounds[-1].sequences, len(tokens)))
        before, after = loss(np.array([problem.start, found.genome]), sample)
        new, new_params, masks, report = problem.finish(found.genome)
        report |= {"search": search, "fitness": {"start": before, "found": after}, "history": found.history}
        return Compressed(new, new_params, masks, report)

    return Whole("evopress", run)


# --- what is searched --------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How levels of layers are made.

    Attributes:
      variants: as in `levels.build`; dropped: `shape -> weights that each level drops`, None for no mask.
      lower, start: the smallest level, and that of every unit in the first parent.
      group: `shape -> key`: units of one key exchange levels.
    """

    variants: Callable
    dropped: Callable | None
    lower: int
    start: int
    group: Callable


def _sparsity_plan(method, sparsity: float, levels: int, smallest: int) -> _Plan:
    method = sparsegpt() if method is None else method
    step = math.floor(min(sparsity, 1 - sparsity) / (2 * levels) * smallest)
    if not step:
        raise ValueError(
            f"levels={levels} at sparsity {sparsity} move no weight of a layer of {smallest} weights; take fewer levels"
        )

    def counts(shape):
        size = math.prod(shape)
        return [dropped(sparsity, size) + level * step for level in range(-levels, levels + 1)]

    def variants(shape):
        return [(method, count / math.prod(shape)) for count in counts(shape)]

    return _Plan(variants, counts, -levels, 0, lambda shape: 0)


def _bits_plan(method, bits: int, widths: tuple[int, int], smallest: int) -> _Plan:
    del smallest
    method = method or (lambda bits: rtn(bits=bits))
    variants = [(method(number), 0.0) for number in range(widths[0], widths[1] + 1)]
    return _Plan(lambda shape: variants, None, widths[0], bits, math.prod)


class _Layers:
    """Units are matrices, their levels lie in a database."""

    def __init__(self, model, params, tokens, plan: Callable[[int], _Plan], propagate, batch, progress):
        units, shapes = find_units(model, params, tokens)
        plan = plan(min(math.prod(shape[1:]) for shape in shapes))
        self.plan, self.model, self.params = plan, model, params
        self.database = build(
            model,
            params,
            tokens,
            plan.variants,
            base=plan.start - plan.lower,
            propagate=propagate,
            batch=batch,
            progress=progress,
        )
        sizes = [shapes[unit.stack][1:] for unit in units]
        self._check_counts(units, sizes)
        keys = [plan.group(shape) for shape in sizes]
        labels = tuple(list(dict.fromkeys(keys)).index(key) for key in keys)
        number = len(plan.variants(sizes[0]))
        self.space = evolution.Space(
            tuple(unit.name for unit in units),
            (plan.lower,) * len(units),
            (plan.lower + number - 1,) * len(units),
            labels,
        )
        self.start = (plan.start,) * len(units)
        self.weights = sum(map(math.prod, sizes))
        assemble = partial(_stitched, units, plan.lower)
        self.assemble = jax.tree_util.Partial(assemble, without(params, units), self.database.stacks)

    def _check_counts(self, units, sizes):
        if self.plan.dropped is None:
            return
        for unit, shape, found in zip(units, sizes, self.database.dropped, strict=True):
            for wanted, count in zip(self.plan.dropped(shape), found, strict=True):
                if wanted != count:
                    raise ValueError(
                        f"the method drops {count} weights of {unit.name} instead of {wanted}; evopress needs one that "
                        "counts over a layer, such as sparsegpt() or wanda(scope='layer')"
                    )

    def digest(self) -> str:
        """A hash of all levels of all units, whatever made them."""
        masks = [mask for levels in self.database.bits for mask in levels]
        return _hash([*self.database.stacks, *masks])

    def finish(self, genome):
        """(model, params, masks, report) of a genome."""
        database, index = self.database, np.array(genome) - self.plan.lower
        params = jax.jit(lambda assemble, genome: assemble(genome))(self.assemble, np.array(genome))
        report = {"units": dict(zip(self.space.names, genome, strict=True))}
        if self.plan.dropped is None:
            return self.model, params, masks_lib.dense_masks(params), {**report, "sparsity": 0.0}
        zeros = int(database.dropped[np.arange(len(index)), index].sum())
        masks = stitch_masks(params, database, index)
        return self.model, params, masks, {**report, "sparsity": zeros / self.weights}


def _stitched(units, lower, params, stacks, genome):
    return stitch(params, stacks, units, genome - lower)


class _Depth:
    """Units are sub-blocks; while the search goes on, dropped ones add exact zeros to the residual stream."""

    def __init__(self, model, params, sparsity: float):
        if not isinstance(model, Transformer):
            raise ValueError(f"sub-blocks can be dropped from a Transformer only, got {type(model).__name__}")
        if model.linear is not None:
            raise ValueError(
                f"sub-blocks can be dropped from dense layers only, got linear={dict(model.linear)}"
            )
        self.model, self.params = model, params
        units = [(i, sub) for sub in CONSUMERS for i in range(model.depth) if sub in params[f"block_{i}"]]
        kinds = [list(CONSUMERS).index(sub) for _, sub in units]
        counts = np.bincount(kinds)
        gone = [dropped(sparsity, int(n)) for n in counts]
        if not any(gone):
            raise ValueError(
                f"sparsity {sparsity} drops no sub-block: there are {int(counts.max())} of a type"
            )
        for i in range(model.depth):
            if layer_sizes(model, i)["experts"] and "bias" in params[f"block_{i}"].get("mlp", {}).get(
                "down", {}
            ):
                raise ValueError(
                    f"block_{i}/mlp/down has a bias for each expert, so that a search over depth cannot drop it"
                )
        names = tuple(f"block_{i}/{sub}" for i, sub in units)
        self.units = units
        self.space = evolution.Space(names, (0,) * len(units), (1,) * len(units), tuple(kinds))
        self.start = tuple(int(i < k) for n, k in zip(counts, gone, strict=True) for i in range(n))
        self.generations = max(
            math.ceil(k * (n - k) / 1.5) for n, k in zip(counts.tolist(), gone, strict=True)
        )
        self.assemble = jax.tree_util.Partial(partial(_silenced, tuple(units)), params)

    def digest(self) -> None:
        """Nothing: there is one way to drop a sub-block."""

    def finish(self, genome):
        """(model, params, masks, report) of a genome."""
        gone = [unit for unit, level in zip(self.units, genome, strict=True) if level]
        keep = {kind: {i: () for i, sub in gone if sub == kind} for kind in CONSUMERS}
        silent = _silenced(self.units, self.params, np.array(genome))
        model, params = shrink(self.model, silent, heads=keep["attention"], channels=keep["mlp"])
        before, after = (linear_weights(tree, self.model.depth) for tree in (self.params, params))
        dropped_units = dict(zip(self.space.names, map(bool, genome), strict=True))
        return model, params, None, {"units": dropped_units, "sparsity": 1 - after / before}


def _silenced(units, params, genome):
    """The parameters with zeros for the last layers, biases too, of the sub-blocks that a genome drops."""
    params = {name: dict(part) for name, part in params.items()}
    for level, (i, sub) in zip(genome, units, strict=True):
        part = params[f"block_{i}"]
        last = jax.tree.map(
            lambda x, level=level: jnp.where(level, jnp.zeros_like(x), x), part[sub][CONSUMERS[sub]]
        )
        part[sub] = {**part[sub], CONSUMERS[sub]: last}
    return params


def _digest(params, tokens) -> str:
    """A hash of the model and the data, which a search that goes on must share."""
    leaves = masks_lib.flatten(params)
    return _hash([tokens, *leaves.values()], " ".join(leaves))


def _hash(arrays, text: str = "") -> str:
    found = hashlib.sha256(text.encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
