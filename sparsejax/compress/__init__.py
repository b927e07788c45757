"""Compression of trained models from calibration data: statistics of each layer's inputs, then a method.

`METHODS` maps names to factories. A layer-wise method (`Layerwise`) goes through a model block by block with
`prune_layers`; the others (`Whole`) have a `run` of their own.
"""

import inspect
from collections.abc import Mapping

from sparsejax.compress import statistics
from sparsejax.compress.base import Compressed, CompressionWarning, Layerwise, Whole
from sparsejax.compress.calibration import Observed, observe, prune_layers
from sparsejax.compress.evaluate import perplexity
from sparsejax.compress.least_squares import least_squares, masked_least_squares
from sparsejax.compress.magnitude import magnitude
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.compress.wanda import wanda
from sparsejax.masks import choose

# Keywords of factories that are methods themselves.
BASES = ("initial", "method")

METHODS = {
    "least_squares": least_squares,
    "magnitude": magnitude,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
}


def build(name: str, **keywords) -> Layerwise | Whole:
    """The method called `name`.

    Args:
      name: a key of `METHODS`.
      **keywords: of its factory. A method that builds on another takes its name, or a mapping of "name" and keywords, as
        `build("dsnot", initial="sparsegpt")`.

    Raises:
      ValueError: for an unknown name or keyword.
    """
    factory = choose("method", name, METHODS)
    known = inspect.signature(factory).parameters
    for key in keywords:
        choose(f"keyword of method {name!r}:", key, known)
    return factory(**{key: _method(value) if key in BASES else value for key, value in keywords.items()})


def _method(value):
    if isinstance(value, str):
        return build(value)
    return build(**value) if isinstance(value, Mapping) else value


__all__ = [
    "METHODS",
    "Compressed",
    "CompressionWarning",
    "Layerwise",
    "Observed",
    "Whole",
    "build",
    "least_squares",
    "magnitude",
    "masked_least_squares",
    "observe",
    "perplexity",
    "prune_layers",
    "sparsegpt",
    "statistics",
    "wanda",
]
