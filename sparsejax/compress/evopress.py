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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import masks as masks_lib
from sparsejax.compress import levels as database_lib
from sparsejax.compress.base import Compressed, Layerwise, Whole, check_pattern, dropped
from sparsejax.compress.evolution import Space, Stage, search
from sparsejax.compress.quantise import rtn
from sparsejax.compress.shrink import CONSUMERS, shrink
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.models import Transformer
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
      folder: holds `search.json`, the state after every generation; the same call goes on from there. None keeps none.

    The report has "search", "sparsity" (reached: dropped weights over those of the linear layers), "units" {name: level,
    bits, or whether it is dropped}, "fitness" {"start", "found"} on one minibatch of the last stage's size, and
    "history", one record per generation.

    Raises:
      ValueError: for an unknown search, fitness or number out of its range; when it runs, for a pattern other than
        unstructured, a sparsity that the search cannot have, a method that misses the counts, a model other than a
        `Transformer` for depth, and a `search.json` of another search.
    """
    masks_lib.choose("search", search, _DEFAULTS)
    masks_lib.choose("fitness", fitness, database_lib.LOSSES)
    for name, value in (("levels", levels), ("moves", moves), ("starts", starts), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} of evopress must be at least 1, got {value}")
    if search == "bits" and not widths[0] <= bits <= widths[1]:
        raise ValueError(f"bits={bits} must lie in widths={widths[0]} to {widths[1]}")
    usual = _DEFAULTS[search]
    offspring, stages = offspring or usual[1], stages or usual[2]

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None) -> Compressed:
        check_pattern("evopress", pattern or "unstructured", (Unstructured,))
        target = masks_lib.check_sparsity(sparsity or 0.0)
        if search == "bits" and target:
            raise ValueError(f"a search over bits keeps every weight, so its sparsity must be 0, got {sparsity}")
        tokens = np.asarray(tokens)
        params = {name: params[name] for name in model.parts()}
        if search == "depth":
            problem = _Depth(model, params, target)
        else:
            plan = _bits_plan(method, bits, widths) if search == "bits" else _sparsity_plan(method, target, levels)
            problem = _Layers(model, params, tokens, *plan, target, propagate, batch, progress)
        steps = generations if generations is not None else usual[0] or problem.generations
        loss = database_lib.Loss(model, params, tokens, problem.assemble, fitness, top, batch)
        rounds = [Stage(survivors, max(1, count // tokens.shape[1])) for survivors, count in stages]
        settings = {"search": search, "sparsity": target, "fitness": fitness, "data": _digest(params, tokens)}
        found = _search(
            problem.space,
            problem.start,
            loss,
            rounds,
            pool=len(tokens),
            generations=steps if problem.can_move else 0,
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
