"""Compression of trained models from calibration data: statistics of each layer's inputs, then a method.

`METHODS` maps names to factories. A layer-wise method (`Layerwise`) goes through a model block by block with
`prune_layers`; the others (`Whole`) have a `run` of their own.
"""

from sparsejax.compress import statistics
from sparsejax.compress.base import Compressed, CompressionWarning, Layerwise, Whole
from sparsejax.compress.calibration import Observed, observe, prune_layers
from sparsejax.compress.evaluate import perplexity
from sparsejax.compress.least_squares import least_squares, masked_least_squares
from sparsejax.compress.magnitude import magnitude
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.compress.wanda import wanda

METHODS = {
    "least_squares": least_squares,
    "magnitude": magnitude,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
}

__all__ = [
    "METHODS",
    "Compressed",
    "CompressionWarning",
    "Layerwise",
    "Observed",
    "Whole",
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
