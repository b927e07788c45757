"""Products with an N:M sparse weight: n values kept in every m rows, with packed positions (see `layout`)."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.meshes import like_rows, on_mesh
from pallas_kernels.nm_matmul.layout import index_bytes
from pallas_kernels.rows import call
from pallas_kernels.sums import matmul

OP = "nm_matmul"


def nm_matmul(x, values, indices, *, n: int, m: int, implementation: str | None = None):
    """`x @ W` for an N:M weight W `(K, N)`, differentiable with respect to `x` and `values`.

    Args:
      x: `(..., K)`, of a float dtype, K divisible by m.
      values: `(K / m n, N)`: for each group of m rows its n kept values, in the order of their positions.
      indices: `(ceil(K / m n log2(m) / 8), N)` uint8, the packed positions, see `layout`.
      n, m: the pattern; m is a power of two from 2 to 256.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(..., N)` in the promoted dtype of `x` and `values`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the pattern is none, the shapes do not fit together or the named implementation
        cannot run here.
    """
    x, values, indices = (jnp.asarray(array) for array in (x, values, indices))
    _check(x, values, indices, n, m)
    dtype = jnp.result_type(x, values)

    def run(x, values, indices):
        flat, values = x.reshape(-1, x.shape[-1]).astype(dtype), values.astype(dtype)
        name = dispatch.pick(OP, implementation, _reasons(flat, values, n, m))
        return _product(flat, values, indices, n, m, name).reshape(*x.shape[:-1], values.shape[1])

    return on_mesh(run, like_rows, x, values, indices)


def _check(x, values, indices, n, m):
    if not (m in (2, 4, 8, 16, 32, 64, 128, 256) and 0 < n <= m):
        raise ValueError(f"n:m must have 0 < n <= m and m a power of two from 2 to 256, got {n}:{m}")
    floats = jnp.issubdtype(values.dtype, jnp.floating)
    if values.ndim != 2 or values.shape[0] % n or 0 in values.shape or not floats:
        raise ValueError(
            f"values must be floats of shape (groups * {n}, columns), neither of them 0, got {values.dtype} of shape "
            f"{values.shape}"
        )
    inner = values.shape[0] // n * m
    if x.ndim < 1 or x.shape[-1] != inner:
        raise ValueError(f"x must end with the weight's {inner} rows, but its shape is {x.shape}")
    packed = (index_bytes(values.shape[0], m), values.shape[1])
    if indices.shape != packed or indices.dtype != jnp.uint8:
        raise ValueError(
            f"the packed indices must be uint8 of shape {packed}, got {indices.dtype} of shape {indices.shape}"
        )


def _reasons(x, values, n, m):
    shapes = (x.shape, values.shape, x.dtype, n, m)
    generation = dispatch.gpu_reason(9, 10, at=x)
    gpu = generation or dispatch.module(OP, "pallas_gpu").reason(*shapes)
    triton = dispatch.gpu_reason(8, 9, 10, 12, at=x) or dispatch.module(OP, "triton").reason(*shapes)
    tpu = dispatch.tpu_reason(at=x) or dispatch.module(OP, "pallas_tpu").reason(*shapes)
    kernels = {"pallas_gpu": gpu, "triton": triton, "pallas_tpu": tpu}
    plain = {"xla": None, "reference": None}
    # Blackwell's kernel has not been run by anybody, and must be named.
    unseen = gpu is None and dispatch.module(OP, "pallas_gpu").is_blackwell()
    return plain | kernels if unseen else kernels | plain


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(x, values, indices, n: int, m: int, implementation: str):
    module = dispatch.module(OP, implementation)
    return call(
        implementation, lambda *args: module.matmul(*args, n, m), "mk en bn -> mn", x, values, indices
    )


def _forward(x, values, indices, n, m, implementation):
    return _product(x, values, indices, n, m, implementation), (x, values, indices)


def _backward(n, m, implementation, saved, g):
    """Two dense products: one with the decompressed weight, one that is sampled at the kept positions."""
    del implementation  # both products are as large as the dense ones, whatever the forward one was
    x, values, indices = saved
    xla = dispatch.module(OP, "xla")
    weight = xla.decompress(values, indices, n, m)
    return matmul(g, weight.T), xla.sample(matmul(x.T, g), indices, n, m), None


_product.defvjp(_forward, _backward)
