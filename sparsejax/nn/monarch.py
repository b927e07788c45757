"""Monarch matrices: products of two block-diagonal matrices and a transposition (Dao et al. 2022).

With inputs split as p-blocks (k, p) and outputs as (s, l), `l` fastest:

  h[k, q] = sum_p x[k, p] W1[k, q, p]          k blocks of q x p
  y[s, l] = sum_r h'[r, l] W2[l, s, r]         l blocks of s x r;  h' is h read as (r, l), `l` fastest

For q = b l and r = k b the dense weight, of shape (k p, s l), is

  W[(k, p), (s, l)] = sum_b W2[l, s, (k, b)] W1[k, (b, l), p]

so that each slice W[k, :, :, l] (p x s) has rank b; b = 1 is the Monarch matrix of the paper, 2 n^1.5
parameters for k = l = sqrt(n). A layer holds b (l inputs + k features) parameters, and does as many
multiply-adds per position.

Projection: the nearest Monarch matrix keeps the b largest singular triples of each slice; its squared error is
the sum of all other squared singular values.

Departures: the released layer pads sizes that the blocks do not divide; here that is an error, since the
padding would be parameters that no dense layer has. W is a flax kernel, (inputs, features): the transpose of the
paper's matrix.
"""

import jax
import jax.numpy as jnp
from flax import linen

from sparsejax.nn.factorised import FactorisedLinear, uniform, with_bias


def monarch_matmul(x, first, second):
    """`x @ monarch_dense(first, second)` by two batched products.

    Args:
      x: `(..., k p)`.
      first: `(k, q, p)`.
      second: `(l, s, r)` with `l r = k q`.

    Returns:
      `(..., s l)` in the dtype of the operands.
    """
    k, _, p = first.shape
    l, s, r = second.shape
    hidden = jnp.einsum("...kp,kqp->...kq", x.reshape(*x.shape[:-1], k, p), first)
    hidden = hidden.reshape(*x.shape[:-1], r, l)
    return jnp.einsum("...rl,lsr->...sl", hidden, second).reshape(*x.shape[:-1], s * l)


def monarch_dense(first, second):
    """The dense weight `(k p, s l)` of a Monarch product.

    Args:
      first: `(k, b l, p)`.
      second: `(l, s, k b)`.
    """
    k, q, p = first.shape
    l, s, r = second.shape
    slices = jnp.einsum("kblp,lskb->kpsl", first.reshape(k, q // l, l, p), second.reshape(l, s, k, r // k))
    return slices.reshape(k * p, s * l)


def monarch_project(dense, blocks: int | tuple[int, int] = 4, rank: int | None = None):
    """The Monarch matrix that is nearest to a dense one in the Frobenius norm.

    Args:
      dense: `(inputs, features)`.
      blocks, rank: as for `Monarch`.

    Returns:
      `first, second`: `(k, rank l, inputs / k)` and `(l, features / l, k rank)`, in the dtype of `dense`.

    Raises:
      ValueError: as for `Monarch`.
    """
    (k, q, p), (l, s, r) = monarch_shapes(*dense.shape, blocks, rank, "the matrix")
    b = q // l
    slices = dense.reshape(k, p, s, l).transpose(0, 3, 2, 1)  # (k, l, s, p)
    left, values, right = jnp.linalg.svd(slices.astype(jnp.promote_types(dense.dtype, jnp.float32)), False)
    root = jnp.sqrt(values[..., :b])  # (k, l, b)
    first = (root[..., None] * right[..., :b, :]).transpose(0, 2, 1, 3).reshape(k, q, p)
    second = (root[..., None, :] * left[..., :b]).transpose(1, 2, 0, 3).reshape(l, s, r)
    return first.astype(dense.dtype), second.astype(dense.dtype)


def monarch_shapes(inputs: int, features: int, blocks, rank: int | None, label: str):
    """The shapes `(k, q, p)` and `(l, s, r)` of the two factors.

    Raises:
      ValueError: one sentence that begins with `label`.
    """
    pair = tuple(blocks) if isinstance(blocks, (tuple, list)) else (blocks, blocks)
    if len(pair) != 2 or not all(isinstance(count, int) and count > 0 for count in pair):
        raise ValueError(f"{label}: blocks={blocks!r} must be a positive integer or a pair of them")
    k, l = pair
    if inputs % k or features % l:
        raise ValueError(
            f"{label}: its blocks do not divide its sizes: {k} must divide its {inputs} inputs and {l} its "
            f"{features} outputs"
        )
    p, s = inputs // k, features // l
    b = max(1, min(inputs, features) // (k * l)) if rank is None else rank
    if not isinstance(b, int) or not 1 <= b <= min(p, s):
        raise ValueError(
            f"{label}: rank={b!r} must be an integer from 1 to {min(p, s)}, the smaller side of its slices ({p} x {s})"
        )
    return (k, b * l, p), (l, s, k * b)


class Monarch(FactorisedLinear):
    """A Dense whose weight is a Monarch matrix, with parameters `first_kernel`, `second_kernel` and `bias`.

    Both factors start uniform in +-1/sqrt(fan-in of a block). Masks apply to the factors.

    Attributes:
      blocks: how many blocks each factor has, or the pair `(k, l)`: k divides the inputs, l the features.
      rank: rank b of the slices; None gives `min(inputs, features) // (k l)`, at least 1: as released, half of
        the dense parameters for a square layer of 4 blocks, and 2 n^1.5 of them for sqrt(n) blocks.

    Raises:
      ValueError: at `init`, one sentence that names the layer, if the blocks do not divide its sizes or the
        rank is above the size of a slice.
    """

    blocks: int | tuple[int, int] = 4
    rank: int | None = None

    def factors(self, inputs: int):
        """The parameters `(first, second)`, see `monarch_matmul`."""
        shapes = monarch_shapes(inputs, self.features, self.blocks, self.rank, self.label)
        return tuple(
            self.param(f"{name}_kernel", uniform(shape[-1]), shape, self.param_dtype)
            for name, shape in zip(("first", "second"), shapes, strict=True)
        )

    def product(self, x, first, second):
        """`monarch_matmul`."""
        return monarch_matmul(x, first, second)

    @linen.nowrap
    def to_dense(self, variables) -> dict[str, jax.Array]:
        """The `kernel` and `bias` of the Dense that equals a layer with these variables."""
        params = variables["params"]
        kernel = monarch_dense(params["first_kernel"], params["second_kernel"])
        return with_bias({"kernel": kernel}, params)

    @linen.nowrap
    def from_dense(self, params) -> dict[str, jax.Array]:
        """The parameters of this layer that are nearest to a Dense's `kernel` and `bias`."""
        first, second = monarch_project(params["kernel"], self.blocks, self.rank)
        return with_bias({"first_kernel": first, "second_kernel": second}, params)


__all__ = ["Monarch", "monarch_dense", "monarch_matmul", "monarch_project", "monarch_shapes"]
