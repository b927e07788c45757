"""`x @ w` for weights in any format."""

import jax.numpy as jnp

from pallas_kernels import block_sparse_matmul, csr_matmul, nm_matmul
from sparsejax.formats.base import is_packed, matrix_shape
from sparsejax.formats.bitmap import BitmapArray
from sparsejax.formats.block import BlockSparseArray
from sparsejax.formats.csr import CSRArray
from sparsejax.formats.group_quantised import GroupQuantisedArray, group_quantised_matmul
from sparsejax.formats.nm import NMArray


def matmul(x, w):
    """`x @ w`, where `w` is a dense array or one in a packed format.

    Weights of more than two axes are taken as their matrix view (the last axis against all others): a
    convolution's kernel multiplies patches. It may be differentiated with respect to `x` and to the weights; with
    integer leaves around, `jax.grad` wants the latter alone: `lambda data: matmul(x, w.with_data(data))`. Of N:M, block
    and CSR weights there are no forward-mode derivatives (`jax.jvp`).

    Args:
      x: dense `(..., K)`.
      w: dense, or an `NMArray`, `BlockSparseArray`, `BitmapArray`, `CSRArray` or `GroupQuantisedArray` of floats, with
        the matrix view `(K, N)`.

    Returns:
      `(..., N)` of the dtype that `x` and `w` promote to.

    Raises:
      ValueError: if the shapes do not fit, or packed weights are no floats.
    """
    x = jnp.asarray(x)
    w = w if is_packed(w) else jnp.asarray(w)
    if not x.ndim or not w.ndim or x.shape[-1] != matrix_shape(w.shape)[0]:
        raise ValueError(
            f"x of shape {x.shape} does not fit a weight of shape {w.shape}: the last axis of x must be the "
            "product of all axes of the weight but its last"
        )
    if not is_packed(w):
        return _dense(x, w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"packed weights must be floats to be multiplied, but those of {w!r} are {w.dtype}")
    return _PRODUCTS[type(w)](x, w)


def _dense(x, w):
    return x @ w.reshape(matrix_shape(w.shape))


def _nm(x, w):
    return nm_matmul(x, w.values, w.indices, n=w.n, m=w.m)


def _block(x, w):
    return block_sparse_matmul(x, w.blocks, w.indices, rows=w.matrix_shape[0])


def _bitmap(x, w):
    """A bitmap holds too many weights for a product one by one: looking them all up costs no more."""
    return _dense(x, w.to_dense())


def _csr(x, w):
    return csr_matmul(x, w.data, w.inputs, w.indptr)


_PRODUCTS = {
    NMArray: _nm,
    BlockSparseArray: _block,
    BitmapArray: _bitmap,
    CSRArray: _csr,
    GroupQuantisedArray: group_quantised_matmul,
}
