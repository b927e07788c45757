"""SliceGPT: Compress Large Language Models by Deleting Rows and Columns (Ashkboos et al. 2024).

1. Norms lose their parameters (`sparsejax.compress.norms`), and keep dividing by the root of the sum of squares over
   the *original* width d (`norm_width`). The network then does not change if the residual stream is rotated.
2. At the input of every norm, C = sum of x x^T over the calibration tokens, uncentred; Q holds its eigenvectors by
   falling eigenvalue, of which the first d' are kept.
3. With Q_a before attention, Q_b before the feed-forward network and Q_c before the next block:

     embedding   E Q_a            query, key, value  Q_a^T W       out   W Q_b     residual  Q_a^T Q_b
                                  up, gate           Q_b^T W       down  W Q_c     residual  Q_b^T Q_c

   The residual of a block is multiplied by these two matrices, its parameters `shortcut_0` and `shortcut_1`. Every
   C is that of the states as they are with what was sliced before. The last network's output stays whole.
4. Every Q may be followed by a random orthogonal (d', d') matrix, which spreads outliers and changes nothing else.

What is lost at a norm is the sum of the eigenvalues behind the first d'. Kernels are `(in, out)` here, the
transposes of the paper's. Departures: the norms' epsilon is the model's own, and C is not damped, which would not
change its eigenvectors.
"""

from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from sparsejax.compress.base import Compressed, Whole
from sparsejax.compress.groups import prepare
from sparsejax.compress.norms import READERS, fold_norms
from sparsejax.compress.shrink import as_leaf, copied, linear_weights, sizes_of, with_sizes
from sparsejax.compress.stream import Stream
from sparsejax.masks import choose
from sparsejax.models import Transformer
from sparsejax.models.layers import head_width

BASES = ("pca", "random", "variance")
ORIENTATIONS = ("random", "pca")
COUNTS = ("width", "weights")


def slicegpt(
    *,
    count: str = "width",
    multiple: int = 8,
    slice_last: bool = False,
    basis: str = "pca",
    orientation: str = "random",
    seed: int = 0,
    batch: int = 8,
) -> Whole:
    """A narrower residual stream.

    Args:
      count: what sparsity is a share of: the stream's "width", as in the paper, or the blocks' linear "weights",
        the shortcuts of the result included. Either way the width is the largest multiple that removes at least
        that share.
      multiple: that the width is a multiple of.
      slice_last: whether the output of the last feed-forward network, and with it the head, is sliced.
      basis: "pca" as in the paper; for comparison a "random" one, or the channels of largest "variance".
      orientation: "random", or "pca" without step 4.
      seed: of the random matrices.
      batch: sequences that go through a block at once.

    Returns:
      A method whose report has "method", "asked", "sparsity" (reached, of what `count` says), "width" and
      "original_width", "weights" and "kept" (of the blocks' kernels and shortcuts), "weight_sparsity", "sequences",
      "length" and "layers": for each norm's input, as `block_0/norm_0`, "lost", the share of its sum of squares
      that was cut off, and "error", the root of it.

    Raises:
      ValueError: for unknown names; in `run` for a share that leaves no channel and for a model that is sliced already.
    """
    choose("count", count, COUNTS)
    choose("basis", basis, BASES)
    choose("orientation", orientation, ORIENTATIONS)
    options = dict(slice_last=slice_last, basis=basis, orientation=orientation, seed=seed, batch=batch)

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None):
        sparsity = prepare("slicegpt", model, sparsity, pattern)
        before = linear_weights(params, model.depth)
        if sparsity == 0:
            small, less, layers = model, {part: params[part] for part in model.parts()}, {}
        else:
            width = _width(model, count, sparsity, multiple, slice_last, before)
            small, less, layers = slice_model(model, params, tokens, width, progress=progress, **options)
        kept = linear_weights(less, model.depth)
        shares = {"width": 1 - small.width / model.width, "weights": 1 - kept / before}
        report = {
            "method": "slicegpt",
            "asked": sparsity,
            "sparsity": shares[count],
            "count": count,
            "width": small.width,
            "original_width": model.width,
            "weights": before,
            "kept": kept,
            "weight_sparsity": shares["weights"],
            "sequences": int(np.shape(tokens)[0]),
            "length": int(np.shape(tokens)[1]),
            "layers": layers,
        }
        return Compressed(small, less, None, report)

    return Whole("slicegpt", run)


