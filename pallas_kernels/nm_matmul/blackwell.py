"""Products with a 2:4 weight on Blackwell's sparse tensor cores, through `tcgen05_mma(..., a_sparse_metadata=...)`.

The instruction takes its first operand compressed along the contracted axis, so that y.T = W.T x.T is computed, with
`values` read transposed as the first operand as they are stored. What has to be rearranged is the metadata: for every
group the two positions, in the order that the tensor memory wants.

Nobody has seen this kernel run: JAX's interpreter of GPU kernels refuses sparse metadata, and no Blackwell device was
at hand. It is lowered for such a device in the tests, and used only where it is named; `implementation=None` prefers
XLA on Blackwell. Releases of JAX that cannot lower it are refused with the reason.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.nm_matmul.layout import unpack

COLUMNS = 128  # of the weight in a tile, the only size of a sparse first operand
INNER = 128  # rows of the weight in a tile
STAGES = 2


def reason(x_shape, values_shape, dtype, n: int, m: int):
    """Why weights of these shapes, dtype and pattern cannot run, or None."""
    if (n, m) != (2, 4):
        return f"Blackwell's sparse tensor cores know 2:4 only, got {n}:{m}"
    if not hasattr(plgpu, "format_tcgen05_sparse_metadata"):
        return f"JAX {jax.__version__} cannot arrange the metadata of sparse tensor cores"
    return (
        hopper.dtype_reason(dtype, jnp.bfloat16, jnp.float16)
        or hopper.multiple_reason("the weight's columns", values_shape[1], COLUMNS)
        or hopper.multiple_reason("the weight's rows", x_shape[1], INNER)
        or (None if x_shape[0] else "there are no rows to multiply")
    )


def metadata(indices, entries: int, dtype):
    """Packed positions `(K / 8, N)` as tensor memory wants them: `(N / 128, K / 128, 128, 64)` uint2."""
    positions = unpack(indices, entries, 4).T.reshape(indices.shape[1], entries // 2, 2)
    return plgpu.format_tcgen05_sparse_metadata(positions.astype(jnp.uint2), dtype)


def matmul(x, values, indices, n: int, m: int):
    """`x @ W`: `(M, K)` to `(M, N)`."""
    del n, m  # 2:4
    batch, inner = x.shape
    columns, dtype = values.shape[1], x.dtype
    rows = 128 if batch > 64 else 64 if batch > 16 else 16
    x = hopper.pad_rows(x, rows)
    steps = inner // INNER
    operand = hopper.transforms(dtype, INNER)

    def kernel(x_ref, values_ref, metadata_ref, y_ref, total, positions, out, done):
        row, column = lax.axis_index("row"), lax.axis_index("column")

        def multiply(step, x_tile, values_tile, metadata_tile):
            plgpu.async_copy_sparse_metadata_to_tmem(metadata_tile, positions)
            plgpu.tcgen05_mma(
                total,
                values_tile.T,
                x_tile.T,
                done,
                a_sparse_metadata=positions,
                accumulate=step[0] > 0,
            )
            plgpu.barrier_wait(done)

        plgpu.emit_pipeline(
            multiply,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec((rows, INNER), lambda k: (row, k), transforms=operand),
                plgpu.BlockSpec((INNER // 2, COLUMNS), lambda k: (k, column), transforms=operand),
                plgpu.BlockSpec((1, 1, 128, 64), lambda k: (column, k, 0, 0)),
            ],
            max_concurrent_steps=min(STAGES, steps),
        )(x_ref, values_ref, metadata_ref)
        out[...] = plgpu.async_load_tmem(total).astype(dtype)
        plgpu.wait_load_tmem()
        plgpu.commit_smem()
        at = (pl.ds(column * COLUMNS, COLUMNS), pl.ds(row * rows, rows))
        plgpu.copy_smem_to_gmem(out, y_ref.at[at])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        compiler_params=hopper.LANE,
        out_type=jax.ShapeDtypeStruct((columns, x.shape[0]), dtype),
        scratch_types=[
            plgpu.TMEM((COLUMNS, rows), jnp.float32),
            plgpu.TMEM((COLUMNS, INNER // 2), jnp.uint2, layout=plgpu.TMEMLayout.SPARSE_METADATA_LAYOUT),
            plgpu.SMEM((COLUMNS, rows), dtype, transforms=hopper.transforms(dtype, rows)),
            plgpu.Barrier(orders_tensor_core=True),
        ],
        grid=(x.shape[0] // rows, columns // COLUMNS),
        grid_names=("row", "column"),
    )
    return run(x, values, metadata(indices, values.shape[0], dtype)).T[:batch]
