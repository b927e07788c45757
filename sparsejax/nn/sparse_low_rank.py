"""SLTrain: sparse plus low-rank weights on a fixed random support (Han et al. 2024).

  W = (alpha / r) A B + scatter(v, I)        A: (inputs, r),  B: (r, features),  y = x W + bias

The support I holds floor(density * inputs * features) positions, drawn once, uniformly and without
replacement; only v is trained. At the start A and v are uniform in +-1/sqrt(inputs) and B = 0: the layer begins
as the random sparse S alone. Parameters: r (inputs + features) + |I|.

W is built in the forward pass, forgotten, and built again in the backward pass, so that between the two nothing
of its size is stored. With dW = x^T dy, itself transient:

  dA = (alpha / r) dW B^T     dB = (alpha / r) A^T dW     dv = dW[I]     dx = dy W^T

How much of this survives is the compiler's choice. On CPUs XLA orders for concurrency by default, and then a
few dense weights are alive at a time; with `xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED` two are
(`python -m sparsejax.bench memory`). The XLA of JAX 0.10 drops the barriers on CPUs, and shares W.

Departures: none in the method; our W is a flax kernel, the transpose of the paper's, whose B A reads A B here.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen

from sparsejax.nn.factorised import FactorisedLinear, uniform, with_bias
from sparsejax.nn.low_rank import check_rank
from sparsejax.selection import top_k_mask


def random_support(key, inputs: int, features: int, count: int):
    """`count` distinct positions of an `(inputs, features)` weight: sorted flat indices, int32 `(count,)`."""
    drawn = jax.random.bits(key, (inputs * features,))
    return jnp.flatnonzero(top_k_mask(drawn, count), size=count).astype(jnp.int32)


def sparse_low_rank_dense(down, up, values, support, scale: float):
    """The dense weight `scale * down @ up + scatter(values, support)`, of shape `(inputs, features)`.

    Args:
      down: `(inputs, r)`.
      up: `(r, features)`.
      values: `(n,)`.
      support: distinct flat indices into the weight, int `(n,)`, sorted.
      scale: alpha / r.
    """
    product = scale * (down @ up)
    flat = product.reshape(-1).at[support].add(values, unique_indices=True, indices_are_sorted=True)
    return flat.reshape(product.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def sparse_low_rank_matmul(x, down, up, values, support, scale: float):
    """`x @ sparse_low_rank_dense(down, up, values, support, scale)`, whose gradient stores no dense weight.

    Args:
      x: `(..., inputs)`; the others as in `sparse_low_rank_dense`.
    """
    return x @ sparse_low_rank_dense(down, up, values, support, scale)


def _forward(x, down, up, values, support, scale):
    return sparse_low_rank_matmul(x, down, up, values, support, scale), (x, down, up, values, support)


def _backward(scale, saved, dy):
    # The barriers keep the compiler from sharing W with the forward pass, and from collecting the dW of many
    # layers before it uses them.
    (x, down, up, values, support), dy = jax.lax.optimization_barrier((saved, dy))
    dx = dy @ sparse_low_rank_dense(down, up, values, support, scale).T
    dw = x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
    dvalues = dw.reshape(-1).at[support].get(unique_indices=True, indices_are_sorted=True)
    grads = dx, scale * (dw @ up.T), scale * (down.T @ dw), dvalues
    return *jax.lax.optimization_barrier(grads), None


sparse_low_rank_matmul.defvjp(_forward, _backward)


class SparseLowRank(FactorisedLinear):
    """A Dense with sparse plus low-rank weight; defaults are those of the paper's 60M model.

    Parameters `down_kernel`, `up_kernel`, `values` and `bias`; the support is `constants/.../support`, which is
    never trained, and is saved with the checkpoints. Masks apply to the factors, not to the support.

    Attributes:
      rank: r, from 1 to the smaller of inputs and features.
      density: of the sparse part, in (0, 1].
      alpha: the low-rank part is scaled by alpha / r.

    Raises:
      ValueError: at `init`, one sentence that names the layer, for a rank or density out of range, or a weight
        of 2**31 entries or more.
    """

    rank: int = 128
    density: float = 0.03
    alpha: float = 32.0

    def factors(self, inputs: int):
        """The parameters `(down, up, values)`; the support is drawn at `init`."""
        check_rank(self.rank, inputs, self.features, self.label)
        count = self._count(inputs)
        down = self.param("down_kernel", uniform(inputs), (inputs, self.rank), self.param_dtype)
        zeros = linen.initializers.zeros
        up = self.param("up_kernel", zeros, (self.rank, self.features), self.param_dtype)
        self.variable(
            "constants", "support",
            lambda: random_support(self.make_rng("params"), inputs, self.features, count),
        )  # fmt: skip
        return down, up, self.param("values", uniform(inputs), (count,), self.param_dtype)

    def product(self, x, down, up, values):
        """`sparse_low_rank_matmul` on this layer's support."""
        support = self.get_variable("constants", "support")
        return sparse_low_rank_matmul(x, down, up, values, support, self.alpha / self.rank)

    @linen.nowrap
    def macs(self, kernel, inputs: int) -> int:
        """The product with the dense W, half booked on each factor; building W is left out.

        Building it costs r inputs features multiply-adds per step, whatever the batch: r / positions of the product.
        """
        return inputs * self.features // 2

    def _count(self, inputs: int) -> int:
        size = inputs * self.features
        if size >= 2**31:
            raise ValueError(
                f"{self.label}: 32-bit positions cannot number the entries of its {inputs} x {self.features} weight"
            )
        count = math.floor(round(self.density * size, 6))  # 0.29 * 100 is 28.999999999999996
        if not 1 <= count <= size:
            raise ValueError(
                f"{self.label}: density={self.density} must be in (0, 1] and keep one or more of {size} weights"
            )
        return count

    @linen.nowrap
    def to_dense(self, variables) -> dict[str, jax.Array]:
        """The `kernel` and `bias` of the Dense that equals a layer with these variables."""
        params = variables["params"]
        factors = (params[name] for name in ("down_kernel", "up_kernel", "values"))
        support = variables["constants"]["support"]
        kernel = sparse_low_rank_dense(*factors, support, self.alpha / self.rank)
        return with_bias({"kernel": kernel}, params)


__all__ = ["SparseLowRank", "random_support", "sparse_low_rank_dense", "sparse_low_rank_matmul"]
