"""Layers whose parameters may be packed: `model.apply({"params": sparsejax.pack(params, masks)[0]}, x)`.

`Dense`, and `Conv` where its kernel has one pixel, multiply by the packed kernel as it is (`sparsejax.matmul`), unless
they name a `precision`.
Every other parameter is unpacked when its layer is called: that saves memory, and no time.
"""

import math

import jax
from flax import linen
from flax.core import meta

from sparsejax.formats import is_packed, matmul, unpack
from sparsejax.masks import is_sparsified, mask_weight


def packed_param(layer: linen.Module, name: str):
    """The packed array that was passed as the layer's parameter, or None if that is dense or missing."""
    value = meta.unbox(layer.get_variable("params", name))
    return value if is_packed(value) else None


def unpack_param(layer: linen.Module, name: str, packed, needed):
    """The dense array of a packed parameter.

    Args:
      needed: `() -> ` the shape and dtype that the layer wants.

    Raises:
      ValueError: if that is another shape.
    """
    shape = jax.eval_shape(needed).shape
    if packed.shape != shape:
        path = "/".join((*layer.path, name))
        raise ValueError(f"the packed {path} has shape {packed.shape}, but the layer's inputs need {shape}")
    return packed.to_dense()


class PackedKernel(linen.Module):
    """Mixin for a linear layer with a `kernel` that may be packed."""

    @linen.nowrap  # as in Bidirectional: the layer's own __call__ is the one that flax registers
    def __call__(self, inputs):
        """The layer."""
        kernel = packed_param(self, "kernel")
        if kernel is None or is_sparsified(self.get_variable("masks", "kernel", True)):
            return super().__call__(inputs)
        x = self._pixels(inputs, kernel) if self.precision is None else None
        if x is None:
            return super().__call__(inputs)
        bias = None
        if self.use_bias:
            bias = unpack(meta.unbox(self.get_variable("params", "bias")))
            bias = mask_weight(bias, meta.unbox(self.get_variable("masks", "bias", True)))
        x, data, bias = self.promote_dtype(x, kernel.data, bias, dtype=self.dtype)
        y = matmul(x, kernel.with_data(data))
        return y if bias is None else y + bias

    def _pixels(self, inputs, kernel):
        """What the kernel is multiplied with, or None if the layer is not a plain product with it."""
        if isinstance(self, linen.Dense):
            plain = self.dot_general is None and self.dot_general_cls is None
            return inputs if plain and kernel.shape == (inputs.shape[-1], self.features) else None
        axes = kernel.ndim - 2
        plain = (
            math.prod(kernel.shape[:-2]) == 1
            and kernel.shape[-2:] == (inputs.shape[-1], self.features)
            and self.padding in ("SAME", "VALID")
            and inputs.ndim > axes
            and self.mask is self.conv_general_dilated is self.conv_general_dilated_cls is None
            and all(
                set(_each(dilation, axes)) == {1} for dilation in (self.input_dilation, self.kernel_dilation)
            )
        )
        if not plain:
            return None
        steps = (slice(None, None, stride) for stride in _each(self.strides, axes))
        return inputs[(..., *steps, slice(None))]


def _each(setting, axes: int) -> tuple[int, ...]:
    """A convolution's setting for each of its axes: one for all, none for 1."""
    return (setting or 1,) * axes if setting is None or isinstance(setting, int) else tuple(setting)
