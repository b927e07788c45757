"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al. 2024).

With a_i the root of the mean square of input i over the calibration tokens, a weight scores

    S_ij = |W_ij| a_i,

and of every output the floor(sparsity * in) weights of lowest score are dropped (N:M: of every m inputs of an
output; blocks: those of lowest mean score in the layer). The other weights stay as they are.

The authors' code takes the norm of an input instead of its root mean square, which is a common factor.
"""

import jax.numpy as jnp

from sparsejax.compress.base import Layerwise, layer_budget, masked, select
from sparsejax.patterns import NM, Pattern, Unstructured

_OUTPUTS = 256  # whose scores exist at once, where outputs are compared each with itself


def scores(kernel, stats):
    """|W_ij| a_i, float32 `(in, out)`.

    Args:
      kernel: `(in, out)`.
      stats: with the entry "square" `(in,)`.
    """
    return jnp.abs(kernel) * jnp.sqrt(stats["square"])[:, None]


def wanda(*, scope: str = "row") -> Layerwise:
    """Weights by magnitude times the scale of their input, without an update.

    Args:
      scope: "row" compares the weights of one output, as the paper found best; "layer" all of them.
    """

    def prune(kernel, stats, sparsity, pattern="unstructured"):
        sparsity, pattern = layer_budget("wanda", sparsity, pattern)
        mask = _mask(kernel, stats, sparsity, pattern, scope)
        return masked(kernel, mask), mask

    return Layerwise("wanda", ("square",), prune, settings={"scope": scope})


def _mask(kernel, stats, sparsity: float, pattern: Pattern, scope: str):
    alone = isinstance(pattern, NM) or (isinstance(pattern, Unstructured) and scope == "row")
    width = min(_OUTPUTS, kernel.shape[1]) if alone else kernel.shape[1]
    parts = (kernel[:, start : start + width] for start in range(0, kernel.shape[1], width))
    return jnp.concatenate([select(scores(part, stats), sparsity, pattern, scope) for part in parts], axis=1)


__all__ = ["scores", "wanda"]
