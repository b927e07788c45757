"""Sparse convolutions by way of the dense kernel: the oracle."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sums import sum_dtype


def pointwise_kernel(values, indices, inputs: int, features: int):
    """The dense kernel `(I, features)` of a packed 1 x 1 one."""
    blocks, _, width = values.shape
    row = jnp.where(indices < 0, inputs, indices)
    whole = jnp.zeros((inputs, blocks, width), values.dtype)
    whole = whole.at[row, jnp.arange(blocks)[:, None]].add(values, mode="drop")
    return whole.reshape(inputs, blocks * width)[:, :features]


def pattern_kernel(values, positions, channels, kernel_size, features: int):
    """The dense kernel `(kh, kw, I, features)` of a packed k x k one."""
    _, _, inputs, _ = values.shape
    height, width = kernel_size
    position = jnp.where(positions < 0, height * width, positions)
    channel = jnp.where(channels < 0, features, channels)
    whole = jnp.zeros((height * width, features, inputs), values.dtype)
    at = position[:, :, None], channel[:, None, :]
    whole = whole.at[at].add(values.swapaxes(2, 3), mode="drop")
    return whole.swapaxes(1, 2).reshape(height, width, inputs, features)


def convolve(x, kernel, strides, padding):
    """The dense convolution of NHWC images with an HWIO kernel."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=sum_dtype(x.dtype),
    ).astype(x.dtype)


def pointwise(pixels, values, indices, lengths):
    """`(I, pixels)` to `(B r, pixels)`."""
    del lengths
    blocks, _, width = values.shape
    kernel = pointwise_kernel(values, indices, pixels.shape[0], blocks * width)
    return convolve(pixels.T[None, None], kernel[None, None], (1, 1), "VALID")[0, 0].T


def pattern(x, values, positions, lengths, kernel_size, strides):
    """Padded `(batch, H, W, I)` to `(batch, H', W', B r)`."""
    del lengths
    blocks, _, _, width = values.shape
    channels = jnp.arange(blocks * width).reshape(blocks, width)
    kernel = pattern_kernel(values, positions, channels, kernel_size, blocks * width)
    return convolve(x, kernel, strides, "VALID")
