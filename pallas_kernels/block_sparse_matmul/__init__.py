"""Products with a block-sparse weight in block-ELL form: `blocks (N / bn, L, bk, bn)`, `indices (N / bn, L)`.

The value of `sum(g * (x @ W))` is linear in `x`, in the stored blocks and in `g`. Its three partial derivatives
are three operations, each of which has the other two as gradients:

  product(x, blocks)     x @ W
  transposed(g, blocks)  g @ W.T
  sampled(x, g)          x.T @ g at the stored blocks, see `pallas_kernels.sampled_matmul`
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.meshes import like_rows, on_mesh
from pallas_kernels.rows import call

OP = "block_sparse_matmul"


def block_sparse_matmul(x, blocks, indices, *, rows: int, implementation: str | None = None):
    """`x @ W` for a block-sparse weight W, differentiable with respect to `x` and `blocks`.

    Args:
      x: `(..., rows)`, of a float dtype.
      blocks: `(N / bn, L, bk, bn)`: for each block column its L blocks; zero blocks fill up shorter columns.
      indices: `(N / bn, L)` integers: the row block of each stored block; -1 marks padding, which is skipped.
      rows: the number of rows K of W, divisible by bk.
      implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that the device and shapes allow.

    Returns:
      `(..., N)` in the promoted dtype of `x` and `blocks`; sums are in at least float32.

    Raises:
      ValueError: one sentence, if the shapes do not fit together or the named implementation cannot run here.
    """
    x, blocks, indices = (jnp.asarray(array) for array in (x, blocks, indices))
    check_blocks(blocks, indices, rows)
    if x.ndim < 1 or x.shape[-1] != rows:
        raise ValueError(f"x must end with the weight's {rows} rows, but its shape is {x.shape}")
    dtype = jnp.result_type(x, blocks)

    def run(x, blocks, indices):
        flat, stored = x.reshape(-1, rows).astype(dtype), blocks.astype(dtype)
        name = dispatch.pick(OP, implementation, product_reasons(flat, stored))
        y = product(flat, stored, indices, rows, name)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return on_mesh(run, like_rows, x, blocks, indices)


def check_blocks(blocks, indices, rows: int):
    """Raises ValueError, one sentence, unless these are the arrays of a block-ELL weight with `rows` rows."""
    if blocks.ndim != 4 or 0 in blocks.shape or not jnp.issubdtype(blocks.dtype, jnp.floating):
        raise ValueError(
            "blocks must be floats of shape (block columns, slots, block rows, block width), none of them 0, "
            f"got {blocks.dtype} of shape {blocks.shape}"
        )
    if indices.shape != blocks.shape[:2] or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices must be integers of shape {blocks.shape[:2]}, one for each stored block, got {indices.dtype} "
            f"of shape {indices.shape}"
        )
    if rows < 1 or rows % blocks.shape[2]:
        raise ValueError(f"rows must be divisible by the blocks' {blocks.shape[2]} rows, got {rows}")


def product_reasons(x, blocks, transposed: bool = False):
    """{implementation: why it cannot multiply with these blocks here, or None}, best first."""
    return {
        "pallas_gpu": dispatch.gpu_reason(9, at=x)
        or dispatch.module(OP, "pallas_gpu").reason(x.shape[0], blocks.shape, blocks.dtype, transposed),
        "pallas_tpu": dispatch.tpu_reason(at=x)
        or dispatch.module(OP, "pallas_tpu").reason(x.shape[0], blocks.shape, blocks.dtype, transposed),
        "xla": None,
        "reference": None,
    }


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x, blocks, indices, rows: int, implementation: str | None = None):
    """`x @ W`: `(M, rows)` to `(M, N)`."""
    name = dispatch.prefer(implementation, product_reasons(x, blocks))
    matmul = dispatch.module(OP, name).matmul
    return call(name, lambda *args: matmul(*args, rows), "mk clij cl -> mn", x, blocks, indices)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def transposed(g, blocks, indices, rows: int, implementation: str | None = None):
    """`g @ W.T`: `(M, N)` to `(M, rows)`."""
    name = dispatch.prefer(implementation, product_reasons(g, blocks, transposed=True))
    matmul = dispatch.module(OP, name).matmul_transposed
    return call(name, lambda *args: matmul(*args, rows), "mn clij cl -> mk", g, blocks, indices)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def sampled(x, g, indices, block: tuple[int, int], implementation: str | None = None):
    """`x.T @ g` at the stored blocks: `(M, rows)` and `(M, N)` to `(N / bn, L, bk, bn)`; zero in padding."""
    name = dispatch.prefer(implementation, sampled_reasons(x, block))
    sample = dispatch.module("sampled_matmul", name).block_sampled
    return call(name, lambda *args: sample(*args, block), "mk mn cl -> clij", x, g, indices)


def sampled_reasons(x, block: tuple[int, int]):
    """{implementation: why it cannot sample blocks here, or None}, best first."""
    return {
        "pallas_gpu": dispatch.gpu_reason(9, at=x)
        or dispatch.module("sampled_matmul", "pallas_gpu").block_reason(block, x.dtype),
        "pallas_tpu": dispatch.tpu_reason(at=x)
        or dispatch.module("sampled_matmul", "pallas_tpu").block_reason(block, x.dtype),
        "xla": None,
        "reference": None,
    }


def _product_forward(x, blocks, indices, rows, implementation):
    return product(x, blocks, indices, rows, implementation), (x, blocks, indices)


def _product_backward(rows, implementation, saved, g):
    x, blocks, indices = saved
    return (
        transposed(g, blocks, indices, rows, implementation),
        sampled(x, g, indices, blocks.shape[2:], implementation),
        None,
    )


def _transposed_forward(g, blocks, indices, rows, implementation):
    return transposed(g, blocks, indices, rows, implementation), (g, blocks, indices)


def _transposed_backward(rows, implementation, saved, x):
    g, blocks, indices = saved
    return (
        product(x, blocks, indices, rows, implementation),
        sampled(x, g, indices, blocks.shape[2:], implementation),
        None,
    )


def _sampled_forward(x, g, indices, block, implementation):
    return sampled(x, g, indices, block, implementation), (x, g, indices)


def _sampled_backward(block, implementation, saved, blocks):
    x, g, indices = saved
    return (
        transposed(g, blocks, indices, x.shape[1], implementation),
        product(x, blocks, indices, x.shape[1], implementation),
        None,
    )


product.defvjp(_product_forward, _product_backward)
transposed.defvjp(_transposed_forward, _transposed_backward)
sampled.defvjp(_sampled_forward, _sampled_backward)
