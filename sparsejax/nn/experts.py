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
      dtype: dtype of the computation, None for that of the rows and parameters together.
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


@jax.custom_vjp
def expert_matmul(x, kernel, sizes):
    """x_r W_e for rows that lie sorted by their expert e.

    The rows of every expert are cut into groups of equal size, the last one filled up, and one product is made per
    group. The work is that of `rows` rows and at most one group per expert more, however they are distributed;
    `jax.lax.ragged_dot` on a CPU multiplies every row by every expert. The gradient is made of such products too,
    added up in one array of the kernel's shape. There is no forward-mode derivative, but one of the gradient.

    Args:
      x: `(rows, inputs)`.
      kernel: `(experts, inputs, features)`.
      sizes: int `(experts,)`, rows of every expert.

    Returns:
      `(rows, features)`.
    """
    return _products(x, kernel, sizes)


def _forward(x, kernel, sizes):
    return _products(x, kernel, sizes), (x, kernel, sizes)


def _backward(saved, dy):
    x, kernel, sizes = saved
    # not by `expert_matmul`, so that a product with the Hessian, a derivative of this one, exists
    dx = _products(dy, kernel, sizes, transposed=True).astype(x.dtype)
    return dx, _outer_products(x, dy, kernel, sizes), None


expert_matmul.defvjp(_forward, _backward)


def _groups(rows: int, sizes):
    """How rows are cut into groups: experts `(groups,)`, numbers of rows `(groups, size)`, and where a row is.

    What fills up a group are rows of other experts or beyond the last, which its numbers count on to.
    """
    experts, size = len(sizes), SMALLEST
    while size < min(LARGEST, rows // experts):
        size *= 2
    groups = rows // size + min(experts, rows)  # enough for any distribution
    each = -(-sizes // size)  # groups of every expert
    first_group, first_row = jnp.cumsum(each) - each, jnp.cumsum(sizes) - sizes
    group = jnp.arange(groups)
    expert = jnp.minimum(jnp.searchsorted(jnp.cumsum(each), group, side="right"), experts - 1)
    start = first_row[expert] + (group - first_group[expert]) * size
    owner = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=rows)
    place = first_group[owner] * size + jnp.arange(rows) - first_row[owner]
    return expert, start[:, None] + jnp.arange(size), place


def _products(x, kernel, sizes, transposed: bool = False):
    if not len(x):
        return jnp.zeros((0, kernel.shape[-2 if transposed else -1]), jnp.result_type(x, kernel))
    expert, numbers, place = _groups(len(x), sizes)
    inputs = x[jnp.minimum(numbers, len(x) - 1)]

    def multiply(part):
        matrix = kernel[part[1]]
        return part[0] @ (matrix.T if transposed else matrix)

    y = jax.lax.map(multiply, (inputs, expert))
    return y.reshape(-1, y.shape[-1])[place]  # without the products that fill up groups


def _outer_products(x, dy, kernel, sizes):
    """The sum of x_r^T dy_r over the rows of every expert, added up in float32 at least."""
    total = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
    if not len(x):
        return total.astype(kernel.dtype)
    expert, numbers, _ = _groups(len(x), sizes)
    own = numbers < jnp.cumsum(sizes)[expert][:, None]
    numbers = jnp.minimum(numbers, len(x) - 1)

    def add(total, part):
        expert, inputs, slopes = part
        return total.at[expert].add(jnp.matmul(inputs.T, slopes, preferred_element_type=total.dtype)), None

    parts = expert, x[numbers], jnp.where(own[..., None], dy[numbers], 0)
    return jax.lax.scan(add, total, parts)[0].astype(kernel.dtype)
