"""Convolutions with sparse kernels: 1 x 1 after Elsen et al. [2020], and k x k whose filters follow few patterns.

`sparse_conv` has kernels whose zeros may be anywhere over (input, output) channels, or are shared by blocks of
consecutive output channels; the products run along the pixels, which are contiguous inside (CHW). `pattern_conv` has
filters that keep the same spatial positions in all input channels, and packs filters with the same positions together
as SparseByteNN does with its filter groups; its products are dense over the channels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.meshes import on_mesh
from pallas_kernels.sparse_conv.geometry import as_pair, lengths, pads_of
from pallas_kernels.sparse_conv.pack import pack_pattern, pack_pointwise
from pallas_kernels.sums import matmul

__all__ = ["pack_pattern", "pack_pointwise", "pattern_conv", "sparse_conv"]

OP = "sparse_conv"


def sparse_conv(
    x, values, indices, *, features: int, strides=1, padding="SAME", implementation: str | None = None
):
    """1 x 1 convolution with a sparse kernel, differentiable with respect to `x` and `values`.

    Args:
      x: `(batch, H, W, I)`, of a float dtype.
      values: `(B, L, r)` of `pack_pointwise`: for each block of r output channels its L kept weights for each of them.
      indices: `(B, L)` integers in [0, I): the input channel of each; -1 marks padding, which is skipped.
      features: the number of output channels, more than `(B - 1) r` and at most `B r`.
      strides, padding: as in `jax.lax.conv_general_dilated`; strides may be one integer.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(batch, H', W', features)` in the promoted dtype of `x` and `values`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together, an index is out of range (outside `jax.jit`) or the
        named implementation cannot run here.
    """
    x, values, indices = (jnp.asarray(array) for array in (x, values, indices))
    _check_input(x, values, "values", 3, "(blocks, slots, output channels of a block)")
    _check_indices("indices", indices, values.shape[:2], x.shape[3], "input channels")
    blocks, _, width = values.shape
    if not (blocks - 1) * width < features <= blocks * width:
        raise ValueError(
            f"features must be in [{(blocks - 1) * width + 1}, {blocks * width}] for {blocks} blocks of {width}, "
            f"got {features}"
        )
    strides = as_pair("strides", strides)
    pads = pads_of(x.shape, (1, 1), strides, padding)
    dtype = jnp.result_type(x, values)

    def run(x, values, indices):
        padded = jnp.pad(x.astype(dtype), ((0, 0), *pads, (0, 0)))[:, :: strides[0], :: strides[1]]
        values = jnp.where((indices >= 0)[..., None], values, 0).astype(dtype)
        pixels = padded.reshape(-1, x.shape[-1]).T
        reasons = _reasons(x, "pointwise", pixels.shape, values.shape, dtype)
        y = _pointwise(pixels, values, indices, dispatch.pick(OP, implementation, reasons))[:features]
        return y.T.reshape(*padded.shape[:3], features)

    return on_mesh(run, _spec, x, values, indices)


def pattern_conv(
    x,
    values,
    positions,
    channels,
    *,
    kernel_size: tuple[int, int],
    features: int,
    strides=1,
    padding="SAME",
    implementation: str | None = None,
):
    """k x k convolution whose filters keep few spatial positions, differentiable with respect to `x` and `values`.

    Args:
      x: `(batch, H, W, I)`, of a float dtype.
      values: `(B, P, I, r)` of `pack_pattern`: for each block of r filters their weights at P positions.
      positions: `(B, P)` integers: the position of each, `row * kw + column`; -1 marks padding, which is skipped.
      channels: `(B, r)` integers: the output channel of each filter, no two alike; -1 marks padding. Output channels
        that are not named are zero.
      kernel_size: `(kh, kw)`.
      features: the number of output channels.
      strides, padding: as in `jax.lax.conv_general_dilated`; strides may be one integer.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(batch, H', W', features)` in the promoted dtype of `x` and `values`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together, an index is out of range (outside `jax.jit`) or the
        named implementation cannot run here.
    """
    x, values, positions, channels = (jnp.asarray(array) for array in (x, values, positions, channels))
    kernel_size, strides = as_pair("kernel_size", kernel_size), as_pair("strides", strides)
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    _check_input(x, values, "values", 4, "(blocks, positions, input channels, filters of a block)")
    _check_indices("positions", positions, values.shape[:2], math.prod(kernel_size), "positions")
    _check_indices("channels", channels, (values.shape[0], values.shape[3]), features, "output channels")
    if values.shape[2] != x.shape[3]:
        raise ValueError(
            f"x must have the filters' {values.shape[2]} input channels, but its shape is {x.shape}"
        )
    pads = pads_of(x.shape, kernel_size, strides, padding)
    dtype = jnp.result_type(x, values)

    def run(x, values, positions, channels):
        padded = jnp.pad(x.astype(dtype), ((0, 0), *pads, (0, 0)))
        values = jnp.where((positions >= 0)[..., None, None], values, 0).astype(dtype)
        reasons = _reasons(x, "pattern", padded.shape, values.shape, kernel_size, strides, dtype)
        name = dispatch.pick(OP, implementation, reasons)
        y = _pattern(padded, values, positions, kernel_size, strides, name)
        found = jnp.where(channels < 0, features, channels).reshape(-1)
        source = jnp.full(features, found.size).at[found].set(jnp.arange(found.size), mode="drop")
        return y.at[..., source].get(mode="fill", fill_value=0)

    return on_mesh(run, _spec, x, values, positions, channels)


def _spec(x, *others):
    """The result is sharded along the images of x."""
    del others
    return PartitionSpec(x[0], None, None, None)


def _check_input(x, values, name, ndim, axes):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floats of shape (batch, height, width, channels), got {x.dtype} of shape {x.shape}"
        )
    if values.ndim != ndim or not jnp.issubdtype(values.dtype, jnp.floating) or 0 in values.shape:
        raise ValueError(f"{name} must be floats of shape {axes}, got {values.dtype} of shape {values.shape}")


def _check_indices(name, indices, shape, count, things):
    """Outside `jax.jit` indices must also be among the `count` things that they address."""
    if indices.shape != shape or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape {shape}, got {indices.dtype} of shape {indices.shape}"
        )
    if not isinstance(indices, jax.core.Tracer) and len(wrong := np.argwhere(np.asarray(indices) >= count)):
        block, at = wrong[0]
        raise ValueError(
            f"{name} must be below the {count} {things}, but block {block} has {indices[block, at]}"
        )


def _reasons(x, kind: str, *about):
    """{implementation: why it cannot convolve here, or None}, best first, for the "pointwise" or "pattern" kernel."""
    kernels = {"pallas_gpu": dispatch.gpu_reason(9, at=x), "pallas_tpu": dispatch.tpu_reason(at=x)}
    return {
        name: reason or getattr(dispatch.module(OP, name), f"{kind}_reason")(*about)
        for name, reason in kernels.items()
    } | {"xla": None, "reference": None}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pointwise(pixels, values, indices, implementation: str):
    """`(I, pixels)` to `(B r, pixels)`."""
    return dispatch.module(OP, implementation).pointwise(
        pixels, values, jnp.maximum(indices, 0), lengths(indices)
    )


def _pointwise_forward(pixels, values, indices, implementation):
    return _pointwise(pixels, values, indices, implementation), (pixels, values, indices)


def _pointwise_backward(implementation, saved, g):
    """Both through dense products: gathers for single channels save nothing where every weight's gradient is wanted."""
    del implementation
    pixels, values, indices = saved
    reference = dispatch.module(OP, "reference")
    blocks, _, width = values.shape
    kernel = reference.pointwise_kernel(values, indices, pixels.shape[0], blocks * width)
    whole = matmul(pixels, g.T).reshape(-1, blocks, width)
    return matmul(kernel, g), whole[jnp.maximum(indices, 0), jnp.arange(blocks)[:, None]], None


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _pattern(x, values, positions, kernel_size, strides, implementation: str):
    """Padded `(batch, H, W, I)` to `(batch, H', W', B r)`."""
    module = dispatch.module(OP, implementation)
    return module.pattern(x, values, jnp.maximum(positions, 0), lengths(positions), kernel_size, strides)


def _pattern_forward(x, values, positions, kernel_size, strides, implementation):
    return _pattern(x, values, positions, kernel_size, strides, implementation), (x, values, positions)


def _pattern_backward(kernel_size, strides, implementation, saved, g):
    """Only the kept positions, in XLA."""
    del implementation
    x, values, positions = saved
    pattern = dispatch.module(OP, "xla").pattern

    def convolve(x, values):
        return pattern(x, values, jnp.maximum(positions, 0), lengths(positions), kernel_size, strides)

    return *jax.vjp(convolve, x, values)[1](g), None


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)
_pattern.defvjp(_pattern_forward, _pattern_backward)
