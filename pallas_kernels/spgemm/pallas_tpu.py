"""Products of sparse matrices on TPU: dense tiles in vector memory as the scratchpad, tiles without entries skipped.

One grid step multiplies one tile of each factor on the matrix unit, for a tile of the product whose steps follow each
other; a prefetched schedule names the tiles that have entries in both factors, and repeats the last one, so that
nothing is fetched for the steps that remain. XLA gathers the product's entries afterwards. TensorCores gather no single
numbers, so this is all that sparsity can save here: it costs the memory of three dense matrices, and the time of a
dense product unless entries cluster.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.spgemm import tiles
from pallas_kernels.spgemm.reference import at

TILE = (tpu.LANES, tpu.LANES, tpu.LANES)
STEPS = 2**17  # that fit into scalar memory


def reason(sizes, dtype):
    """Why matrices of these sizes and dtype cannot be multiplied, or None."""
    if min(sizes) < 1:
        return f"all sizes must be at least 1, got {sizes}"
    rows, inner, columns = (-(-size // step) for size, step in zip(sizes, TILE, strict=True))
    if rows * inner * columns > STEPS:
        return f"at most {STEPS} products of tiles can be scheduled, got {rows * inner * columns}"
    return tpu.dtype_reason(dtype)


def product(x, y, places, lists, sizes):
    """The entries of X Y at the third of `places`, see `pallas_kernels.spgemm`."""
    del lists
    order, count = tiles.schedule(places, sizes, TILE)
    left = tiles.padded(x, places[0], sizes[:2], TILE[:2])
    right = tiles.padded(y, places[1], sizes[1:], TILE[1:])
    return at(_tiles(left, right, order, count), places[2])


@sequential_vmap
def _tiles(x, y, order, count):
    """The product `(M, N)` of `x (M, K)` and `y (K, N)`."""
    rows, columns, inner = order.shape

    def step(i, j, t):
        return (i * columns + j) * inner + t

    def kernel(order_ref, count_ref, x_ref, y_ref, out_ref, sum_ref):
        del order_ref
        i, j, t = (pl.program_id(axis) for axis in range(3))

        @pl.when(t == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(t < count_ref[i * columns + j])
        def _():
            sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    run = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, columns, inner),
            in_specs=[
                pl.BlockSpec(TILE[:2], lambda i, j, t, order, count: (i, order[step(i, j, t)])),
                pl.BlockSpec(TILE[1:], lambda i, j, t, order, count: (order[step(i, j, t)], j)),
            ],
            out_specs=pl.BlockSpec(TILE[::2], lambda i, j, t, order, count: (i, j)),
            scratch_shapes=[pltpu.VMEM(TILE[::2], jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return run(order.reshape(-1), count.reshape(-1), x, y)
