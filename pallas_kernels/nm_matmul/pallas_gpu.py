"""Products with an N:M weight on Hopper: tiles are decompressed in shared memory and multiplied by wgmma.

What is read from main memory is the packed weight, for 2:4 in bfloat16 9/16 of the dense one, which bounds the speed-up
at small batches by 1.78; at large ones the tensor cores do as much as for a dense weight, so that the gain is memory.

Decompression is elementwise: a register holds the same entry of a period (see `layout`) for 16 periods and 128
columns, and row p of all 16 periods is one such array. The rows of a tile are therefore stored with p first, and the
columns of x are brought into the same order beforehand; the order of a sum does not matter. Where shared memory allows,
two tiles take turns, so that one is decompressed while the other is multiplied.

Up to `SMALL` rows the roles of wgmma's operands are exchanged, since its first one has at least 64 rows: the tile of
the weight is the first operand, read transposed. The contracted axis is divided among thread blocks until there are
enough of them to fill the device, and their sums are added up afterwards.

On Blackwell see `blackwell`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.nm_matmul import blackwell
from pallas_kernels.nm_matmul.layout import entry_code, period

SMALL = 32  # rows of x
PERIODS = 16  # of a tile
COLUMNS = 128  # of a tile
BLOCKS = 264  # thread blocks that fill a device of 132 multiprocessors


def reason(x_shape, values_shape, dtype, n: int, m: int):
    """Why weights of these shapes, dtype and pattern cannot run, or None."""
    if is_blackwell():
        return blackwell.reason(x_shape, values_shape, dtype, n, m)
    whole = period(n, m)
    if whole.rows > 16:
        return f"a period of the pattern may have at most 16 rows, {n}:{m} has {whole.rows}"
    needed = _shared_bytes(_tile_rows(x_shape[0], whole), whole)
    if needed > hopper.MEMORY:
        return f"its tiles must fit into {hopper.MEMORY} bytes of shared memory, and {n}:{m} needs {needed}"
    return (
        hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16)
        or hopper.multiple_reason("the weight's columns", values_shape[1], 16)
        or (None if x_shape[0] else "there are no rows to multiply")
    )


def matmul(x, values, indices, n: int, m: int):
    """`x @ W`: `(M, K)` to `(M, N)`."""
    if is_blackwell():
        return blackwell.matmul(x, values, indices, n, m)
    batch, inner = x.shape
    whole = period(n, m)
    rows = _tile_rows(batch, whole)
    if _shared_bytes(rows, whole) > hopper.MEMORY:  # jax.vmap adds to the rows
        parts = [x[start : start + 8] for start in range(0, batch, 8)]
        return jnp.concatenate([matmul(part, values, indices, n, m) for part in parts])
    x = hopper.pad_rows(x)
    tile = PERIODS * whole.rows
    steps = pl.cdiv(inner, tile)
    x = jnp.pad(x, ((0, 0), (0, steps * tile - inner)))
    x = x.reshape(-1, steps, PERIODS, whole.rows).swapaxes(2, 3).reshape(-1, steps * tile)
    values, indices = (
        _periods(array, size) for array, size in ((values, whole.entries), (indices, whole.bytes))
    )
    if batch <= SMALL:
        parts = math.gcd(steps, max(1, BLOCKS // pl.cdiv(values.shape[2], COLUMNS)))
        y = _products(x, values, indices, n, m, rows, parts=parts, exchanged=True)
        return jnp.sum(y, axis=0).T[:batch].astype(x.dtype)
    return _products(x, values, indices, n, m, rows, parts=1, exchanged=False)[0, :batch]


def _tile_rows(batch: int, whole) -> int:
    """Rows of x in a tile."""
    if batch <= SMALL:
        return batch + -batch % 8
    return 128 if batch > 64 and whole.rows <= 8 else 64


def _shared_bytes(rows: int, whole) -> int:
    """Shared memory for two tiles of x and of the packed weight, decompressed ones and barriers."""
    tile = PERIODS * whole.rows
    loaded = 2 * rows * tile + PERIODS * COLUMNS * (2 * whole.entries + whole.bytes)
    return 2 * loaded + 2 * _slots(whole) * tile * COLUMNS + 2**10


def _slots(whole) -> int:
    """Decompressed tiles at a time."""
    return 2 if whole.rows <= 8 else 1


def is_blackwell() -> bool:
    """Whether the default device is of that generation; without a device kernels are for Hopper."""
    found = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    return found.split(".")[0] == "10"


def _periods(array, size: int):
    """`(rows, N)` to `(periods, size, N)`."""
    return jnp.pad(array, ((0, -array.shape[0] % size), (0, 0))).reshape(-1, size, array.shape[1])


def _products(x, values, indices, n, m, rows: int, parts: int, exchanged: bool):
    """Sums over `parts` of the contracted axis: `(parts, M, N)` in x's dtype, or `(parts, N, M)` in float32."""
    whole, dtype = period(n, m), x.dtype
    tile, columns = PERIODS * whole.rows, values.shape[2]
    steps = x.shape[1] // tile // parts
    total_shape = (COLUMNS, rows) if exchanged else (rows, COLUMNS)
    y_shape = (parts, columns, x.shape[0]) if exchanged else (parts, x.shape[0], columns)
    y_dtype = jnp.float32 if exchanged else dtype
    operand = hopper.transforms(dtype, tile, COLUMNS)
    slots = _slots(whole)

    def kernel(x_ref, values_ref, indices_ref, y_ref, weight):
        part, row, column = (lax.axis_index(name) for name in ("part", "row", "column"))

        def multiply(total, step, x_tile, *stored):
            slot = lax.rem(step[0], slots)
            _decompress(weight.at[slot], stored[: whole.entries], stored[whole.entries :], n, m)
            plgpu.commit_smem()
            if exchanged:
                plgpu.wgmma(total, weight.at[slot].T, x_tile.T)
            else:
                plgpu.wgmma(total, x_tile, weight.at[slot])
            plgpu.wgmma_wait(slots - 1)

        def one_of(i):
            return plgpu.BlockSpec(
                (PERIODS, None, COLUMNS), lambda k: (part * steps + k, i, column), delay_release=1
            )

        def accumulate(total):
            plgpu.emit_pipeline(
                lambda *args: multiply(total, *args),
                grid=(steps,),
                in_specs=[
                    plgpu.BlockSpec(
                        (rows, tile), lambda k: (row, part * steps + k), transforms=operand, delay_release=1
                    ),
                    *map(one_of, range(whole.entries)),
                    *map(one_of, range(whole.bytes)),
                ],
                max_concurrent_steps=min(2, steps) + (steps == 1),
            )(x_ref, *[values_ref] * whole.entries, *[indices_ref] * whole.bytes)
            return total[...]

        total = pl.run_scoped(accumulate, plgpu.ACC(total_shape, jnp.float32))

        def store(out):
            out[...] = total.astype(y_dtype)
            plgpu.commit_smem()
            at = (pl.ds(column * COLUMNS, COLUMNS), pl.ds(row * rows, rows))
            plgpu.copy_smem_to_gmem(out, y_ref.at[(part, *(at if exchanged else at[::-1]))])
            plgpu.wait_smem_to_gmem(0)

        result = hopper.transforms(y_dtype, total_shape[1], y_shape[2])
        pl.run_scoped(store, plgpu.SMEM(total_shape, y_dtype, transforms=result))

    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct(y_shape, y_dtype),
        scratch_types=[plgpu.SMEM((slots, tile, COLUMNS), dtype, transforms=operand)],
        grid=(parts, pl.cdiv(x.shape[0], rows), pl.cdiv(columns, COLUMNS)),
        grid_names=("part", "row", "column"),
    )
    return run(x, values, indices)


def _decompress(weight, values, indices, n: int, m: int):
    """Writes row p of every period to the p-th stretch of `weight`, `(rows of a period x PERIODS, COLUMNS)`.

    Args:
      weight: reference in shared memory.
      values, indices: for each entry and each index byte of a period a reference of shape `(PERIODS, COLUMNS)`.
    """
    layout = plgpu.Layout.SMEM_GMEM_COPY((PERIODS, COLUMNS), weight.dtype, 128)
    index_rows = [hopper.load(ref, layout, optimized=False).astype(jnp.int32) for ref in indices]
    zero = plgpu.layout_cast(jnp.zeros((PERIODS, COLUMNS), weight.dtype), layout)
    for group in range(len(values) // n):
        entries = range(group * n, group * n + n)
        kept = [
            (entry_code(index_rows, i, m), hopper.load(values[i], layout, optimized=False)) for i in entries
        ]
        for position in range(m):
            row = zero
            for code, value in kept:
                row = jnp.where(code == position, value, row)
            weight[pl.ds((group * m + position) * PERIODS, PERIODS), :] = row
