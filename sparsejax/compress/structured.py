"""Structured baselines: whole heads and channels by the size of the weights that read them.

With W the kernel `(in, out)` of `out` or `down` and a_i the root mean square of its input i,

  magnitude_sp   S_i = ||W_i,:||_2
  wanda_sp       S_i = a_i mean_j |W_ij|           (An et al. 2024 after Sun et al. 2024)
  random_sp      S_i uniform

A channel's score is that of its input, a head group's the sum over its inputs. Every block loses the same share of
its weights (`sparsejax.compress.groups.uniform`): heads as near to it as their number allows, channels the rest. The
papers remove the same share of heads and of channels, which few heads cannot meet.
"""

from collections.abc import Sequence

import numpy as np

from sparsejax.compress.base import Whole
from sparsejax.compress.groups import consumer, prepare, protect, remove, uniform, units_of, watch
from sparsejax.compress.shrink import CONSUMERS, linear_weights


def magnitude_sp(*, structures: Sequence[str] = ("heads", "channels"), batch: int = 8) -> Whole:
    """Heads and channels of smallest norm; sparsity is the share of the blocks' weights that is removed.

    Args:
      structures: what may be removed: "heads", "channels" or both.
      batch: sequences that go through a block at once.
    """
    return _method("magnitude_sp", (), structures, batch, lambda kernel, *_: np.linalg.norm(kernel, axis=1))


def wanda_sp(*, structures: Sequence[str] = ("heads", "channels"), batch: int = 8) -> Whole:
    """Heads and channels of smallest mean weight times activation; arguments as for `magnitude_sp`."""

    def score(kernel, stats, _):
        return np.sqrt(np.asarray(stats["square"], np.float64)) * np.abs(kernel).mean(1)

    return _method("wanda_sp", ("square",), structures, batch, score)


def random_sp(*, structures: Sequence[str] = ("heads", "channels"), batch: int = 8, seed: int = 0) -> Whole:
    """Heads and channels by chance; arguments as for `magnitude_sp`, and the seed of the draw."""

    def score(kernel, stats, random):
        return random.uniform(size=len(kernel))

    return _method("random_sp", (), structures, batch, score, seed)


def _method(name, needs, structures, batch, score, seed=0) -> Whole:
    def run(model, params, tokens, sparsity, pattern=None, *, progress=None):
        sparsity = prepare(name, model, sparsity, pattern)
        units = units_of(model, structures)
        scores, random = {}, np.random.default_rng(seed)
        for i, seen in watch(model, params, tokens, needs, batch=batch, progress=progress):
            for key in (key for key in units if key[0] == i):
                stats = seen.stats[f"{key[1]}/{CONSUMERS[key[1]]}/kernel"]
                inputs = score(consumer(seen.params, key[1]), stats, random)
                scores[key] = inputs.reshape(units[key].count, units[key].shared).sum(1)
        protect(model, scores)
        kept = uniform(name, scores, units, sparsity, linear_weights(params, model.depth))
        return remove(name, model, params, tokens, sparsity, kept, batch=batch)

    return Whole(name, run)


__all__ = ["magnitude_sp", "random_sp", "wanda_sp"]
