"""Rotary positions (Su et al. 2021): a query or key at position p is turned by the angles p f_i.

With h the width of a head, entries i and i + h/2 are a plane (the layout of Hugging Face's models):

    f_i = theta^(-2 i / h),   (a, b) -> (a cos - b sin, b cos + a sin)  for the angle p f_i,  i < h/2

so that the product of a query and a key depends on the distance of their positions only. For sequences longer
than those of the training, frequencies are scaled: `linear` divides all of them by `factor` (Chen et al. 2023);
`dynamic` changes only those of sequences beyond the model's longest, which ours refuse, so that it is `default`;
`llama3` (Llama 3.1) divides those whose wave is longer than the original length L over `low_freq_factor`, keeps
those that are shorter than L over `high_freq_factor`, and in between blends the two:

    f (s + (1 - s) / factor),   s = (L f / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor) in [0, 1]
"""

import math
import numbers
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from sparsejax.masks import choose

KINDS = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def frequencies(width: int, theta: float = 1e4, scaling: Mapping | None = None) -> np.ndarray:
    """The angles per position of the planes of one head, float32 `(width / 2,)`.

    Args:
      width: of a head, even.
      theta: the base.
      scaling: None, or a mapping of the names in Hugging Face's `rope_scaling`: `rope_type` (or `type`), a key of
        `KINDS`, and its numbers.

    Raises:
      ValueError: for an odd width, an unknown kind, one of its numbers that is missing or not positive.
    """
    if width % 2:
        raise ValueError(f"rotary positions need heads of even width, got {width}")
    _check_positive("theta", theta)
    rates = theta ** (-np.arange(0, width, 2) / width)
    if scaling is None:
        return rates.astype(np.float32)
    kind = scaling.get("rope_type", scaling.get("type"))
    needed = choose("rope_type", kind, KINDS)
    for name in needed:
        if name not in scaling:
            raise ValueError(f"rotary scaling {kind!r} needs {', '.join(needed)}, but {name} is missing")
        _check_positive(name, scaling[name])
    if kind == "linear":
        rates = rates / scaling["factor"]
    if kind == "llama3":
        factor, low, high, length = (scaling[name] for name in needed)
        if low >= high:
            raise ValueError(f"low_freq_factor={low} must be less than high_freq_factor={high}")
        share = np.clip((length * rates / (2 * math.pi) - low) / (high - low), 0, 1)
        rates = rates * (share + (1 - share) / factor)
    return rates.astype(np.float32)


def _check_positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not value > 0:
        raise ValueError(f"{name} of rotary positions must be a positive number, got {value!r}")


def tables(rates, length: int, offset=0):
    """cos and sin of the angles, two float32 arrays `(length, width / 2)`.

    Args:
      rates: as `frequencies` gives them.
      length: number of positions, the first of which is `offset` (int, or int32 scalar).
    """
    angles = (offset + jnp.arange(length)).astype(jnp.float32)[:, None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """Turns `(..., length, heads, width)`, computed in float32 at least; the dtype stays."""
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
