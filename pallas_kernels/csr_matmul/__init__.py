"""Products with an unstructured sparse weight in compressed sparse rows: `data`, `indices` and `indptr` as in scipy.

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

OP = "csr_matmul"
SMALL = 2**17  # fewer products than this take less time than a call from XLA to numba


def csr_matmul(x, data, indices, indptr, *, columns: int, implementation: str | None = None):
    """`x @ W` for a sparse weight W, differentiable with respect to `x` and `data`.

    Args:
      x: `(..., K)`, of a float dtype.
      data: `(nnz,)` floats, the stored weights in row-major order.
      indices: `(nnz,)` integers, their columns, ascending in each row.
      indptr: `(K + 1,)` integers: row k of W holds entries `indptr[k]` up to `indptr[k + 1]`.
      columns: the number of columns N of W.
      implementation: "numba" (CPUs), "xla" or "reference"; None takes the fastest that the device allows.

    Returns:
      `(..., N)` in the promoted dtype of `x` and `data`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together or the named implementation cannot run here.
    """
    x, data, indices, indptr = map(jnp.asarray, (x, data, indices, indptr))
    _check(x, data, indices, indptr, columns)
    rows = indptr.shape[0] - 1
    dtype = jnp.result_type(x, data)
    wide = jnp.promote_types(dtype, jnp.float32)
    flat = x.reshape(-1, rows).astype(wide)
    name = dispatch.pick(OP, implementation, reasons(flat.shape[0] * data.shape[0]))
    y = product(flat, data.astype(wide), indices, indptr, columns, name)
    return y.astype(dtype).reshape(*x.shape[:-1], columns)


def reasons(products: int):
    """{implementation: why it cannot run here, or None}, best first for so many products of two numbers."""
    numba, xla = {"numba": _numba_reason()}, {"xla": None}
    return (xla | numba if products < SMALL else numba | xla) | {"reference": None}


def _numba_reason():
    if jax.default_backend() != "cpu":
        return f"it runs on CPUs, and JAX runs on {jax.default_backend()}"
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported ({error}); pip install 'sparsejax[cpu]' brings it"
    return None


def _check(x, data, indices, indptr, columns):
    if data.ndim != 1 or data.shape != indices.shape:
        raise ValueError(
            f"data and indices must be two vectors of one length, got shapes {data.shape} and {indices.shape}"
        )
    if indptr.ndim != 1 or not indptr.shape[0]:
        raise ValueError(
            f"indptr must be a vector of one entry more than W has rows, got shape {indptr.shape}"
        )
    for name, array, kind in (
        ("x", x, jnp.floating),
        ("data", data, jnp.floating),
        ("indices", indices, jnp.integer),
        ("indptr", indptr, jnp.integer),
    ):
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {array.dtype}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    rows = indptr.shape[0] - 1
    if not x.ndim or x.shape[-1] != rows:
        raise ValueError(f"x must end with the weight's {rows} rows, but its shape is {x.shape}")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def product(x, data, indices, indptr, columns: int, implementation: str):
    """`x @ W`: `(B, K)` to `(B, columns)`."""
    return dispatch.module(OP, implementation).matmul(x, data, indices, indptr, columns)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def transposed(g, data, indices, indptr, implementation: str):
    """`g @ W.T`: `(B, N)` to `(B, K)`."""
    return dispatch.module(OP, implementation).matmul_transposed(g, data, indices, indptr)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def sampled(x, g, indices, indptr, implementation: str):
    """`x.T @ g` at the stored entries: `(B, K)` and `(B, N)` to `(nnz,)`."""
    return dispatch.module(OP, implementation).sampled(x, g, indices, indptr)


def _product_forward(x, data, indices, indptr, columns, implementation):
    return product(x, data, indices, indptr, columns, implementation), (x, data, indices, indptr)


def _product_backward(columns, implementation, saved, g):
    x, data, *pattern = saved
    return transposed(g, data, *pattern, implementation), sampled(x, g, *pattern, implementation), None, None


def _transposed_forward(g, data, indices, indptr, implementation):
    return transposed(g, data, indices, indptr, implementation), (g, data, indices, indptr)


def _transposed_backward(implementation, saved, x):
    g, data, *pattern = saved
    d_data = sampled(x, g, *pattern, implementation)
    return product(x, data, *pattern, g.shape[1], implementation), d_data, None, None


def _sampled_forward(x, g, indices, indptr, implementation):
    return sampled(x, g, indices, indptr, implementation), (x, g, indices, indptr)


def _sampled_backward(implementation, saved, data):
    x, g, *pattern = saved
    d_g = product(x, data, *pattern, g.shape[1], implementation)
    return transposed(g, data, *pattern, implementation), d_g, None, None


product.defvjp(_product_forward, _product_backward)
transposed.defvjp(_transposed_forward, _transposed_backward)
sampled.defvjp(_sampled_forward, _sampled_backward)
