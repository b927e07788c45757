"""Fake quantisation: quantisation-aware training of weights, sparse ones included.

Trained weights W become the nearest of 2^bits - 1 levels, symmetric about zero and spaced evenly per output
channel c (the last axis):

  Q(W)_c = s_c clip(round(W_c / s_c), -L, L)      s_c = max |W_c| / L,  L = 2^(bits - 1) - 1

Zero is a level, so a pruned weight stays zero and an N:M mask on W holds for Q(W). The gradient passes
straight through: dQ/dW = 1 (Jacob et al. 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference").

With 2:4 masks fixed on W and distillation it is the second stage of GPUSQ-ViT (Yu et al. 2023, "Boost vision
transformer with GPU-friendly sparsity and quantization"): see `configs/digits_gpusq_vit.py`. Departure: activations
stay in floating point.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from sparsejax.masks import INCLUDE, map_with_name, sparsifiable

MAX_BITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeQuant:
    """Weights rounded to `bits` bits, with straight-through gradients.

    The latent tree is `{"params": weights}`; there is no state, no randomness and no penalty. Which weights are
    zero is up to the masks on the latent weights.

    Attributes:
      bits: of a weight, 2 to 16.
      include, exclude: which leaves are quantised, see `masks.sparsifiable`.

    Raises:
      ValueError: if `bits` is out of range.
    """

    bits: int = 8
    include: Iterable[str] = INCLUDE
    exclude: Iterable[str] = ()

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 2 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits of fake_quant must be an integer from 2 to {MAX_BITS}, got {self.bits!r}")

    def init(self, key, params):
        """The weights as they are."""
        del key
        sparsifiable(params, self.include, self.exclude)
        return {"params": params}, {}

    def materialize(self, latent, state, key=None):
        """The quantised weights, the same in training and evaluation."""
        del key
        chosen = sparsifiable(latent["params"], self.include, self.exclude)
        params = map_with_name(
            lambda name, leaf: straight_through(leaf, self.bits) if name in chosen else leaf, latent["params"]
        )
        return params, state, jnp.float32(0)

    def masks(self, latent, state):
        """None: zeros are those of the masks on the latent weights."""
        del latent, state


def quantise(weight, bits: int):
    """The nearest levels: an array of the shape and dtype of `weight`.

    Args:
      weight: float array (..., channels); each channel has its own scale. A channel of zeros stays zero.
      bits: at least 2.
    """
    levels = 2 ** (bits - 1) - 1
    exact = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=tuple(range(weight.ndim - 1)), keepdims=True)
    scale = largest / levels
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)  # such a channel becomes zero
    return (scale * jnp.clip(jnp.round(exact / scale), -levels, levels)).astype(weight.dtype)


def straight_through(weight, bits: int):
    """`quantise(weight, bits)` with the gradient of the identity."""
    return jax.lax.stop_gradient(quantise(weight, bits)) + (weight - jax.lax.stop_gradient(weight))
