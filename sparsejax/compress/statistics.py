"""Running statistics of a layer's inputs, which can be merged.

Inputs are x `(sequences, length, in)` with n tokens in all, S sequences. The entries, all float32 arrays:

  count, sequences   n and S (scalars); sequences without a token do not count
  length             n / S, the mean number of tokens in a sequence
  mean       (in,)     mu_j   = mean over tokens of x_j
  square     (in,)              mean over tokens of x_j^2
  variance   (in,)              mean over tokens of (x_j - mu_j)^2
  within     (in,)              mean over sequences of the variance of x_j within the sequence
  gram       (in, in)  X^T X / n

Means are moved by what a batch adds to them, and variances are merged with the term of the means' difference
(Chan, Golub, LeVeque 1979), so that neither depends on sums that grow with the number of tokens. Statistics are
plain dicts, so that `jax.jit`, `jax.vmap` (experts) and sharding act on them as on any tree of arrays.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.masks import choose

Statistics = dict[str, jax.Array]

NAMES = ("count", "sequences", "length", "mean", "square", "variance", "within", "gram")
_ALWAYS = ("count", "sequences", "length")
_STRIP = 512  # wide enough for products at full speed; a layer of 4096 inputs needs 36 of 64 parts


def init(names: Iterable[str], in_features: int) -> Statistics:
    """Statistics of no tokens: zeros for the entries in `names` and for what those are made from.

    Args:
      names: entries that are needed, of `NAMES`; the counts are always kept, and the mean with the variance.
      in_features: width of the inputs.

    Raises:
      ValueError: for a name that is not in `NAMES`.
    """
    wanted = {*_ALWAYS, *(choose("statistic", name, NAMES) for name in names)}
    if "variance" in wanted:
        wanted.add("mean")
    shapes = {"gram": (in_features, in_features)} | dict.fromkeys(_ALWAYS, ())
    return {
        name: jnp.zeros(shapes.get(name, (in_features,)), jnp.float32) for name in NAMES if name in wanted
    }


def update(stats: Statistics, x, chosen=None) -> Statistics:
    """The statistics after more inputs; pure and jit-able.

    Args:
      stats: from `init`, `update` or `merge`.
      x: inputs `(sequences, length, in)` of any float dtype; computed in float32 (Gram matrices at the highest
        precision of the device).
      chosen: optional bools `(sequences, length)`: the tokens that count, None for all.
    """
    return merge(stats, _of_batch(tuple(stats), x, chosen))


def of(names: Iterable[str], x, chosen=None) -> Statistics:
    """The statistics of one array of inputs; arguments as in `init` and `update`."""
    return _of_batch(tuple(init(names, x.shape[-1])), x, chosen)


@jax.jit
def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the inputs of both; they must have the same entries."""
    count, sequences = a["count"] + b["count"], a["sequences"] + b["sequences"]
    tokens, parts = _share(b["count"], count), _share(b["sequences"], sequences)
    merged = {"count": count, "sequences": sequences, "length": _share(count, sequences)}
    for name in a:
        if name not in merged:
            share = parts if name == "within" else tokens
            merged[name] = a[name] + share * (b[name] - a[name])
    if "variance" in a:
        merged["variance"] += tokens * (1 - tokens) * (b["mean"] - a["mean"]) ** 2
    return {name: merged[name] for name in a}


def _share(part, whole):
    return part / jnp.maximum(whole, 1)


@partial(jax.jit, static_argnames="names")
def _of_batch(names, x, chosen) -> Statistics:
    """The statistics of one batch alone."""
    x = x.astype(jnp.float32)
    flags = jnp.ones(x.shape[:2], jnp.float32) if chosen is None else chosen.astype(jnp.float32)
    lengths = jnp.sum(flags, axis=1)
    count, sequences = jnp.sum(lengths), jnp.sum(lengths > 0).astype(jnp.float32)
    found = {"count": count, "sequences": sequences, "length": _share(count, sequences)}
    weights = flags[..., None]

    def mean(values):
        return jnp.sum(values * weights, axis=(0, 1)) / jnp.maximum(count, 1)

    if "mean" in names:
        found["mean"] = mean(x)
    if "square" in names:
        found["square"] = mean(x**2)
    if "variance" in names:
        found["variance"] = mean((x - found["mean"]) ** 2)
    if "within" in names:
        tokens = jnp.maximum(lengths, 1)[:, None]
        centre = jnp.sum(x * weights, axis=1) / tokens
        variances = jnp.sum((x - centre[:, None]) ** 2 * weights, axis=1) / tokens
        found["within"] = jnp.sum(variances, axis=0) / jnp.maximum(sequences, 1)
    if "gram" in names:
        rows = (x if chosen is None else x * weights).reshape(-1, x.shape[-1])
        found["gram"] = _gram(rows) / jnp.maximum(count, 1)
    return {name: found[name] for name in names}


def _gram(rows):
    """X^T X of `(n, in)`: strips from the diagonal to the right, and their mirror images (XLA has no syrk)."""
    width = rows.shape[1]
    gram = jnp.zeros((width, width), jnp.float32)
    for start in range(0, width, _STRIP):
        end = min(start + _STRIP, width)
        strip = jnp.matmul(rows[:, start:end].T, rows[:, start:], precision=lax.Precision.HIGHEST)
        gram = gram.at[start:end, start:].set(strip)
        gram = gram.at[end:, start:end].set(strip[:, end - start :].T)
    return gram


def isotropic(stats: Statistics) -> Statistics:
    """Statistics with the same entries of one sequence whose inputs are uncorrelated, of mean 0 and variance 1."""
    values = {name: jnp.ones_like(value) for name, value in stats.items()}
    if "mean" in stats:
        values["mean"] = jnp.zeros_like(stats["mean"])
    if "gram" in stats:
        values["gram"] = jnp.eye(stats["gram"].shape[-1], dtype=jnp.float32)
    return values
