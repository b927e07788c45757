"""What the TPU kernels share: tile sizes, and why a shape cannot run."""

import jax.numpy as jnp

LANES = 128
ROWS = 512  # of a tile


def dtype_reason(dtype):
    """Why operands of this dtype cannot run, or None."""
    name = jnp.dtype(dtype).name
    return (
        None if name in ("bfloat16", "float32") else f"its operands must be bfloat16 or float32, got {name}"
    )


def multiple_reason(what: str, size: int, multiple: int):
    """Why a kernel whose `what` must be a multiple cannot run on `size`, or None."""
    return (
        None if size > 0 and size % multiple == 0 else f"{what} must be a multiple of {multiple}, got {size}"
    )


def row_tile(rows: int, dtype) -> int:
    """Rows of a tile: all of them up to `ROWS`, in whole tiles of the vector memory."""
    sublanes = 32 // jnp.dtype(dtype).itemsize
    return min(ROWS, -(-rows // sublanes) * sublanes)
