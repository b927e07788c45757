"""CFSP: structured pruning with coarse-to-fine activation information (Wang et al. 2025).

Only channels of the feed-forward networks go. *Coarse*: how much every block turns its hidden states, in a dense
pass, decides how many channels it keeps,

  I_l = mean over tokens of arccos(cos(x_in, x_out)) / pi,   z_l = sigmoid(alpha s (I_l - mean I)),
  density_l = z_l / mean(z) (1 - p),

p the share of all channels to remove. If a density reaches 1, all z move towards their mean by the factor
f = mean(z) (1 / (1 - p) - 1) / (1.05 (max z - mean z)). *Fine*: with W_d (d, ff) the matrix of `down`, W_u and W_g
(ff, d) those of `up` and `gate`, and a_j the root mean square of input j of `down`, channel j scores

  S_j = mean_i [ N(|W_d| a_j^b) + N(|W_u|^T) + N(|W_g|^T) ]_ij  a_j^c.

N makes weights relative. The released code divides every column by its sum over i; each of the three terms then has
the mean 1 / d, and S_j is proportional to a_j^c: the weights cancel. Dividing every row by its sum over the channels
is the reading that does not (`normalise="row"`).

Departures: the paper sums angles over 128 sequences of 2048 tokens and divides by 10^4, so that s = 26.2144 for
mean angles. It rounds densities to 128 channels; here channels are rounded to `multiple` such that their sum over
the blocks is the asked one. Recovery is LoRA with the ranks of `adapter_ranks`.
"""

import numpy as np

from sparsejax.compress.base import Whole
from sparsejax.compress.groups import best, prepare, remove, share_of, units_of, watch
from sparsejax.compress.shrink import linear_weights
from sparsejax.masks import choose

NORMALISE = {"column": 0, "row": 1}  # the axis of (d, ff) that is summed
_SCALE = 128 * 2048 / 1e4


def _cosine(x, y):
    dot, squares = (x * y).sum(-1), (x * x).sum(-1) * (y * y).sum(-1)
    return np.clip(dot / np.sqrt(np.where(squares > 0, squares, 1)) + (squares == 0), -1, 1)


COARSE = {
    "angular": lambda x, y: np.arccos(_cosine(x, y)) / np.pi,
    "cosine": lambda x, y: 1 - _cosine(x, y),
    "mse": lambda x, y: ((x - y) ** 2).mean(-1),
    "mae": lambda x, y: np.abs(x - y).mean(-1),
}


def importance(inputs, outputs, coarse: str = "angular") -> float:
    """I_l: the mean over tokens of how far a block moves its hidden states `(sequences, length, width)`.

    A state that does not change has moved by 0, however the cosine is rounded.
    """
    found = choose("coarse", coarse, COARSE)
    total = 0.0
    for x, y in zip(inputs, outputs, strict=True):  # one sequence at a time, in float64
        moved = found(np.asarray(x, np.float64), np.asarray(y, np.float64))
        total += float(np.where((x == y).all(-1), 0, moved).sum())
    return total / (inputs.shape[0] * inputs.shape[1])


def densities(values, sparsity: float, alpha: float = 1.0, sizes=None):
    """The share of its channels that every block keeps; their mean, weighted by size, is exactly 1 - sparsity.

    Args:
      values: I_l, one per block.
      sparsity: p, in [0, 1).
      alpha: how sharply blocks differ; 0: not at all.
      sizes: how many channels every block has; None for equally many.
    """
    values = np.asarray(values, np.float64)
    z = 1 / (1 + np.exp(-alpha * _SCALE * (values - values.mean())))
    mean = np.average(z, weights=sizes)
    if z.max() / mean * (1 - sparsity) >= 1 and z.max() > mean:
        factor = mean * (1 / (1 - sparsity) - 1) / ((z.max() - mean) * 1.05)
        z = mean + factor * (z - mean)
    return z / mean * (1 - sparsity)


def channel_scores(down, up, gate, square, *, normalise: str = "column", b: float = 1.0, c: float = 1.0):
    """S_j, float64 `(ff,)`.

    Args:
      down: kernel `(ff, d)`.
      up, gate: kernels `(d, ff)`; gate may be None.
      square: mean squares of the inputs of `down`, `(ff,)`.
      normalise: a key of `NORMALISE`.
      b, c: exponents of the activations.
    """
    axis = choose("normalise", normalise, NORMALISE)
    activity = np.sqrt(np.asarray(square, np.float64))
    terms = [np.abs(np.asarray(down, np.float64)).T * activity**b]
    terms += [np.abs(np.asarray(kernel, np.float64)) for kernel in (up, gate) if kernel is not None]
    totals = [term.sum(axis, keepdims=True) for term in terms]
    relative = sum(term / np.where(total > 0, total, 1) for term, total in zip(terms, totals, strict=True))
    return relative.mean(0) * activity**c


