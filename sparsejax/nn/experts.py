"""A linear layer with one matrix per expert, for rows that lie sorted by their expert."""

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import lecun_normal, zeros

from sparsejax.nn.layers import MaskedParams


class ExpertDense(MaskedParams):
    """y_r = x_r W_e + b_e for every row r, e its expert.

    The parameters are `kernel` `(experts, inputs, features)` and, if `use_bias`, `bias` `(experts, features)`.

    Attributes:
      features: width of the output.
      experts: how many there are.
      use_bias: whether there is a bias.
      dtype: dtype of the computation, None for the inputs'.
    """

    features: int
    experts: int
    use_bias: bool = True
    dtype: str | None = None

    @linen.compact
    def __call__(self, x, sizes):
        """Rows `(rows, features)`.

        Args:
          x: `(rows, inputs)`, first the rows of expert 0, then those of expert 1, and so on.
          sizes: int32 `(experts,)`, how many rows every expert has.
        """
        init = lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        kernel = self.param("kernel", init, (self.experts, x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.experts, self.features)) if self.use_bias else None
        x, kernel, bias = linen.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jax.lax.ragged_dot(x, kernel, sizes.astype(jnp.int32))
        if bias is not None:
            y = y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=len(x))
        return y
