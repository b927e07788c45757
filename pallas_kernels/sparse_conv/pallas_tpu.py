"""Sparse convolutions on TPU.

1 x 1: a tile of pixels of all input channels stays in vector memory, one register tile for each channel; the kernel
walks along the kept weights of a block of output channels, which are scalars, and adds weight times tile. The matrix
unit has no part in it, so that it beats a dense product only where about one weight in a hundred is left.

k x k: one image at a time in vector memory, and for every kept position of a block of filters a product of shifted rows
on the matrix unit. The images are copied once for each column of the kernel (and row phase, if strided), so that a
position is a shift by whole rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.sparse_conv.geometry import out_size, shifted

SCALARS = 2**17  # that fit into scalar memory
MAX_CHANNELS = 16  # whose sums fit into registers
MEMORY = 12 * 2**20  # bytes of vector memory, of 16 MiB


def pointwise_reason(pixels, values, dtype):
    """Why a packed 1 x 1 kernel of this shape cannot run on pixels `(I, count)`, or None."""
    if values[2] > MAX_CHANNELS:
        return f"blocks may have at most {MAX_CHANNELS} output channels, got {values[2]}"
    if 0 in pixels:
        return f"there must be input channels and pixels, got {pixels}"
    if (scalars := values[0] * values[1] * (values[2] + 1)) > SCALARS:
        return f"at most {SCALARS} weights and indices fit into scalar memory, got {scalars}"
    limit = MEMORY // (2 * 4 * 8 * tpu.LANES)  # two buffers of one register tile for each channel
    if pixels[0] > limit:
        return f"at most {limit} input channels fit into vector memory, got {pixels[0]}"
    return tpu.dtype_reason(dtype)


def pattern_reason(x, values, kernel_size, strides, dtype):
    """Why packed filters of this shape cannot run on padded images, or None."""
    if reason := tpu.dtype_reason(dtype):
        return reason
    if not x[0]:
        return "there are no images"
    height, width = out_size(x, kernel_size, strides)
    rows, line = height + (kernel_size[0] - 1) // strides[0], width + -width % _sublanes(dtype)
    copies = min(strides[0], kernel_size[0]) * kernel_size[1]
    inputs, filters = (size + -size % tpu.LANES for size in (_input_tile(values[2]), values[3]))
    size = jnp.dtype(dtype).itemsize
    needed = 2 * size * inputs * (copies * rows * line + values[1] * filters)
    needed += (4 + 2 * size) * height * line * filters
    return (
        None
        if needed <= MEMORY
        else f"an image must fit into {MEMORY} bytes of vector memory, needs {needed}"
    )


@sequential_vmap
def pointwise(pixels, values, indices, lengths):
    """`(I, pixels)` to `(B r, pixels)`."""
    (inputs, count), dtype = pixels.shape, pixels.dtype
    blocks, slots, width = values.shape
    tile = _sublanes(dtype), tpu.LANES
    pixels = jnp.pad(pixels, ((0, 0), (0, -count % (tile[0] * tile[1]))))
    pixels = pixels.reshape(inputs, -1, *tile)
    tiles = pixels.shape[1]

    def kernel(values_ref, indices_ref, lengths_ref, pixels_ref, y_ref):
        block = pl.program_id(1)

        def step(i, sums):
            slot = block * slots + i
            row = pixels_ref[indices_ref[slot], 0].astype(jnp.float32)
            return tuple(total + values_ref[slot * width + j] * row for j, total in enumerate(sums))

        sums = lax.fori_loop(0, lengths_ref[block], step, (jnp.zeros(tile, jnp.float32),) * width)
        for channel, total in enumerate(sums):
            y_ref[0, channel, 0] = total.astype(dtype)

    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles, blocks),
            in_specs=[pl.BlockSpec((inputs, 1, *tile), lambda t, b, *_: (0, t, 0, 0))],
            out_specs=pl.BlockSpec((1, width, 1, *tile), lambda t, b, *_: (b, 0, t, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((blocks, width, tiles, *tile), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )
    scalars = values.astype(jnp.float32).reshape(-1), indices.astype(jnp.int32).reshape(-1), lengths
    return run(*scalars, pixels).reshape(blocks * width, -1)[:, :count]


def pattern(x, values, positions, lengths, kernel_size, strides):
    """Padded `(batch, H, W, I)` to `(batch, H', W', B r)`."""
    height, width = out_size(x.shape, kernel_size, strides)
    images, source, row = shifted(x, positions, kernel_size, strides, _sublanes(x.dtype))
    products = sequential_vmap(partial(_products, height))
    y = products(images, values, source.reshape(-1), row.reshape(-1), lengths)
    y = y.reshape(x.shape[0], -1, height, images.shape[3], values.shape[3])[:, :, :, :width]
    return jnp.moveaxis(y, 1, 3).reshape(x.shape[0], height, width, -1)


def _products(height: int, images, values, source, row, lengths):
    """The sums over positions p of `images[source[b, p], n, h + row[b, p]] @ values[b, p]`: `(batch, B, H' W, r)`.

    Args:
      height: H', the rows h of the result.
      images: `(copies, batch, rows, W, I)`.
      values: `(B, P, I, r)`.
      source, row: `(B P,)`.
      lengths: `(B,)`.
    """
    copies, batch, rows, line, inputs = images.shape
    blocks, kept, _, width = values.shape
    step, dtype = _input_tile(inputs), images.dtype

    def kernel(source_ref, row_ref, lengths_ref, images_ref, values_ref, y_ref, sum_ref):
        block, part = pl.program_id(1), pl.program_id(2)

        @pl.when(part == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def add(p, _):
            at = block * kept + p
            shifted_rows = images_ref[source_ref[at], 0, pl.ds(row_ref[at], height)]
            sum_ref[...] += jnp.dot(
                shifted_rows.reshape(height * line, step),
                values_ref[0, p],
                preferred_element_type=jnp.float32,
            )

        lax.fori_loop(0, lengths_ref[block], add, None)
        y_ref[0, 0] = sum_ref[...].astype(dtype)

    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, blocks, inputs // step),
            in_specs=[
                pl.BlockSpec((copies, 1, rows, line, step), lambda n, b, i, *_: (0, n, 0, 0, i)),
                pl.BlockSpec((1, kept, step, width), lambda n, b, i, *_: (b, 0, i, 0)),
            ],
            out_specs=pl.BlockSpec((1, 1, height * line, width), lambda n, b, i, *_: (n, b, 0, 0)),
            scratch_shapes=[pltpu.VMEM((height * line, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, blocks, height * line, width), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return run(source, row, lengths, images, values)


def _sublanes(dtype) -> int:
    return 32 // jnp.dtype(dtype).itemsize


def _input_tile(inputs: int) -> int:
    """Input channels of one step: as many as the matrix unit is wide, or all if these are no whole tiles."""
    return inputs if inputs % tpu.LANES else tpu.LANES
