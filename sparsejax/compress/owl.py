"""OWL: Outlier Weighed Layerwise sparsity (Yin et al. 2024), an allocation over the blocks of a model.

Of block l let A be the Wanda scores |W_ij| a_i of all its linear layers in the dense model, and

  D_l = share of entries of A above multiple * mean(A)
  r_l = 2 width (D_l - min D) / (max D - min D)                  (0 if all D are equal)
  density_l = (1 - sparsity) + r_l - mean(r)

so that blocks with outliers stay denser, by at most 2 width. All layers of a block get its density. The mean of r is
weighted by the sizes of the blocks (the released code assumes equal ones), so that the densities spend the budget
exactly. A sparsity at or below 0 becomes `LEAST`, or the budget if that is less, which spends less than the budget.

For N:M, with r_l without the factor 2, block l drops M - N - round(r_l - mean(r)) of every M.

The published commands use multiple=5 and width=0.08, for N:M 6 and 2; these are the defaults.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sparsejax.compress import statistics
from sparsejax.compress.base import layer_budget
from sparsejax.compress.calibration import Observed, observe
from sparsejax.patterns import NM, Pattern, Unstructured

LEAST = 0.01


class Outliers(NamedTuple):
    """ratio: D_l; size: weights of the block's linear layers; layers: their paths in the model."""

    ratio: float
    size: int
    layers: tuple[str, ...]


def owl(
    model,
    params: Mapping,
    tokens,
    sparsity: float | None,
    *,
    pattern: str | Pattern = "unstructured",
    multiple: float | None = None,
    width: float | None = None,
    batch: int = 8,
    progress: bool | None = None,
) -> dict[str, float]:
    """The sparsity of every linear layer, for `allocation` of `sparsejax.compress.prune_layers`.

    Args:
      model, params, tokens: as for `prune_layers`; the params are dense.
      sparsity: of all layers together, in [0, 1); None with N:M.
      pattern: "unstructured" or N:M.
      multiple: how many times the mean score an outlier is; None for 5 (N:M: 6).
      width: half the range of the densities; None for 0.08. With N:M the range of N, None for 2.
      batch, progress: as in `prune_layers`.

    Returns:
      {path of a kernel, as `block_0/attention/query/kernel`: sparsity}.

    Raises:
      ValueError: for a pattern that is neither, a width or multiple below 0, a model without linear layers in its
        blocks, and if a block would have to be empty.
    """
    sparsity, pattern = layer_budget("owl", sparsity, pattern, (Unstructured, NM))
    grouped = isinstance(pattern, NM)
    multiple = (6.0 if grouped else 5.0) if multiple is None else multiple
    found = outliers(model, params, tokens, multiple=multiple, batch=batch, progress=progress)
    if grouped:
        sparsities = group_sparsities(found, pattern, 2.0 if width is None else width)
    else:
        sparsities = block_sparsities(found, sparsity, 0.08 if width is None else width)
    return {layer: sparsities[name] for name, block in found.items() for layer in block.layers}


def outliers(
    model, params: Mapping, tokens, *, multiple: float = 5.0, batch: int = 8, progress: bool | None = None
) -> dict[str, Outliers]:
    """The outliers of every block of the dense model that has linear layers; arguments as in `owl`.

    An expert that saw no token is scored as `prune_layers` does it, by magnitude.
    """
    if not multiple >= 0:
        raise ValueError(f"multiple of owl must be at least 0, got {multiple!r}")
    found = {}
    for block in observe(model, params, tokens, ("square",), batch=batch, progress=progress):
        if block.layers:
            found[block.name] = _of_block(block, multiple)
        del block  # before the next one is read
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer in its blocks, of which owl could find outliers"
        )
    return found


def _of_block(block: Observed, multiple: float) -> Outliers:
    scores = [_scores(_at(block.params, path), stats) for path, stats in block.stats.items()]
    size = sum(leaf.size for leaf in scores)
    mean = sum(leaf.sum(dtype=np.float64) for leaf in scores) / size
    ratio = sum(int((leaf > multiple * mean).sum()) for leaf in scores) / size
    return Outliers(ratio, size, tuple(f"{block.name}/{path}" for path in block.stats))


def _scores(kernel, stats):
    """|W_ij| a_i, numpy float32 of the shape of the kernel."""
    seen = np.asarray(stats["count"])[..., None] > 0
    square = np.where(seen, stats["square"], statistics.isotropic(stats)["square"])
    return np.abs(np.asarray(kernel, np.float32)) * np.sqrt(square)[..., None]


def block_sparsities(
    blocks: Mapping[str, Outliers], sparsity: float, width: float = 0.08
) -> dict[str, float]:
    """1 - density_l of every block, see the module; errors as in `owl`."""
    result = {}
    for name, shift in _shifts(blocks, width, 2.0).items():
        result[name] = sparsity - shift if sparsity > max(shift, 0) else min(LEAST, sparsity)
        if result[name] >= 1:
            raise ValueError(
                f"owl with width={width} would drop all of {name} at sparsity={sparsity}; use a smaller width"
            )
    return result


def group_sparsities(blocks: Mapping[str, Outliers], pattern: NM, width: float = 2.0) -> dict[str, float]:
    """What N:M drops of every block, see the module, as a share of M; errors as in `owl`."""
    result = {}
    for name, shift in _shifts(blocks, width, 1.0).items():
        drops = max(pattern.m - pattern.n - round(shift), 0)
        if drops >= pattern.m:
            raise ValueError(
                f"owl with width={width} would drop all of {name} with {pattern.n}:{pattern.m}; use a smaller width"
            )
        result[name] = drops / pattern.m
    return result


def _shifts(blocks: Mapping[str, Outliers], width: float, factor: float) -> dict[str, float]:
    """r_l - mean(r) with a range of `factor * width`."""
    if not width >= 0:
        raise ValueError(f"width of owl must be at least 0, got {width!r}")
    ratios = np.array([block.ratio for block in blocks.values()])
    spread = ratios.max() - ratios.min()
    shares = factor * width * (ratios - ratios.min()) / (spread if spread > 0 else 1.0)
    mean = np.average(shares, weights=[block.size for block in blocks.values()])
    return {name: float(share - mean) for name, share in zip(blocks, shares, strict=True)}


def _at(params, path: str):
    for key in path.split("/"):
        params = params[key]
    return params
