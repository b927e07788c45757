"""Sparse convolutions on Hopper.

1 x 1: a thread block has one tile of pixels and one block of output channels, whose sums stay in registers; it walks
along the block's kept weights and adds weight times a row of pixels, read through the caches. There are no tensor cores
for this, so that it beats a dense product only where few weights in a hundred are left.

k x k: wgmma over the kept positions of a block of filters, as in a block-sparse product. The images are copied once for
each column of the kernel (and row phase, if strided), so that a tile begins at a multiple of eight rows; from then on a
position costs no copy. float32 operands are rounded to tf32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.sparse_conv.geometry import out_size, shifted

PIXELS = 512  # of a thread block, four for each thread
UNROLL = 4  # rows of pixels on their way at a time
MAX_CHANNELS = 16  # whose sums fit into registers
TILE = 64 * hopper.COMPUTE  # rows


def pointwise_reason(pixels, values, dtype):
    """Why a packed 1 x 1 kernel of this shape cannot run on pixels `(I, count)`, or None."""
    if values[2] > MAX_CHANNELS:
        return f"blocks may have at most {MAX_CHANNELS} output channels, got {values[2]}"
    if 0 in pixels:
        return f"there must be input channels and pixels, got {pixels}"
    return hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32)


def pattern_reason(x, values, kernel_size, strides, dtype):
    """Why packed filters of this shape cannot run on padded images, or None."""
    del kernel_size, strides
    limit = hopper.max_width(dtype)
    if values[3] > limit:
        return f"blocks may have at most {limit} filters, got {values[3]}"
    if not x[0]:
        return "there are no images"
    return hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16, jnp.float32)


@sequential_vmap
def pointwise(pixels, values, indices, lengths):
    """`(I, pixels)` to `(B r, pixels)`."""
    count, dtype = pixels.shape[1], pixels.dtype
    blocks, slots, width = values.shape
    pixels = jnp.pad(pixels, ((0, 0), (0, -count % PIXELS)))
    fill = (0, 0), (0, -slots % UNROLL)
    values = jnp.pad(values, (*fill, (0, 0))).astype(jnp.float32)
    indices = jnp.pad(indices, fill).astype(jnp.int32)

    def kernel(pixels_ref, values_ref, indices_ref, lengths_ref, y_ref):
        block = lax.axis_index("block")
        here = pl.ds(lax.axis_index("tile") * PIXELS, PIXELS)

        def products(i):
            slots = [i * UNROLL + u for u in range(UNROLL)]
            rows = [_load_row(pixels_ref, indices_ref[block, slot], here) for slot in slots]
            weighted = [
                [row * values_ref[block, slot, channel] for slot, row in zip(slots, rows, strict=True)]
                for channel in range(width)
            ]
            return [sum(terms[1:], terms[0]) for terms in weighted]

        def step(i, sums):
            return [total + more for total, more in zip(sums, products(i), strict=True)]

        steps = (lengths_ref[block] + UNROLL - 1) // UNROLL
        sums = lax.fori_loop(1, jnp.maximum(steps, 1), step, products(0))
        for channel, total in enumerate(sums):
            y_ref[block * width + channel, here] = total.astype(dtype)

    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct((blocks * width, pixels.shape[1]), dtype),
        grid=(pixels.shape[1] // PIXELS, blocks),
        grid_names=("tile", "block"),
    )
    return run(pixels, values, indices, lengths)[:, :count]


def _load_row(ref, row, here):
    layout = plgpu.Layout.WG_STRIDED((PIXELS,), vec_size=PIXELS // 128)
    return hopper.load(ref.at[row, here], layout).astype(jnp.float32)


def pattern(x, values, positions, lengths, kernel_size, strides):
    """Padded `(batch, H, W, I)` to `(batch, H', W', B r)`."""
    height, width = out_size(x.shape, kernel_size, strides)
    (blocks, _, inputs, filters), multiple = values.shape, hopper.k_multiple(x.dtype)
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, -inputs % multiple),))
    values = jnp.pad(values, ((0, 0), (0, 0), (0, -inputs % multiple), (0, -filters % multiple)))
    images, source, row = shifted(x, positions, kernel_size, strides, 8)
    copies, batch, rows, line, inputs = images.shape
    tiles = pl.cdiv(batch * rows * line, TILE)
    needed = tiles * TILE + (rows - height) * line  # by the last tile, at the last row of the kernel
    images = images.reshape(copies, -1, inputs)
    images = jnp.pad(images, ((0, 0), (0, needed - images.shape[1]), (0, 0)))
    products = sequential_vmap(partial(_products, tiles))
    y = products(images, values, source, row * line, lengths)
    y = y[: batch * rows * line].reshape(batch, rows, line, blocks, -1)
    return y[:, :height, :width, :, :filters].reshape(batch, height, width, blocks * filters)


def _products(tiles: int, x, values, source, offset, lengths):
    """For each row t and block b the sum over positions p of `x[source[b, p], t + offset[b, p]] @ values[b, p]`.

    Args:
      tiles: how many tiles of rows are computed.
      x: `(copies, T, I)`.
      values: `(B, P, I, r)`.
      source, offset: `(B, P)`; offsets are multiples of 8.
      lengths: `(B,)`.
    """
    dtype = x.dtype
    blocks, _, inputs, width = values.shape
    transposed = dtype == jnp.float32  # wgmma wants those contiguous along the input channels
    values = values.swapaxes(2, 3) if transposed else values
    step, tile = hopper.tile_k(inputs, dtype), TILE
    stored = (width, step) if transposed else (step, width)
    operand = hopper.transforms(dtype, step, stored[1])

    def kernel(row, block, x_ref, values_ref, source_ref, offset_ref, lengths_ref, y_ref, out):
        def x_tile(p, k):
            return source_ref[block, p], pl.multiple_of(row * tile + offset_ref[block, p], 8), k

        def stored_tile(p, k):
            return block, p, *((0, k) if transposed else (k, 0))

        x_spec = plgpu.BlockSpec((None, pl.Element(tile), step), x_tile, transforms=operand, delay_release=1)
        stored_spec = plgpu.BlockSpec((None, None, *stored), stored_tile, transforms=operand, delay_release=1)
        hopper.sum_tiles(
            (row, block),
            (x_ref, x_spec),
            (values_ref, stored_spec),
            y_ref,
            out,
            (lengths_ref[block], inputs // step),
            transposed=transposed,
        )

    shape = tiles * tile, blocks * width
    run = hopper.tiled_products(kernel, shape, (tile, width), (tiles, blocks), dtype)
    return run(x, values, source, offset, lengths)
