"""The symbolic phase: where the product of two CSR matrices has entries, and which products add up in each.

Every entry (i, k) of the first matrix meets every entry (k, j) of the second. These products, sorted by (i, j), are the
list that the numeric phase follows: it is what SMASH's hash table finds out while it runs, made deterministic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Where more than one in so many of the M K N scalar products remain, a dense product beats a list of them: on two CPU
# cores one of the list takes from 5 ns, in cache, to 25 ns, a dense one 0.02 ns.
DENSE = 500


class SpgemmPlan(NamedTuple):
    """Where a product has entries, and how they are summed.

    Attributes:
      indices: `(capacity,)` int32, the columns of the entries, ascending in each row, then padding.
      indptr: `(M + 1,)` int32, where each row begins; the last is the number of entries, which is larger than the
        capacity if a bound was too small.
      left, right: `(products,)` int32, the entries of both factors that are multiplied; empty if there is no list.
      target: `(products,)` int32, ascending, the entry that a product is added to; the capacity for padding.
    """

    indices: jax.Array
    indptr: jax.Array
    left: jax.Array
    right: jax.Array
    target: jax.Array


def spgemm_plan(
    a, b, *, columns: int, capacity: int | None = None, products: int | None = None
) -> SpgemmPlan:
    """The symbolic phase of `spgemm`; it reads indices, not data.

    Args:
      a, b: CSR matrices `(data, indices, indptr)`.
      columns: the number of columns of b.
      capacity: for how many entries there is room. None, outside `jax.jit` only, for as many as the product has.
      products: the length of the list of products. None, outside `jax.jit` only, for as many as there are, or 0, which
        means no list, where there are so many that dense tiles are faster.

    Raises:
      ValueError: one sentence, if an index or `columns` is out of range, or a bound is too small or missing.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    indices = a[1:], b[1:]
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(indices)):
        if capacity is None or not products:
            raise ValueError(
                "under jax.jit a plan needs its capacity and a number of products above 0, "
                f"got capacity {capacity} and products {products}"
            )
        return _bounded(*indices, capacity, products)
    return _exact(*indices, columns, capacity, products)


def coordinates(indices, indptr):
    """The rows and columns of CSR entries; the row of padding is one beyond the last."""
    rows = jnp.searchsorted(indptr, jnp.arange(indices.size), side="right") - 1
    return rows.astype(jnp.int32), indices.astype(jnp.int32)


def _exact(a, b, columns, capacity, products):
    """The plan on the host."""
    (a_indices, a_indptr), (b_indices, b_indptr) = (_host(*each) for each in (a, b))
    inner, rows = b_indptr.size - 1, a_indptr.size - 1
    _check_range("a", a_indices, inner)
    _check_range("b", b_indices, columns)
    lengths = np.diff(b_indptr)[a_indices]
    left = np.repeat(np.arange(a_indices.size), lengths)
    first = np.repeat(b_indptr[a_indices] - (np.cumsum(lengths) - lengths), lengths)
    right = first + np.arange(left.size)
    row = np.repeat(np.arange(rows), np.diff(a_indptr))[left]
    key = row * columns + b_indices[right]
    order = np.argsort(key, kind="stable")
    found, target = np.unique(key[order], return_inverse=True)
    if products is None:
        products = 0 if left.size * DENSE > rows * inner * columns else left.size
    capacity = found.size if capacity is None else capacity
    if capacity < found.size or (products and products < left.size):
        raise ValueError(
            f"capacity and products must be at least {found.size} and {left.size}, got {capacity} and {products}"
        )
    keep = bool(products)
    return SpgemmPlan(
        _padded(found % columns, capacity, 0),
        jnp.asarray(np.searchsorted(found, np.arange(rows + 1) * columns), jnp.int32),
        *(_padded(each[order] if keep else [], products, 0) for each in (left, right)),
        _padded(target if keep else [], products, capacity),
    )


def _host(indices, indptr):
    indptr = np.asarray(indptr, np.int64)
    return np.asarray(indices, np.int64)[: indptr[-1]], indptr


def _check_range(name, indices, size):
    wrong = np.flatnonzero((indices < 0) | (indices >= size))
    if wrong.size:
        raise ValueError(
            f"the columns of {name} must be in [0, {size}), got {indices[wrong[0]]} at entry {wrong[0]}"
        )


def _padded(array, size, value):
    array = np.asarray(array)
    return jnp.asarray(np.pad(array, (0, size - array.size), constant_values=value), jnp.int32)


def _bounded(a, b, capacity, products):
    """The plan under `jax.jit`: the same steps with static sizes."""
    (a_indices, a_indptr), (b_indices, b_indptr) = ((jnp.pad(each[0], (0, 1)), each[1]) for each in (a, b))
    rows = a_indptr.size - 1
    entry_row, entry_column = coordinates(a_indices, a_indptr)
    lengths = jnp.where(entry_row < rows, jnp.diff(b_indptr)[entry_column], 0)
    ends = jnp.cumsum(lengths)
    position = jnp.arange(products)
    left = jnp.minimum(jnp.searchsorted(ends, position, side="right"), a_indices.size - 1)
    right = b_indptr[entry_column[left]] + position - (ends - lengths)[left]
    real = position < ends[-1]
    row = jnp.where(real, entry_row[left], rows)
    column = jnp.where(real, b_indices.at[right].get(mode="clip"), 0)
    row, column, left, right = jax.lax.sort((row, column, left, right), num_keys=2)
    new = jnp.concatenate([jnp.ones(1, bool), (row[1:] != row[:-1]) | (column[1:] != column[:-1])])
    entry = jnp.cumsum(new) - 1
    target = jnp.where(row < rows, jnp.minimum(entry, capacity), capacity)
    starts = (
        jnp.zeros(rows + 1, jnp.int32).at[row + 1].add((new & (row < rows)).astype(jnp.int32), mode="drop")
    )
    indptr = jnp.cumsum(starts)
    indptr = indptr.at[-1].max(jnp.where(ends[-1] > products, capacity + 1, 0))
    indices = jnp.zeros(capacity, jnp.int32).at[target].set(column.astype(jnp.int32), mode="drop")
    left, right = (jnp.where(row < rows, each, 0) for each in (left, right))
    plan = SpgemmPlan(indices, indptr, left, right, target)
    return SpgemmPlan(*(each.astype(jnp.int32) for each in plan))
