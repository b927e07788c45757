"""What the attention kernels for Hopper GPUs share: tiles of matrix products, and rings of buffers that hold them.

A warpgroup multiplies 64 rows at a time. Tiles lie in shared memory in rows of 128 bytes, swizzled.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper

ROWS = 64  # of a matrix product of one warpgroup
LOG2E = math.log2(math.e)
MASKED = -1e30  # finite: a row that has seen no key yet must not subtract infinities


def reason(dtype, channels):
    """Why heads of this size and type do not fit the tiles, or None."""
    if channels not in (64, 128, 192, 256):
        return f"heads must have 64, 128, 192 or 256 channels, got {channels}"
    return hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16)


def tile(shape, dtype):
    """Shared memory for tiles (..., rows, columns) of a 16-bit type; columns a multiple of 64."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def divide(x, divisor: int):
    """Quotient and remainder of a non-negative int32."""
    return lax.div(x, jnp.int32(divisor)), lax.rem(x, jnp.int32(divisor))


def full(shape, value):
    """A matrix in the registers of a warpgroup."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)


def column(value):
    """One value for each of the rows of a matrix."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def per_row(values, shape):
    """One value per row, for all columns."""
    return lax.broadcast_in_dim(values, shape, [0])


def per_column(values, shape):
    """One value per column, for all rows."""
    return lax.broadcast_in_dim(values, shape, [1])


def positions(shape, axis):
    """Positions along an axis of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def load(ref, axis):
    """A vector in shared memory as one value for each entry of that axis of a matrix."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(1 - axis))


def product(a, b, after_start=lambda: None):
    """a @ b^T of two tiles in shared memory; `after_start` is called while the tensor cores work."""

    def compute(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        after_start()
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def accumulate(acc, a, b):
    """acc + a @ b, a in registers, b in shared memory."""

    def compute(ref):
        plgpu.wgmma(ref, a, b)

    return pl.run_state(compute)(plgpu.ACC.init(acc))


def keep_filled(rings, steps, stages):
    """What the fetching warpgroup does: keeps rings of buffers filled.

    Args:
      rings: of each the barriers that announce a filled and a freed buffer, and copies (source, step -> index into
        it, buffers), as many as the first barrier expects arrivals.
      steps: how often each ring is filled, traced.
      stages: number of buffers.
    """

    def fill(step, slot, wait):
        for ready, free, copies in rings:
            if wait:
                plgpu.barrier_wait(free.at[slot])
            for source, where, buffers in copies:
                plgpu.copy_gmem_to_smem(source.at[where(step)], buffers.at[slot], ready.at[slot])

    for slot in range(stages):
        pl.when(slot < steps)(functools.partial(fill, jnp.int32(slot), slot, wait=False))
    pl.loop(stages, jnp.maximum(steps, stages))(lambda step: fill(step, divide(step, stages)[1], wait=True))


def logits(products, scale, soft_cap):
    """Logits to base 2, and their derivative by the scaled products (None if it is 1)."""
    if soft_cap is None:
        return products * (scale * LOG2E), None
    # the hardware's own tanh has 11 bits, its exponential 22
    tanh = 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * scale / soft_cap)))
    return tanh * (soft_cap * LOG2E), 1 - tanh * tanh


class Turns:
    """Two warpgroups take turns on the tensor cores; one alone has no one to wait for."""

    def __init__(self, barrier, wg, groups):
        self.barrier, self.wg, self.alone = barrier, wg, groups == 1

    def arrive(self):
        if not self.alone:
            plgpu.barrier_arrive(self.barrier)

    def wait(self):
        if not self.alone:
            plgpu.barrier_wait(self.barrier)

    def meet(self):
        self.arrive()
        self.wait()

    def begin(self):
        """The second starts half a step behind the first, which waits for it at the end."""
        if not self.alone:
            pl.when(self.wg == 1)(self.meet)

    def end(self):
        if not self.alone:
            pl.when(self.wg == 0)(self.meet)
