"""The layer that a dense-sparse factorisation is deployed as: y = (x D) S + bias (DSFormer, Chand et al. 2023).

What D and S are, and how they are found, is told in `sparsejax.dense_sparse`. The layer stores S with its zeros;
masks say which they are (`parameterizations.DSFormer.deploy` gives them), and what they save.
"""

import jax
import jax.numpy as jnp
from flax import linen

from sparsejax import dense_sparse
from sparsejax.dense_sparse import Factors
from sparsejax.nn.factorised import FactorisedLinear, with_bias
from sparsejax.patterns import NM, parse


class DenseSparse(FactorisedLinear):
    """A Dense of factors `dense_kernel` (blocks, height, rank), `sparse_kernel` (blocks, rank, features), and bias.

    It starts as random factors with an N:M sparse S of full variance; sparse it stays only under masks.

    Attributes:
      budget, pattern, block: as for `sparsejax.parameterizations.DSFormer`.

    Raises:
      ValueError: at `init`, one sentence that names the layer, as `sparsejax.dense_sparse.plan`.
    """

    budget: float = 0.5
    pattern: str | NM = "5:16"
    block: int | None = 16

    def factors(self, inputs: int):
        """The parameters `(dense, sparse)`."""
        (blocks, height, out), rank = self._plan((inputs, self.features), self.label)
        pattern = parse(self.pattern)
        init = linen.initializers.normal

        def codes(key, shape, dtype):
            key, where = jax.random.split(key)
            drawn = jax.random.normal(key, shape) * (blocks * rank * pattern.n / pattern.m) ** -0.5
            return jnp.where(pattern.mask(jax.random.uniform(where, shape)), drawn, 0.0).astype(dtype)

        dense = self.param("dense_kernel", init(height**-0.5), (blocks, height, rank), self.param_dtype)
        return dense, self.param("sparse_kernel", codes, (blocks, rank, out), self.param_dtype)

    def product(self, x, dense, sparse):
        """`(x D) S`, summed over the blocks of inputs."""
        x = x.reshape(*x.shape[:-1], *dense.shape[:2])
        codes = jnp.einsum("...bh,bhr->...br", x, dense)
        return jnp.einsum("...br,bro->...o", codes, sparse)

    @linen.nowrap
    def to_dense(self, variables) -> dict[str, jax.Array]:
        """The `kernel` and `bias` of the Dense that equals a layer with these variables."""
        params = variables["params"]
        kernel = params["dense_kernel"] @ params["sparse_kernel"]
        return with_bias({"kernel": kernel.reshape(-1, kernel.shape[-1])}, params)

    @linen.nowrap
    def from_dense(self, params) -> dict[str, jax.Array]:
        """The parameters of this layer that `dense_sparse.factorise` finds for a Dense's `kernel` and `bias`."""
        shape, rank = self._plan(params["kernel"].shape, "the matrix")
        found = dense_sparse.factorise(params["kernel"].reshape(shape), rank, parse(self.pattern))
        dtype = params["kernel"].dtype
        return with_bias({name: leaf.astype(dtype) for name, leaf in kernels(found).items()}, params)

    @linen.nowrap
    def _plan(self, shape, label: str):
        return dense_sparse.plan(shape, self.budget, parse(self.pattern), self.block, label)


def kernels(factors: Factors) -> dict[str, jax.Array]:
    """The kernels of a `DenseSparse` layer with these factors, each atom scaled to the norm of its codes.

    The product is the same. Of all such scalings this one has factors of the least norm, and a gradient step
    moves both alike.
    """
    dense, sparse = factors
    norms = jnp.linalg.norm(dense, axis=-2), jnp.linalg.norm(sparse, axis=-1)
    used = (norms[0] > 0) & (norms[1] > 0)
    ratio = jnp.sqrt(jnp.where(used, norms[1], 1.0) / jnp.where(used, norms[0], 1.0))
    return {"dense_kernel": dense * ratio[..., None, :], "sparse_kernel": sparse / ratio[..., None]}


__all__ = ["DenseSparse", "kernels"]
