"""Products with an N:M weight on TPU: tiles are decompressed in vector memory and multiplied by the matrix unit.

What is read from main memory is the packed weight. Decompression works on stretches of a column with whole groups
and eight index bytes, so that every slice and reshape is along whole sublanes of 32-bit values.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.nm_matmul.layout import entry_code, period

COLUMNS = 256  # of a tile
ROWS = 512  # of a tile of the weight
BYTE_ROWS = 32  # of a tile of uint8 in vector memory
ENTRIES = 256  # that are unrolled


def reason(x_shape, values_shape, dtype, n: int, m: int):
    """Why weights of these shapes, dtype and pattern cannot run, or None."""
    if period(n, m, 8).entries > ENTRIES:
        return f"a period of the pattern may have at most {ENTRIES} entries, {n}:{m} has {period(n, m, 8).entries}"
    return (
        tpu.dtype_reason(dtype)
        or tpu.multiple_reason("the weight's columns", values_shape[1], tpu.LANES)
        or (None if x_shape[0] else "there are no rows to multiply")
    )


def matmul(x, values, indices, n: int, m: int):
    """`x @ W`: `(M, K)` to `(M, N)`."""
    (batch, inner), columns = x.shape, values.shape[1]
    whole = period(n, m, 8)
    periods = max(BYTE_ROWS // 8, ROWS // whole.rows)
    steps = pl.cdiv(inner, periods * whole.rows)
    # Whole tiles along the contracted axis, where what lies beyond the end would be added.
    filled = [
        jnp.pad(x, ((0, 0), (0, steps * periods * whole.rows - inner))),
        *(
            jnp.pad(array, ((0, steps * periods * size - array.shape[0]), (0, 0)))
            for array, size in ((values, whole.entries), (indices, whole.bytes))
        ),
    ]
    tile = tpu.row_tile(batch, x.dtype)
    width = COLUMNS if columns % COLUMNS == 0 else tpu.LANES

    def kernel(x_ref, values_ref, indices_ref, y_ref, sum_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        weight = _decompress(values_ref[...], indices_ref[...], n, m)
        sum_ref[...] += jnp.dot(x_ref[...], weight.astype(x_ref.dtype), preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(batch, tile), columns // width, steps),
        in_specs=[
            pl.BlockSpec((tile, periods * whole.rows), lambda i, j, k: (i, k)),
            pl.BlockSpec((periods * whole.entries, width), lambda i, j, k: (k, j)),
            pl.BlockSpec((periods * whole.bytes, width), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((tile, width), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((batch, columns), x.dtype),
        scratch_shapes=[pltpu.VMEM((tile, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(*filled)


def _decompress(values, indices, n: int, m: int):
    """`(P entries, width)` values and `(P bytes, width)` indices to the rows `(P rows, width)`, float32."""
    whole, width = period(n, m, 8), values.shape[1]
    values = values.astype(jnp.float32).reshape(-1, whole.entries, width)
    indices = indices.astype(jnp.int32).reshape(-1, whole.bytes, width)
    index_rows = [indices[:, byte][:, None] for byte in range(whole.bytes)]
    rows = max(8, m)  # that are built together: a whole number of sublanes
    entries = rows // m * n
    position = lax.broadcasted_iota(jnp.int32, (values.shape[0], rows, width), 1)
    parts = []
    for start in range(0, whole.entries, entries):
        part = jnp.zeros(position.shape, jnp.float32)
        for i in range(entries):
            code = entry_code(index_rows, start + i, m) + i // n * m
            part = jnp.where(code == position, values[:, start + i][:, None], part)
        parts.append(part)
    return jnp.concatenate(parts, axis=1).reshape(-1, width)
