"""What the Mosaic GPU kernels share: shared-memory layouts that wgmma can read, loads, and why a shape cannot run."""

import inspect
import math

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

MAX_WIDTH = 256  # columns of one wgmma
# Layouts are stated, not inferred: inference does not end for kernels with many registers.
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def dtype_reason(dtype, *wanted):
    """Why a kernel for the dtypes `wanted` cannot run on `dtype`, or None."""
    names = [jnp.dtype(each).name for each in wanted]
    if jnp.dtype(dtype).name in names:
        return None
    return f"its operands must be {' or '.join(names)}, got {jnp.dtype(dtype).name}"


def multiple_reason(what: str, size: int, multiple: int):
    """Why a kernel whose `what` must be a multiple cannot run on `size`, or None."""
    return (
        None if size > 0 and size % multiple == 0 else f"{what} must be a multiple of {multiple}, got {size}"
    )


def k_multiple(dtype) -> int:
    """The contracted size of a wgmma: 32 bytes."""
    return 32 // jnp.dtype(dtype).itemsize


def tile_k(size: int, dtype) -> int:
    """The largest stretch of a contracted size, up to a swizzle of 128 bytes, that divides it."""
    return math.gcd(size, 128 // jnp.dtype(dtype).itemsize)


def transforms(dtype, *minor: int):
    """Tiling and swizzling of operands of one wgmma, given the sizes of their last axes."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(math.gcd(*minor) * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def load(ref, layout, optimized: bool = True):
    """The contents of a shared-memory reference as an array in a layout."""
    everything = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before JAX 0.11
    return plgpu.load(ref, *everything, layout=layout, optimized=optimized)


def pad_rows(x, multiple: int = 8):
    """`x` with rows of zeros up to a multiple: tiles of shared memory are loaded from whole groups of eight rows."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))
