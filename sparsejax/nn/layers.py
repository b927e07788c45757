"""Flax linen layers that read a `masks` collection.

`model.apply({"params": params, "masks": masks}, x)` equals
`model.apply({"params": sparsejax.apply_masks(params, masks)}, x)`, gradients included, without a masked copy
of the parameters outside the model. Without the collection the layers are flax's, bit for bit; `init` never
creates it. `Dense` and `Conv` also read `backward_masks`, see `sparsejax.nn.bidirectional`.

Parameters may also be packed (`sparsejax.pack`), see `sparsejax.nn.packed`.

Any other linen layer gains the same by `class Layer(MaskedParams, TheirLayer)`.
"""

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta

from sparsejax.masks import is_sparsified, mask_weight
from sparsejax.nn.bidirectional import Bidirectional
from sparsejax.nn.packed import PackedKernel, packed_param, unpack_param


class MaskedParams(linen.Module):
    """Mixin: parameters declared by `self.param` are masked by their namesakes in the `masks` collection."""

    def param(self, name, init_fn, *init_args, **init_kwargs):
        """As `flax.linen.Module.param`, unpacked, then `mask_weight` if the `masks` collection was passed."""
        packed = packed_param(self, name)
        if packed is None:
            value = super().param(name, init_fn, *init_args, **init_kwargs)
        else:
            value = unpack_param(
                self, name, packed, lambda: init_fn(jax.random.key(0), *init_args, **init_kwargs)
            )
        if is_sparsified(self.get_variable("backward_masks", name, True)):
            path = "/".join((*self.path, name))
            raise ValueError(
                f"{path} has a backward mask, which only Dense and Conv use, not {type(self).__name__}"
            )
        if not self.has_variable("masks", name):
            return value
        return mask_weight(value, meta.unbox(self.get_variable("masks", name)))


class Dense(PackedKernel, Bidirectional, MaskedParams, linen.Dense):
    """`flax.linen.Dense` that reads `masks` and `backward_masks`, and multiplies by packed kernels."""


class DenseGeneral(MaskedParams, linen.DenseGeneral):
    """`flax.linen.DenseGeneral` that reads `masks`."""


class Conv(PackedKernel, Bidirectional, MaskedParams, linen.Conv):
    """`flax.linen.Conv` that reads `masks` and `backward_masks`, and packed kernels."""


class ConvTranspose(MaskedParams, linen.ConvTranspose):
    """`flax.linen.ConvTranspose` that reads `masks`."""


class Embed(MaskedParams, linen.Embed):
    """`flax.linen.Embed` that reads `masks`, in lookups and in `attend`."""


class BatchNorm(MaskedParams, linen.BatchNorm):
    """`flax.linen.BatchNorm` that reads `masks`: a structured pattern may remove a whole channel."""


class LayerNorm(MaskedParams, linen.LayerNorm):
    """`flax.linen.LayerNorm` that reads `masks`."""


class RMSNorm(MaskedParams):
    """x scale / sqrt(sum(x^2) / width + epsilon) over the last axis (Zhang and Sennrich 2019).

    Computed in float32 at least, whatever `dtype` the result has.

    Attributes:
      epsilon: the small number.
      dtype: of the result, None for that of the input.
      width: what the sum of squares is divided by, None for the number of features. Rows that were projected on
        fewer features keep the divisor that they had before (SliceGPT, Ashkboos et al. 2024).
    """

    epsilon: float = 1e-6
    dtype: str | None = None
    width: int | None = None

    @linen.compact
    def __call__(self, x):
        """Arrays of the shape of `x`."""
        x = jnp.asarray(x)
        scale = self.param("scale", linen.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        square = jnp.sum(wide**2, axis=-1, keepdims=True) / (self.width or x.shape[-1])
        return (wide * jax.lax.rsqrt(square + self.epsilon) * scale).astype(self.dtype or x.dtype)


__all__ = [
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Embed",
    "LayerNorm",
    "MaskedParams",
    "RMSNorm",
]