def slice_model(
    model: Transformer,
    params: Mapping,
    tokens,
    width: int,
    *,
    slice_last: bool = False,
    basis: str = "pca",
    orientation: str = "random",
    seed: int = 0,
    batch: int = 8,
    progress: bool | None = None,
) -> tuple[Transformer, dict, dict]:
    """The model with a residual stream of `width` channels; other arguments as for `slicegpt`.

    Returns:
      `(model, params, {site: {"kept", "of", "lost", "error"}})`; with the whole width the same function.

    Raises:
      ValueError: for a width that is not in 1 to the model's, and a model with shortcuts.
    """
    if not 1 <= width <= model.width:
        raise ValueError(f"the width of a sliced model must be in 1 to {model.width}, got {width}")
    sizes = [sizes_of(model, i) for i in range(model.depth)]
    if any(size["stream"] for size in sizes):
        raise ValueError("the model is sliced already")
    whole, parts = fold_norms(model, params)
    whole = whole.clone(
        hidden=model.mlp_ratio * model.width if model.hidden is None else model.hidden,
        head_width=head_width(model),
        norm_width=model.norm_width or model.width,
    )
    cut = _Cut(width, basis, orientation, np.random.default_rng(seed))
    stream = Stream(whole, parts, tokens, batch)
    first = cut("block_0/norm_0", stream.hidden)
    for name in ("embed", "positions"):
        if name in parts:
            table = parts[name]["embedding"]
            parts[name] = {"embedding": _times(table, first, table)}
    stream.hidden = _turned(stream.hidden, first)
    hidden = None if progress is None else not progress
    widths = [width] * (2 * model.depth) + [width if slice_last else model.width]
    for i in tqdm(range(model.depth), disable=hidden, unit="block", desc="slice"):
        last = i == model.depth - 1 and not slice_last
        site = "norm" if i == model.depth - 1 else f"block_{i + 1}/norm_0"
        parts[f"block_{i}"], first = _slice_block(
            whole, i, parts[f"block_{i}"], stream, first, cut, last, site
        )
    kernel = parts["head"]["kernel"]
    parts["head"] = {**parts["head"], "kernel": _times(first.T, kernel, kernel)}
    parts["norm"] = {"scale": parts["norm"]["scale"][: widths[-1]]}
    sizes = [sizes_of(whole, i) for i in range(model.depth)]
    sizes = [{**size, "stream": tuple(widths[2 * i : 2 * i + 3])} for i, size in enumerate(sizes)]
    return with_sizes(whole.clone(width=width), sizes), parts, cut.sites


def _slice_block(model, i, part, stream, first, cut, last: bool, site: str):
    """The sliced parameters of block `i` and the matrix after it; moves the stream behind it."""
    part, full = copied(part), model.width
    block, eye = model.block(i), np.eye(full)
    _rotate_readers(part, "norm_0", first)
    half = {name: part[name] for name in ("norm_0", "attention") if name in part}
    half |= {"shortcut_0": np.float32(first.T), "shortcut_1": np.float32(eye)}
    alone = block.clone(hidden_width=0, stream=(first.shape[1], full, full), parent=None)
    middle = cut(f"block_{i}/norm_1", stream.run(alone, half))
    _rotate_writer(part, "attention", "out", middle)
    _rotate_readers(part, "norm_1", middle)
    example = next(iter(jax.tree.leaves(part)))
    part["shortcut_0"] = as_leaf(first.T @ middle, example)
    whole = {**part, "shortcut_1": np.float32(middle.T)}
    states = stream.run(block.clone(stream=(first.shape[1], middle.shape[1], full), parent=None), whole)
    after = eye if last else cut(site, states)
    stream.hidden = _turned(states, after)
    _rotate_writer(part, "mlp", "down", after)
    part["shortcut_1"] = as_leaf(middle.T @ after, example)
    return part, after


