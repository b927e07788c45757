"""Products with an unstructured sparse weight W `(K, N)`, of which W.T is in compressed sparse rows: one for each output.

The value of `sum(g * (x @ W))` is linear in `x`, in `data` and in `g`. Its three partial derivatives are three
operations, each of which has the other two as gradients:

  product(x, data)     x @ W
  transposed(g, data)  g @ W.T
  sampled(x, g)        x.T @ g at the stored entries
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.meshes import like_rows, on_mesh

OP = "csr_matmul"


def csr_matmul(x, data, indices, indptr, *, implementation: str | None = None):
    """`x @ W` for a sparse weight W, differentiable with respect to `x` and `data`.

    Args:
      x: `(..., K)`, floats or integers.
      data: `(nnz,)` floats, the stored weights, by output.
      indices: `(nnz,)` integers in [0, K): the input of each, ascending for every output.
      indptr: `(N + 1,)` integers: output j has entries `indptr[j]` up to `indptr[j + 1]`.
      implementation: "xla" or "reference"; None takes the first.

    Returns:
      `(..., N)` in the promoted dtype of `x` and `data`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together or there is no such implementation.
    """
    x, data, indices, indptr = map(jnp.asarray, (x, data, indices, indptr))
    _check(x, data, indices, indptr)
    dtype = jnp.result_type(x, data)
    wide = jnp.promote_types(dtype, jnp.float32)
    name = dispatch.pick(OP, implementation, {"xla": None, "reference": None})

    def run(x, data, indices, indptr):
        flat = x.reshape(-1, x.shape[-1]).astype(wide)
        y = _product(flat, data.astype(wide), indices.astype(jnp.int32), indptr.astype(jnp.int32), name)
        return y.astype(dtype).reshape(*x.shape[:-1], y.shape[1])

    return on_mesh(run, like_rows, x, data, indices, indptr)


def _check(x, data, indices, indptr):
    if data.ndim != 1 or data.shape != indices.shape:
        raise ValueError(
            f"data and indices must be two vectors of one length, got shapes {data.shape} and {indices.shape}"
        )
    if indptr.ndim != 1 or indptr.shape[0] < 2:
        raise ValueError(f"indptr must be a vector of one more than W has outputs, got shape {indptr.shape}")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x must end with at least one input, but its shape is {x.shape}")
    for name, dtype, kind in (
        ("x", jnp.result_type(x, data), jnp.floating),
        ("data", data.dtype, jnp.floating),
        ("indices", indices.dtype, jnp.integer),
        ("indptr", indptr.dtype, jnp.integer),
    ):
        if not jnp.issubdtype(dtype, kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {dtype}")


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x, data, indices, indptr, implementation: str):
    """`x @ W`: `(B, K)` to `(B, N)`."""
    return dispatch.module(OP, implementation).matmul(x, data, indices, indptr)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _transposed(g, data, indices, indptr, inputs: int, implementation: str):
    """`g @ W.T`: `(B, N)` to `(B, inputs)`."""
    return dispatch.module(OP, implementation).matmul_transposed(g, data, indices, indptr, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sampled(x, g, indices, indptr, implementation: str):
    """`x.T @ g` at the stored entries: `(B, K)` and `(B, N)` to `(nnz,)`."""
    return dispatch.module(OP, implementation).sampled(x, g, indices, indptr)


def _product_forward(x, data, indices, indptr, implementation):
    return _product(x, data, indices, indptr, implementation), (x, data, indices, indptr)


def _product_backward(implementation, saved, g):
    x, data, *pattern = saved
    d_x = _transposed(g, data, *pattern, x.shape[1], implementation)
    return d_x, _sampled(x, g, *pattern, implementation), None, None


def _transposed_forward(g, data, indices, indptr, inputs, implementation):
    return _transposed(g, data, indices, indptr, inputs, implementation), (g, data, indices, indptr)


def _transposed_backward(inputs, implementation, saved, x):
    del inputs
    g, data, *pattern = saved
    return _product(x, data, *pattern, implementation), _sampled(x, g, *pattern, implementation), None, None


def _sampled_forward(x, g, indices, indptr, implementation):
    return _sampled(x, g, indices, indptr, implementation), (x, g, indices, indptr)


def _sampled_backward(implementation, saved, data):
    x, g, *pattern = saved
    d_x = _transposed(g, data, *pattern, x.shape[1], implementation)
    return d_x, _product(x, data, *pattern, implementation), None, None


_product.defvjp(_product_forward, _product_backward)
_transposed.defvjp(_transposed_forward, _transposed_backward)
_sampled.defvjp(_sampled_forward, _sampled_backward)
