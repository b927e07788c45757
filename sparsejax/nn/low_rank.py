"""Low-rank linear layers: the weight is a product of two thin factors.

  y = (x A) B + bias        A: (inputs, r),  B: (r, features)

r (inputs + features) parameters and multiply-adds per position. It is the baseline of Monarch and SLTrain
(there trained from scratch, as Kamalakara et al. 2022 explore). Both factors start normal with variance
1/fan-in, so that the output has the variance of a Dense's with flax's initialisation.
"""

import jax
import jax.numpy as jnp
from flax import linen

from sparsejax.nn.factorised import FactorisedLinear, with_bias


class LowRank(FactorisedLinear):
    """A Dense of rank `rank`, with parameters `down_kernel`, `up_kernel` and `bias`.

    Attributes:
      rank: from 1 to the smaller of inputs and features.

    Raises:
      ValueError: at `init`, one sentence that names the layer, for a rank out of that range.
    """

    rank: int = 128

    def factors(self, inputs: int):
        """The parameters `(down, up)`: `(inputs, rank)` and `(rank, features)`."""
        check_rank(self.rank, inputs, self.features, self.label)
        init = linen.initializers.variance_scaling(1.0, "fan_in", "normal")
        down = self.param("down_kernel", init, (inputs, self.rank), self.param_dtype)
        return down, self.param("up_kernel", init, (self.rank, self.features), self.param_dtype)

    def product(self, x, down, up):
        """`(x down) up`."""
        return x @ down @ up

    @linen.nowrap
    def to_dense(self, variables) -> dict[str, jax.Array]:
        """The `kernel` and `bias` of the Dense that equals a layer with these variables."""
        params = variables["params"]
        return with_bias({"kernel": params["down_kernel"] @ params["up_kernel"]}, params)

    @linen.nowrap
    def from_dense(self, params) -> dict[str, jax.Array]:
        """The parameters of this layer that are nearest to a Dense's: its largest singular triples."""
        kernel = params["kernel"]
        check_rank(self.rank, *kernel.shape, "the matrix")
        left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(values[: self.rank])
        down, up = left[:, : self.rank] * root, root[:, None] * right[: self.rank]
        return with_bias(
            {"down_kernel": down.astype(kernel.dtype), "up_kernel": up.astype(kernel.dtype)}, params
        )


def check_rank(rank, inputs: int, features: int, label: str) -> None:
    """Raises ValueError, beginning with `label`, unless the rank is a possible one."""
    if not isinstance(rank, int) or not 1 <= rank <= min(inputs, features):
        raise ValueError(
            f"{label}: rank={rank!r} must be an integer from 1 to {min(inputs, features)}, the smaller side of its "
            f"{inputs} x {features} weight"
        )


__all__ = ["LowRank", "check_rank"]
