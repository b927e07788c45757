"""Softmax in two passes over memory, after Dukhan and Ablavatski [2020].

The usual softmax reads its input three times: for the largest entry, for the sum of exponentials, for the results. If
every exponential is a pair (mantissa, integer exponent), nothing can overflow, the sum needs no maximum first, and
two passes are enough. Rescaling a sum to a new exponent is exact.
"""

import functools
import string

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.batching import independent
from pallas_kernels.meshes import like_rows, on_mesh

__all__ = ["softmax"]

OP = "softmax"


def softmax(x, *, implementation: str | None = None):
    """exp(x) / sum(exp(x)) over the last axis, computed in float32.

    Args:
      x: (..., K) bfloat16, float16 or float32. Entries of -inf give 0, and a row of nothing else gives zeros; a row
        with NaN or +inf gives NaN.
      implementation: one of "reference", "xla", "pallas_gpu" (Hopper and later), "pallas_tpu", or None for the
        device's best.

    Returns:
      An array like x. The gradient is y * (g - sum(y * g)).

    Raises:
      ValueError: if x is a scalar, has no columns or another dtype, or the implementation cannot run here.
    """
    x = jnp.asarray(x)
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be (..., K) with no empty axis")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}; it must be bfloat16, float16 or float32")
    reasons = {
        "pallas_gpu": dispatch.gpu_reason(9, 10, 12, at=x),
        "pallas_tpu": dispatch.tpu_reason(at=x) or dispatch.module(OP, "pallas_tpu").reason(x),
        "reference": None,  # XLA fuses it well: on CPUs it is three to eight times as fast as two passes
        "xla": None,
    }
    name = dispatch.pick(OP, implementation, reasons)
    return on_mesh(lambda x: _softmax(jnp.atleast_2d(x), name).reshape(x.shape), like_rows, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(x, name):
    return _kernel(name, x.ndim)(x)[0]


def _forward(x, name):
    y = _softmax(x, name)
    return y, y


def _backward(name, y, gradient):
    del name  # the compiler's own fusion reads y and the gradient twice, which a sum over the row needs
    wide, gradient = y.astype(jnp.float32), gradient.astype(jnp.float32)
    inner = (wide * gradient).sum(-1, keepdims=True)
    return ((wide * (gradient - inner)).astype(y.dtype),)


_softmax.defvjp(_forward, _backward)


@functools.lru_cache(maxsize=None)
def _kernel(name, axes):
    """An implementation for arrays of some axes. They become rows on each device: rows of a mesh are not contiguous."""
    rows = string.ascii_letters[: axes - 1]

    def function(x):
        return (dispatch.module(OP, name).softmax(x.reshape(-1, x.shape[-1])).reshape(x.shape),)

    return independent(function, f"{rows}Z -> {rows}Z", rows)
