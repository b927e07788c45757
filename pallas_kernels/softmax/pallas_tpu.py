"""The two passes on TPUs: a grid over blocks of rows, then over the passes, then over blocks of columns, in sequence.

The running pairs, one for each lane, stay in the chip's memory from block to block; the second pass writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.softmax import pairs

_ROWS = 16  # of a block: the height of a tile of 16-bit numbers
_COLUMNS = 4096


def reason(x):
    """Why this cannot take x, or None."""
    return tpu.dtype_reason(x.dtype)


def softmax(x):
    """As `pallas_kernels.softmax.softmax`; x (rows, K)."""
    rows, columns = x.shape
    width = min(_COLUMNS, -(-columns // tpu.LANES) * tpu.LANES)
    blocks = pl.cdiv(columns, width)
    return pl.pallas_call(
        functools.partial(_kernel, columns, width),
        grid=(pl.cdiv(rows, _ROWS), 2, blocks),
        in_specs=[pl.BlockSpec((_ROWS, width), lambda i, p, j: (i, j))],
        # the first pass stays at the block that the second begins with: nothing is written in between
        out_specs=pl.BlockSpec((_ROWS, width), lambda i, p, j: (i, p * j)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((_ROWS, tpu.LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
    )(x)


def _kernel(columns, width, x_ref, out_ref, mantissa_ref, exponent_ref):
    sweep, block = pl.program_id(1), pl.program_id(2)
    position = block * width + lax.broadcasted_iota(jnp.int32, x_ref.shape, 1)
    x = jnp.where(position < columns, x_ref[...].astype(jnp.float32), -jnp.inf)
    m, n = pairs.exponential(x)

    @pl.when((sweep == 0) & (block == 0))
    def _():
        mantissa_ref[...] = jnp.zeros_like(mantissa_ref)
        exponent_ref[...] = jnp.full_like(exponent_ref, pairs.NOTHING)

    @pl.when(sweep == 0)
    def _():
        sums = mantissa_ref[...], exponent_ref[...]
        for first in range(0, width, tpu.LANES):
            lanes = slice(first, first + tpu.LANES)
            sums = pairs.add(sums, (m[:, lanes], n[:, lanes]))
        mantissa_ref[...], exponent_ref[...] = sums

    @pl.when(sweep == 1)
    def _():
        whole = pairs.total((mantissa_ref[...], exponent_ref[...]))
        out_ref[...] = pairs.ratio((m, n), whole).astype(out_ref.dtype)
