"""Block-sparse products by way of the dense weight: the oracle."""

import jax.numpy as jnp

from pallas_kernels.sums import matmul as multiply


def dense(blocks, indices, rows: int):
    """The dense weight `(rows, N)` of a block-ELL one; blocks that are stored twice add up."""
    columns, _, block_rows, block_columns = blocks.shape
    stored = jnp.arange(rows // block_rows)[:, None, None] == indices  # padding, -1, is no row block
    weight = jnp.einsum("rcl,clkn->rkcn", stored.astype(blocks.dtype), blocks, precision="highest")
    return weight.reshape(rows, columns * block_columns)


def matmul(x, blocks, indices, rows: int):
    """`x @ W`: `(M, rows)` to `(M, N)`."""
    weight = dense(blocks, indices, rows)
    return multiply(x, weight)


def matmul_transposed(g, blocks, indices, rows: int):
    """`g @ W.T`: `(M, N)` to `(M, rows)`."""
    weight = dense(blocks, indices, rows)
    return multiply(g, weight.T)
