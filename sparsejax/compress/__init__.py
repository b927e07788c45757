"""Compression of trained models from calibration data: statistics of each layer's inputs, then a method.

`METHODS` maps names to factories. A layer-wise method (`Layerwise`) goes through a model block by block with
`prune_layers`; the others (`Whole`) have a `run` of their own.
"""

from sparsejax.compress import statistics
from sparsejax.compress.base import Compressed, CompressionWarning, Layerwise, Whole
from sparsejax.compress.wanda import wanda

METHODS = {
    "wanda": wanda,
}

__all__ = ["METHODS", "Compressed", "CompressionWarning", "Layerwise", "Whole", "statistics", "wanda"]
