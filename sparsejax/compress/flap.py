"""FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models (An et al. 2024).

One dense pass gives the mean mu_i and the variance v_i over the calibration tokens of every input i of `out` and
`down`, whose kernels W are `(in, out)`. An input's score is

  WIFV  v_i ||W_i,:||_2^2        IFV  v_i        WIFN  a_i mean_j |W_ij|   (a_i root mean square)

WIFV is exactly the mean squared error that is left when the input is replaced by its mean, which is a bias:

  b += sum over removed i of mu_i W_i,:

Attention's scores are squared once more, as in the authors' code. Then the scores of a layer are standardised,
(S - mean) / std, and those of a head group's inputs averaged. What is removed:

  AL-AM  the lowest scores of all layers' head groups and channels in one pool
  UL-UM  those of every layer, the same share of each (`sparsejax.compress.groups.uniform`)
  AL-MM  those of all layers' head groups, `heads` of them, and those of all layers' channels for the rest

Departures. The cost of a head group is its number of weights, where the authors take 512 / 3 channels of a gated
network for heads of width 128. The scores kept are those of highest rank until the weights come nearest to the
budget, where they compare with a threshold. Statistics are those of all tokens (the released running variance is
not). A sub-block whose bias could not move (`sparsejax.compress.groups.bound`) keeps its best unit.
"""

from collections.abc import Sequence

import numpy as np

from sparsejax.compress.base import Whole
from sparsejax.compress.groups import (
    best,
    consumer,
    pooled,
    prepare,
    protect,
    remove,
    share_of,
    uniform,
    units_of,
    watch,
)
from sparsejax.compress.shrink import CONSUMERS, linear_weights
from sparsejax.masks import choose

NEEDS = {"WIFV": ("variance",), "IFV": ("variance",), "WIFN": ("variance", "square")}
ALLOCATIONS = ("AL-AM", "UL-UM", "AL-MM")


def scores(kernel, stats, metric: str = "WIFV"):
    """The metric of every input, float64 `(in,)`.

    Args:
      kernel: `(in, out)`.
      stats: with "variance" or "square" `(in,)`, see `NEEDS`.
      metric: a key of `NEEDS`.
    """
    choose("metric", metric, NEEDS)
    kernel = np.asarray(kernel, np.float64)
    if metric == "WIFN":
        return np.sqrt(np.asarray(stats["square"], np.float64)) * np.abs(kernel).mean(1)
    variance = np.asarray(stats["variance"], np.float64)
    return variance * (kernel**2).sum(1) if metric == "WIFV" else variance


def flap(
    *,
    metric: str = "WIFV",
    allocation: str = "AL-AM",
    compensate: bool = True,
    heads: int | None = None,
    structures: Sequence[str] = ("heads", "channels"),
    batch: int = 8,
) -> Whole:
    """Heads and channels whose activation fluctuates least, replaced by their mean.

    Sparsity is the share of the blocks' weights that is removed; the paper's default is 0.2.

    Args:
      metric: a key of `NEEDS`.
      allocation: one of `ALLOCATIONS`.
      compensate: whether the removed inputs' mean becomes a bias of `out` and `down` (the model gets one if it
        has none).
      heads: head groups that AL-MM removes; None for at most the same share as of the channels, or more where the
        channels do not suffice.
      structures: what may be removed: "heads", "channels" or both.
      batch: sequences that go through a block at once.

    Raises:
      ValueError: for an unknown metric or allocation, and `heads` with another allocation than AL-MM; in `run` for
        more `heads` than may go, or so many or few that the sparsity cannot be reached.
    """
    choose("metric", metric, NEEDS)
    choose("allocation", allocation, ALLOCATIONS)
    if heads is not None and (allocation != "AL-MM" or heads < 0):
        raise ValueError(
            f"heads must be a number from 0 and needs allocation='AL-MM', got {heads} with {allocation}"
        )

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None):
        sparsity = prepare("flap", model, sparsity, pattern)
        units, found, means = units_of(model, structures), {}, {}
        for i, seen in watch(model, params, tokens, NEEDS[metric], batch=batch, progress=progress):
            for key in (key for key in units if key[0] == i):
                stats = seen.stats[f"{key[1]}/{CONSUMERS[key[1]]}/kernel"]
                means[key] = np.asarray(stats["mean"], np.float64)
                inputs = scores(consumer(seen.params, key[1]), stats, metric)
                found[key] = unit_scores(inputs, units[key], key[1])
        protect(model, found, compensate)
        kept = _allocate(allocation, found, units, sparsity, linear_weights(params, model.depth), heads)
        cut = [key for key in units if compensate and not kept[key].all()]
        biases = {
            key: _bias(kept[key], units[key], means[key], consumer(params[f"block_{key[0]}"], key[1]))
            for key in cut
        }
        findings = {"metric": metric, "allocation": allocation, "compensate": compensate}
        return remove(
            "flap", model, params, tokens, sparsity, kept, batch=batch, biases=biases, findings=findings
        )

    return Whole("flap", run)


def unit_scores(inputs, units, sub: str):
    """Standardised scores of a sub-block's units from those of its inputs."""
    inputs = inputs**2 if sub == "attention" else inputs
    spread = np.std(inputs, ddof=1) if inputs.size > 1 else 0.0
    standard = (inputs - inputs.mean()) / spread if spread > 0 else np.zeros_like(inputs)
    return standard.reshape(units.count, units.shared).mean(1)


def _allocate(allocation, found, units, sparsity, total, heads) -> dict:
    """{(block, sub-block): bool per unit}."""
    if allocation == "UL-UM":
        return uniform("flap", found, units, sparsity, total)
    share = share_of("flap", units, sparsity, total)
    own = sum(entry.count * entry.weight for entry in units.values())
    if allocation == "AL-AM":
        return pooled(found, units, own - sparsity * total)
    groups = {key: entry for key, entry in units.items() if key[1] == "attention"}
    channels = {key: entry for key, entry in units.items() if key[1] == "mlp"}
    left = sum(entry.count * entry.weight for entry in channels.values())
    flat = np.concatenate([np.zeros(0), *(found[key] for key in groups)])
    most = int((~np.isposinf(flat)).sum())
    if heads is None:
        weights = np.array([entry.weight for entry in groups.values() for _ in range(entry.count)], np.int64)
        totals = np.cumsum([0, *weights[np.argsort(-flat, kind="stable")[::-1]]])
        needed = np.searchsorted(totals, sparsity * total - left - 0.5)  # weights are whole numbers
        gone = min(max(int(share * flat.size), int(needed)), most)
    elif heads > most:
        raise ValueError(f"flap can remove at most {most} of {flat.size} head groups, got heads={heads}")
    else:
        gone = heads
    splits = np.cumsum([entry.count for entry in groups.values()])
    kept = dict(zip(groups, np.split(best(flat, flat.size - gone), splits), strict=False))
    removed = sum(int((~kept[key]).sum()) * entry.weight for key, entry in groups.items())
    budget = left - (sparsity * total - removed)
    if channels and heads is not None and not 0 <= budget <= left:
        raise ValueError(f"flap cannot reach sparsity {sparsity} when it removes {gone} head groups")
    return {**kept, **(pooled(found, channels, budget) if channels else {})}


def _bias(kept, units, means, kernel):
    """The mean of what the removed inputs gave, float32 `(out,)`."""
    gone = ~np.repeat(kept, units.shared)
    return (means[gone] @ kernel[gone]).astype(np.float32)


__all__ = ["ALLOCATIONS", "NEEDS", "flap", "scores", "unit_scores"]
