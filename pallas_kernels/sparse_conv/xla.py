"""Sparse convolutions in XLA: gathered channels or shifted images, and one dense product for each block of filters."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_conv.geometry import out_size
from pallas_kernels.sparse_conv.reference import pointwise_kernel
from pallas_kernels.sums import matmul, sum_dtype

# Gathered elements per chunk of blocks, which XLA multiplies in one batched product while they are in cache.
CHUNK = 2**17
# A gathered channel costs as much as a dense one times 1 + GATHER / r: it is copied for r output channels only. On two
# CPU cores blocks of 16 are faster than dense from about 80% sparsity, single channels at 98.5%.
GATHER = 64


def pointwise(pixels, values, indices, lengths):
    """`(I, pixels)` to `(B r, pixels)`; through the dense kernel where gathers would cost more than they save."""
    del lengths
    (inputs, count), (blocks, slots, width) = pixels.shape, values.shape
    if slots * (1 + GATHER / width) > inputs:
        kernel = pointwise_kernel(values, indices, inputs, blocks * width)
        return matmul(kernel.T, pixels)
    chunk = max(1, min(blocks, CHUNK // max(1, slots * count)))
    fill = (0, -blocks % chunk), (0, 0)
    indices = jnp.pad(indices, fill).reshape(-1, chunk, slots)
    values = jnp.pad(values, (*fill, (0, 0))).reshape(-1, chunk, slots, width)

    def one_chunk(arrays):
        rows = jnp.take(pixels, arrays[0], axis=0, mode="clip")
        return jnp.einsum("clp,clr->crp", rows, arrays[1], preferred_element_type=sum_dtype(rows.dtype))

    y = lax.map(one_chunk, (indices, values)).astype(pixels.dtype)
    return y.reshape(-1, count)[: blocks * width]


def pattern(x, values, positions, lengths, kernel_size, strides):
    """Padded `(batch, H, W, I)` to `(batch, H', W', B r)`: one product over the kept positions of a block at a time."""
    del lengths
    blocks, kept, inputs, width = values.shape
    height, length = out_size(x.shape, kernel_size, strides)
    reach = (height - 1) * strides[0] + 1, (length - 1) * strides[1] + 1

    @jax.checkpoint  # its gradient makes the shifted images again instead of keeping those of all blocks
    def one_block(arrays):
        weights, position = arrays
        zero = jnp.zeros((), position.dtype)  # with 64-bit integers switched on, a plain 0 would be one
        images = [
            lax.dynamic_slice(
                x,
                (zero, position[p] // kernel_size[1], position[p] % kernel_size[1], zero),
                (x.shape[0], *reach, inputs),
            )[:, :: strides[0], :: strides[1]]
            for p in range(kept)
        ]
        return jnp.einsum(
            "nhwk,kr->nhwr",
            jnp.concatenate(images, axis=-1),
            weights.reshape(-1, width),
            preferred_element_type=sum_dtype(x.dtype),
        ).astype(x.dtype)

    y = lax.map(one_block, (values, positions))
    return jnp.moveaxis(y, 0, 3).reshape(x.shape[0], height, length, blocks * width)
