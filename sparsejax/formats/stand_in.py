"""Products with N:M and block-sparse weights by unpacking them, with the signatures of the kernels."""

from sparsejax.formats.block import BlockSparseArray
from sparsejax.formats.nm import NMArray


def nm_matmul(x, values, indices, *, n, m, implementation=None):
    """`x @ W` for `W` in the layout of `NMArray`."""
    del implementation
    shape = (values.shape[0] // n * m, values.shape[1])
    return x @ NMArray(values, indices, shape, n, m).to_dense()


def block_sparse_matmul(x, blocks, indices, *, rows, implementation=None):
    """`x @ W` for `W` of so many rows in the layout of `BlockSparseArray`."""
    del implementation
    columns, _, bk, bn = blocks.shape
    return x @ BlockSparseArray(blocks, indices, (rows, columns * bn), (bk, bn)).to_dense()
