"""The two passes on GPUs, in Mosaic GPU: a warpgroup takes a row, straight from memory, one running pair per register.

Several warpgroups share a multiprocessor and hide each other's waits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.softmax import pairs

_THREADS = 128  # of a warpgroup
_COLUMNS = 2048  # in registers at a time, at most


def softmax(x):
    """As `pallas_kernels.softmax.softmax`; x (rows, K). Copies x first if K is no multiple of 128."""
    rows, columns = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -columns % _THREADS)), constant_values=-jnp.inf)
    width = math.gcd(padded.shape[1], _COLUMNS)
    out = plgpu.kernel(
        functools.partial(_kernel, width),
        out_type=jax.ShapeDtypeStruct(padded.shape, x.dtype),
        grid=(rows,),
        grid_names=("row",),
    )(padded)
    return out[:, :columns]


def _kernel(width, x_ref, out_ref):
    row = lax.axis_index("row")
    slices = x_ref.shape[1] // width

    def part(i):
        return row, pl.ds(i * width, width)

    def load(i):
        return pairs.exponential(x_ref[part(i)].astype(jnp.float32))

    mantissas, exponents = lax.fori_loop(1, slices, lambda i, sums: pairs.add(sums, load(i)), load(0))
    exponent = exponents.max()
    whole = (mantissas * pairs.power_of_two(exponents - exponent)).sum(), exponent

    @pl.loop(0, slices)
    def _(i):
        out_ref[part(i)] = pairs.ratio(load(i), whole).astype(out_ref.dtype)