class _Cut:
    """Makes the matrices Q `(d, d')` from states `(sequences, length, d)`, and remembers what they cut off."""

    def __init__(self, width: int, basis: str, orientation: str, random):
        self._width, self._basis, self._orientation = width, basis, orientation
        self._random, self.sites = random, {}

    def __call__(self, site: str, states):
        wide = states.shape[-1]
        second = np.zeros((wide, wide))
        for sequence in states:
            rows = np.asarray(sequence, np.float64)
            second += rows.T @ rows
        if not np.isfinite(second).all():
            raise ValueError(f"the states before {site} are not finite; the model's activations overflow")
        kept = self._vectors(second)[:, : self._width]
        total = np.trace(second)
        lost = max(1 - np.trace(kept.T @ second @ kept) / total, 0.0) if total else 0.0
        self.sites[site] = {
            "kept": self._width,
            "of": wide,
            "lost": float(lost),
            "error": float(np.sqrt(lost)),
        }
        return kept @ self._orthogonal(self._width) if self._orientation == "random" else kept

    def _vectors(self, second):
        if self._basis == "random":
            return self._orthogonal(len(second))
        if self._basis == "variance":
            return np.eye(len(second))[:, np.argsort(-np.diagonal(second), kind="stable")]
        return np.linalg.eigh(second)[1][:, ::-1]

    def _orthogonal(self, width: int):
        q, r = np.linalg.qr(self._random.normal(size=(width, width)))
        return q * np.sign(np.diagonal(r))


def _width(model, count: str, sparsity: float, multiple: int, slice_last: bool, before: int) -> int:
    """The largest allowed width that removes at least the share."""
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    for width in range(model.width // multiple * multiple, 0, -multiple):
        left = width / model.width if count == "width" else _weights(model, width, slice_last) / before
        if left <= 1 - sparsity + 1e-9:
            return width
    raise ValueError(
        f"no multiple of {multiple} channels of {model.width} removes a share of {sparsity} ({count})"
    )


def _weights(model, width: int, slice_last: bool) -> int:
    """Weights of the blocks' kernels and shortcuts in a model sliced to `width`."""
    head, total = head_width(model), 0
    for i in range(model.depth):
        size = sizes_of(model, i)
        last = model.width if i == model.depth - 1 and not slice_last else width
        total += head * width * (2 * size["heads"] + 2 * size["kv_heads"])
        total += size["hidden"] * ((1 + model.gated) * width + last) + width * (width + last)
    return total


def _rotate_readers(part, norm: str, q) -> None:
    sub, readers = READERS[norm]
    for name in readers:
        if name in part.get(sub, {}):
            layer = part[sub][name]
            part[sub][name] = {**layer, "kernel": _times(q.T, layer["kernel"], layer["kernel"])}
    if norm in part:
        part[norm] = {"scale": part[norm]["scale"][: q.shape[1]]}


def _rotate_writer(part, sub: str, name: str, q) -> None:
    if sub in part:
        part[sub][name] = {key: _times(leaf, q, leaf) for key, leaf in part[sub][name].items()}


def _times(a, b, like):
    """The product in float64, as an array like a parameter."""
    return as_leaf(np.asarray(a, np.float64) @ np.asarray(b, np.float64), like)


def _turned(states, q):
    return np.stack([(np.asarray(rows, np.float64) @ q).astype(states.dtype) for rows in states])


__all__ = ["BASES", "COUNTS", "ORIENTATIONS", "slice_model", "slicegpt"]
