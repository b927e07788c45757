"""A linear layer with one matrix per expert, for rows that lie sorted by their expert."""

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.initializers import lecun_normal, zeros

from sparsejax.nn.layers import MaskedParams

LARGEST, SMALLEST = 128, 8  # rows of a group


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
        y = expert_matmul(x, kernel, sizes)
        if bias is not None:
            y = y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=len(x))
        return y


def expert_matmul(x, kernel, sizes):
    """x_r W_e for rows that lie sorted by their expert e.

    The rows of every expert are cut into groups of equal size, the last one filled up, and one product is made per
    group. The work is that of `rows` rows and at most one group per expert more, however they are distributed;
    `jax.lax.ragged_dot` on a CPU multiplies every row by every expert.

    Args:
      x: `(rows, inputs)`.
      kernel: `(experts, inputs, features)`.
      sizes: int `(experts,)`, rows of every expert.

    Returns:
      `(rows, features)`.
    """
    rows, experts = len(x), len(kernel)
    size = SMALLEST
    while size < min(LARGEST, rows // experts):
        size *= 2
    groups = rows // size + min(experts, rows)  # enough for any distribution
    each = -(-sizes // size)  # groups of every expert
    first_group, first_row = jnp.cumsum(each) - each, jnp.cumsum(sizes) - sizes
    group = jnp.arange(groups)
    expert = jnp.minimum(jnp.searchsorted(jnp.cumsum(each), group, side="right"), experts - 1)
    start = first_row[expert] + (group - first_group[expert]) * size
    # What fills up a group are rows of other experts, whose products nobody reads.
    inputs = x[jnp.minimum(start[:, None] + jnp.arange(size), rows - 1)]
    y = jax.lax.map(lambda part: part[0] @ kernel[part[1]], (inputs, expert))
    expert = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=rows)
    return y.reshape(groups * size, -1)[first_group[expert] * size + jnp.arange(rows) - first_row[expert]]
