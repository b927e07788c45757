"""Formats to and from `scipy.sparse` and `jax.experimental.sparse`.

All of these see the matrix view (K, N); what comes in is a matrix. Stored zeros stay stored. Conversions run on the
host, except that `to_bcoo` and `to_bcsr` of a `CSRArray` work under `jax.jit` and can be differentiated.
"""

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse

from sparsejax.formats.base import Packed
from sparsejax.formats.block import BlockCSR, BlockSparseArray
from sparsejax.formats.csr import CSRArray, starts


def to_scipy(w: Packed):
    """`scipy.sparse.bsr_array` of a `BlockSparseArray`, `csr_array` of all others.

    Weights in bfloat16 or float16, which scipy lacks, become float32.
    """
    if isinstance(w, BlockSparseArray):
        blocks, indices, indptr = map(np.asarray, w.to_block_csr())
        return scipy.sparse.bsr_array((_for_scipy(blocks), indices, indptr), w.matrix_shape)
    csr = as_csr(w)
    parts = (_for_scipy(csr.data), np.asarray(csr.indices), np.asarray(csr.indptr))
    return scipy.sparse.csc_array(parts, w.matrix_shape).tocsr()


def from_scipy(matrix) -> Packed:
    """A `BlockSparseArray` from scipy's BSR, a `CSRArray` from any other of its sparse formats.

    Duplicate entries are summed; the dtype is what `jnp.asarray` makes of scipy's.

    Raises:
      ValueError: if `matrix` is not a sparse matrix of two axes.
    """
    if not scipy.sparse.issparse(matrix) or matrix.ndim != 2:
        raise ValueError(f"from_scipy needs a sparse matrix with two axes, got {type(matrix).__name__}")
    if matrix.format == "bsr":
        matrix = matrix.copy()
        matrix.sum_duplicates()
        return BlockSparseArray.from_block_csr(
            BlockCSR(matrix.data, matrix.indices, matrix.indptr), matrix.shape
        )
    matrix = matrix.tocsc(copy=True)
    matrix.sum_duplicates()
    return CSRArray.from_parts(matrix.data, matrix.indices, matrix.indptr, matrix.shape)


def to_bcoo(w: Packed) -> sparse.BCOO:
    """`jax.experimental.sparse.BCOO` with sorted, unique indices."""
    csr = as_csr(w)
    indices = jnp.stack([csr.indices, csr.output_of_entries()], axis=1)
    by_output = sparse.BCOO((csr.data, indices), shape=w.matrix_shape, unique_indices=True)
    return by_output.sort_indices()


def from_bcoo(matrix: sparse.BCOO) -> CSRArray:
    """A `CSRArray` from a BCOO matrix; duplicates are summed, padding is dropped.

    Raises:
      ValueError: if it has batch or dense axes, or not two sparse ones.
    """
    if matrix.n_batch or matrix.n_dense or matrix.n_sparse != 2:
        raise ValueError(
            f"from_bcoo needs two sparse axes and no others, got {matrix.n_batch} batch, {matrix.n_sparse} sparse and "
            f"{matrix.n_dense} dense axes"
        )
    matrix = matrix.sum_duplicates(remove_zeros=False)
    indices = np.asarray(matrix.indices)
    inside = (indices < matrix.shape).all(axis=1)
    rows, columns = indices[inside].T
    order = np.lexsort((rows, columns))
    data = np.asarray(matrix.data)[inside][order]
    return CSRArray.from_parts(data, rows[order], starts(columns[order], matrix.shape[1]), matrix.shape)


def to_bcsr(w: Packed) -> sparse.BCSR:
    """`jax.experimental.sparse.BCSR` with sorted, unique indices."""
    return sparse.BCSR.from_bcoo(to_bcoo(w))


def from_bcsr(matrix: sparse.BCSR) -> CSRArray:
    """A `CSRArray` from a BCSR matrix, as `from_bcoo`."""
    return from_bcoo(matrix.to_bcoo())


def as_csr(w: Packed) -> CSRArray:
    """The same weights as a `CSRArray` of the same dense shape."""
    return w if isinstance(w, CSRArray) else CSRArray.from_dense(w.to_dense(), w.mask())


def _for_scipy(data):
    data = np.asarray(data)
    return data.astype(np.float32) if data.dtype.itemsize == 2 and data.dtype.kind in "fV" else data
