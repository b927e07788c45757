"""Products of two sparse matrices in CSR form, row by row (Gustavson), with the accumulators of SMASH's scratchpad.

The work has two phases. The symbolic one, `spgemm_plan`, finds where the product has entries; it runs on the host with
exact sizes, or under `jax.jit` with bounds. The numeric one fills in the values; it compiles once for given sizes and
is differentiable. With `sum(g * data)` linear in both factors' values and in g, each of its partial derivatives is
again a product of two sparse matrices at the places of a third:

  for a   g @ b.T at a's entries
  for b   a.T @ g at b's entries
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.meshes import on_mesh
from pallas_kernels.spgemm.symbolic import SpgemmPlan, coordinates, spgemm_plan

__all__ = ["SpgemmPlan", "spgemm", "spgemm_plan"]

OP = "spgemm"


def spgemm(a, b, *, columns: int, plan=None, capacity=None, products=None, implementation: str | None = None):
    """The CSR matrix `a @ b`, differentiable with respect to the data of both.

    Args:
      a: `(data (nnz,), indices (nnz,), indptr (M + 1,))` as in scipy: floats, the columns and where each row begins.
        What comes after `indptr[-1]` entries is padding. Entries need no order, and repeated ones add up.
      b: the same for the second matrix, whose K rows are a's columns.
      columns: the number of columns N of b.
      plan: of `spgemm_plan`, for matrices with these indices; None makes it here.
      capacity, products: static bounds that a plan made here under `jax.jit` needs, see `spgemm_plan`.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(data (capacity,), indices (capacity,), indptr (M + 1,))` of the product, in the promoted dtype of both, with
      ascending columns; sums are in at least float32. `indptr[-1] > capacity` says that a bound was too small.

    Raises:
      ValueError: one sentence, if the arrays do not fit together or the named implementation cannot run here.
    """
    a, b = (tuple(each if hasattr(each, "dtype") else jnp.asarray(each) for each in csr) for csr in (a, b))
    check_csr("a", a)
    check_csr("b", b)
    if plan is None:
        plan = spgemm_plan(a, b, columns=columns, capacity=capacity, products=products)
    elif capacity is not None or products is not None:
        raise ValueError(
            f"a plan has its own bounds, but capacity {capacity} and products {products} were given"
        )
    rows, inner = a[2].size - 1, b[2].size - 1
    if plan.indptr.shape != a[2].shape:
        raise ValueError(f"the plan must be for {rows} rows, but it is for {plan.indptr.size - 1}")
    dtype = jnp.result_type(a[0], b[0])
    sizes = rows, inner, columns
    name = dispatch.pick(OP, implementation, _reasons(sizes, dtype, plan.left, at=a[0]))

    def run(x, y, *arrays):
        *indices, left, right, target = arrays
        places = tuple(coordinates(*indices[i : i + 2]) for i in (0, 2, 4))
        x, y = (jnp.asarray(each, dtype) for each in (x, y))
        return _product(x, y, places, (left, right, target), sizes, name)

    data = on_mesh(run, lambda *_: PartitionSpec(None), a[0], b[0], *a[1:], *b[1:], *plan)
    return data, plan.indices, plan.indptr


def check_csr(name: str, matrix):
    """Raises ValueError, one sentence, unless these are the arrays of a CSR matrix."""
    if len(matrix) != 3:
        raise ValueError(f"{name} must be (data, indices, indptr), got {len(matrix)} arrays")
    data, indices, indptr = matrix
    if data.ndim != 1 or data.shape != indices.shape:
        raise ValueError(
            f"data and indices of {name} must be vectors of one length, got shapes {data.shape} and {indices.shape}"
        )
    if indptr.ndim != 1 or indptr.size < 2:
        raise ValueError(
            f"indptr of {name} must be a vector of one more than its rows, got shape {indptr.shape}"
        )
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(f"data of {name} must be floats, got {data.dtype}")
    if not all(jnp.issubdtype(array.dtype, jnp.integer) for array in (indices, indptr)):
        raise ValueError(
            f"indices and indptr of {name} must be integers, got {indices.dtype} and {indptr.dtype}"
        )


def _reasons(sizes, dtype, products, at=None):
    """{implementation: why it cannot multiply matrices of these sizes here, or None}, best first.

    A plan with a list of products is for matrices so sparse that XLA's gathers beat dense tiles.
    """
    kernels = {
        "pallas_gpu": dispatch.gpu_reason(9, at=at) or dispatch.module(OP, "pallas_gpu").reason(sizes, dtype),
        "pallas_tpu": dispatch.tpu_reason(at=at) or dispatch.module(OP, "pallas_tpu").reason(sizes, dtype),
    }
    plain = {"xla": None, "reference": None}
    return plain | kernels if products.size else kernels | plain


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(x, y, places, lists, sizes: tuple[int, int, int], implementation: str):
    """The entries of X Y at the third of `places`.

    Args:
      x, y: the values of X `(m, k)` and Y `(k, n)`.
      places: the rows and columns of the entries of X, Y and of the result; padding has rows beyond the last.
      lists: for each product of two entries where its factors and its sum are; empty if there is no list.
      sizes: `(m, k, n)`.
    """
    name = dispatch.prefer(implementation, _reasons(sizes, x.dtype, lists[0]))
    return dispatch.module(OP, name).product(x, y, places, lists, sizes)


def _forward(x, y, places, lists, sizes, implementation):
    return _product(x, y, places, lists, sizes, implementation), (x, y, places, lists)


def _backward(sizes, implementation, saved, g):
    x, y, (x_at, y_at, at), (left, right, target) = saved
    m, k, n = sizes
    dx = _product(g, y, (at, y_at[::-1], x_at), (target, right, left), (m, n, k), implementation)
    dy = _product(x, g, (x_at[::-1], at, y_at), (left, target, right), (k, m, n), implementation)
    return dx, dy, None, None


_product.defvjp(_forward, _backward)
