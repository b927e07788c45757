"""Magnitude pruning (Janowsky 1989; Han et al. 2015): the floor(sparsity * n) smallest |W_ij| are dropped.

It reads no calibration data, and is the baseline of every method that does.
"""

import jax.numpy as jnp

from sparsejax.compress.base import Layerwise, layer_budget, masked, select


def magnitude(*, scope: str = "layer") -> Layerwise:
    """Weights by their absolute value, without an update.

    Args:
      scope: "layer" compares all weights of a layer, "row" those of one output.
    """

    def prune(kernel, stats, sparsity, pattern="unstructured"):
        del stats
        sparsity, pattern = layer_budget("magnitude", sparsity, pattern)
        mask = select(jnp.abs(kernel), sparsity, pattern, scope)
        return masked(kernel, mask), mask

    return Layerwise("magnitude", (), prune, settings={"scope": scope})


__all__ = ["magnitude"]
