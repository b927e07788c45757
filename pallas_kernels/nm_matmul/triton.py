"""Products of a few rows with an N:M weight in Triton, through jax-triton (extra `gpu`).

A program computes a stretch of columns for a part of the contracted axis. It walks along the stored entries, unpacks
their positions and gathers the matching entries of x, which are few enough to stay in the cache: arbitrary pointers,
which Mosaic lacks, make decompression unnecessary. The parts are added up by XLA.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from pallas_kernels import triton_call
from pallas_kernels.nm_matmul.layout import index_bits

ROWS = 16  # of x, at most
COLUMNS = 128  # of a program
PRODUCTS = 128  # of one column in one step of a program
PARTS = 16  # of the contracted axis, at most


def reason(x_shape, values_shape, dtype, n: int, m: int):
    """Why weights of these shapes, dtype and pattern cannot run, or None."""
    del values_shape
    if not 0 < x_shape[0] <= ROWS:
        return f"it multiplies from 1 to {ROWS} rows, got {x_shape[0]}"
    if n & (n - 1) or 8 % index_bits(m):
        return f"n must be a power of two and m one of 2, 4, 16 and 256, got {n}:{m}"
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"its operands must be bfloat16, float16 or float32, got {jnp.dtype(dtype).name}"
    return triton_call.reason()


def matmul(x, values, indices, n: int, m: int, compute_capability: int | None = None):
    """`x @ W`: `(M, K)` to `(M, N)`.

    Args:
      compute_capability: of the device to compile for, 90 for Hopper; None asks the device.
    """
    if x.shape[0] > ROWS:  # jax.vmap adds to the rows
        parts = [x[start : start + ROWS] for start in range(0, x.shape[0], ROWS)]
        return jnp.concatenate([matmul(part, values, indices, n, m, compute_capability) for part in parts])
    product = functools.partial(_product, n=n, m=m, compute_capability=compute_capability)
    return sequential_vmap(product)(x, values, indices)


def _product(x, values, indices, n, m, compute_capability):
    from pallas_kernels.nm_matmul.triton_kernel import nm_kernel

    known = constants(x.shape, values.shape, n, m)
    programs = grid(known)
    y = triton_call.call(
        nm_kernel,
        x,
        values,
        indices,
        out=jax.ShapeDtypeStruct((programs[1], x.shape[0], values.shape[1]), jnp.float32),
        grid=programs,
        constants=known,
        compute_capability=compute_capability,
    )
    return jnp.sum(y, axis=0).astype(x.dtype)


def constants(x_shape, values_shape, n: int, m: int) -> dict:
    """What the kernel knows when it is compiled."""
    (batch, inner), (entries, columns) = x_shape, values_shape
    rows = 1 << (batch - 1).bit_length()
    step = max(8, min(32, PRODUCTS // rows))
    return {
        "batch": batch,
        "inner": inner,
        "columns": columns,
        "entries": entries,
        "n": n,
        "m": m,
        "bits": index_bits(m),
        "steps": -(-entries // (step * min(PARTS, -(-entries // step)))),
        "ROWS": rows,
        "ENTRIES": step,
        "COLUMNS": COLUMNS,
    }


def grid(known: dict) -> tuple[int, int]:
    """The programs that run: columns by parts of the contracted axis."""
    parts = -(-known["entries"] // (known["ENTRIES"] * known["steps"]))
    return -(-known["columns"] // known["COLUMNS"]), parts