def adapter_ranks(values, rank: int) -> list[int]:
    """LoRA ranks in proportion to the blocks' importance: at least 1, `rank` on average, exactly in all."""
    values = np.asarray(values, np.float64)
    if rank < 1:
        raise ValueError(f"the mean rank of adapters must be at least 1, got {rank}")
    total, share = (
        len(values) * (rank - 1),
        values / values.sum() if values.sum() else np.full(len(values), 1 / len(values)),
    )
    return [1 + count for count in _rounded(share * total, total, [total] * len(values), 1)]


def cfsp(
    *,
    coarse: str = "angular",
    alpha: float = 1.0,
    normalise: str = "column",
    b: float = 1.0,
    c: float = 1.0,
    multiple: int = 1,
    batch: int = 8,
) -> Whole:
    """Channels by activation, more of them from blocks that change their input little.

    Sparsity is the share of all the blocks' weights, attention's included, that is removed; all of it is taken from
    the feed-forward networks, so that p is larger and sparsity is bounded by their share of the weights.

    Args:
      coarse: a key of `COARSE`.
      alpha: sharpness of the allocation over blocks.
      normalise: "column" as released, "row" for weights that count.
      b, c: exponents of the activations in the channels' scores.
      multiple: channels are removed by so many at once (the paper: 128); it must divide every hidden width.
      batch: sequences that go through a block at once.
    """
    choose("coarse", coarse, COARSE)
    choose("normalise", normalise, NORMALISE)

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None):
        sparsity = prepare("cfsp", model, sparsity, pattern)
        units, values, scores = units_of(model, ("channels",)), [], {}
        for entry in units.values():
            if multiple < 1 or entry.count % multiple:
                raise ValueError(
                    f"multiple={multiple} must divide the hidden width {entry.count} of every block"
                )
        share = share_of("cfsp", units, sparsity, linear_weights(params, model.depth))
        for i, seen in watch(model, params, tokens, ("square",), batch=batch, progress=progress):
            if (i, "mlp") in units:
                values.append(importance(seen.inputs, seen.outputs, coarse))
                if not np.isfinite(values[-1]):
                    raise ValueError(
                        f"the outputs of {seen.name} are not finite; the model's activations overflow"
                    )
                kernels = {name: layer["kernel"] for name, layer in seen.params["mlp"].items()}
                square = seen.stats["mlp/down/kernel"]["square"]
                scores[i, "mlp"] = channel_scores(
                    kernels["down"], kernels["up"], kernels.get("gate"), square, normalise=normalise, b=b, c=c
                )
        counts = [entry.count for entry in units.values()]
        found = densities(values, share, alpha, counts)
        left = _rounded(found * counts, (1 - share) * sum(counts), counts, multiple)
        kept = {key: best(scores[key], count) for key, count in zip(units, left, strict=True)}
        findings = {
            "importance": values,
            "densities": found.tolist(),
            "channel_sparsity": share,
            "coarse": coarse,
            "normalise": normalise,
        }
        return remove("cfsp", model, params, tokens, sparsity, kept, batch=batch, findings=findings)

    return Whole("cfsp", run)


def _rounded(exact, total: float, limits, multiple: int) -> list[int]:
    """Multiples near the exact numbers, within the limits, whose sum is the multiple nearest to the total."""
    exact, limits = np.asarray(exact, np.float64), np.asarray(limits, np.int64)
    found = np.clip(np.floor(exact / multiple).astype(np.int64) * multiple, 0, limits)
    missing = round((total - found.sum()) / multiple)
    while missing:
        step = multiple if missing > 0 else -multiple
        possible = (found + step >= 0) & (found + step <= limits)
        gain = np.where(possible, (exact - found) * np.sign(step), -np.inf)
        found[np.argmax(gain)] += step
        missing -= np.sign(step)
    return found.tolist()


__all__ = ["COARSE", "NORMALISE", "adapter_ranks", "cfsp", "channel_scores", "densities", "importance"]
