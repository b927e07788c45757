"""DSFormer: weights as dictionary x N:M sparse codes (Chand, Prabhu, Kumar 2023), and its straight-through
factoriser (STF).

    W ~ F(W) = D S         (`sparsejax.dense_sparse`: what D and S are, and how they are found)

STF keeps W trainable. A training step moves the stored (D, S) by one alternation towards the present W and
computes with the product; its gradient goes to W as it is:

    W^ = sg(D S) + (W - sg(W))        dL/dW := dL/dW^

Evaluation uses the stored (D, S), which is all that is deployed (`factors`, `deploy`). To factorise first and
then fine-tune D and the nonzeros of S, train `sparsejax.nn.DenseSparse` layers, made from the dense ones.

Departures: the alternation that finds D and S is our own choice. The defaults store 41 % of a weight with 256
outputs.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from sparsejax import dense_sparse
from sparsejax.dense_sparse import Factors
from sparsejax.masks import flatten, map_with_name, sparsifiable
from sparsejax.nn.dense_sparse import kernels
from sparsejax.patterns import NM, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSFormer:
    """A parameterization (`sparsejax.parameterizations`) by dense-sparse factors.

    The latent tree is `{"params": weights}`; the state is `{"factors": ...}`, by path of the weight
    `{"dense": D, "sparse": S}`.

    Attributes:
      budget: what D and S may store, as a fraction of the dense weight (`dense_sparse.stored_values`, positions
        included); their rank is the largest that fits.
      pattern: N:M of the codes, along the rows of S, or its name.
      block: rows of W with a dictionary of their own, a divisor of them; None for one dictionary.
      iterations: alternations of the initial factorisation.
      include, exclude: path patterns of the matrices that are factorised, see `masks.sparsifiable`.

    Raises:
      ValueError: one sentence, for a pattern that is not N:M, or no alternation at all; in
        `init` naming the leaf, if it is no matrix, the block does not divide its rows, or the budget is too small.
    """

    budget: float = 0.5
    pattern: str | NM = "5:16"
    block: int | None = 16
    iterations: int = 30
    include: Iterable[str] = ("*kernel",)
    exclude: Iterable[str] = ()

    def __post_init__(self):
        object.__setattr__(self, "pattern", parse(self.pattern))
        if type(self.pattern) is not NM or self.pattern.axis != -2:
            raise ValueError(
                f"dsformer needs an N:M pattern along axis -2 such as 5:16, got {self.pattern!r}"
            )
        if self.iterations < 1:
            raise ValueError(f"dsformer needs at least one alternation, got iterations={self.iterations}")

    def init(self, key, params):
        """Factors of the given parameters by `dense_sparse.factorise`; the key is not used."""
        del key
        factors = {}
        for name, weight in sparsifiable(params, self.include, self.exclude).items():
            factors[name] = self._factorise(name, weight)._asdict()
        return {"params": params}, {"factors": unflatten_dict(factors, sep="/")}

    def materialize(self, latent, state, key=None):
        """D S in place of the factorised weights; with a key STF first moves D and S towards the weights.

        There is no penalty.
        """
        pairs = self.factors(state)
        if key is not None:
            weights = jax.lax.stop_gradient(flatten(latent["params"]))
            pairs = {name: self._alternate(name, weights[name], pair) for name, pair in pairs.items()}
            stored = {name: pair._asdict() for name, pair in pairs.items()}
            state = {"factors": unflatten_dict(stored, sep="/")}

        def replaced(name, weight):
            if name not in pairs:
                return weight
            # Exactly D S in the forward pass, the identity of the weight in the backward pass.
            return _matrix(pairs[name]).astype(weight.dtype) + (weight - jax.lax.stop_gradient(weight))

        return map_with_name(replaced, latent["params"]), state, 0.0

    def masks(self, latent, state):
        """None: the product of the factors has no zeros of its own."""

    def factors(self, state) -> dict[str, Factors]:
        """The stored D and S, by path of the weight."""
        held = flatten(state["factors"])
        names = [name.removesuffix("/dense") for name in held if name.endswith("/dense")]
        return {name: Factors(held[f"{name}/dense"], held[f"{name}/sparse"]) for name in names}

    def deploy(self, latent, state):
        """Parameters and masks of the model whose factorised layers are `sparsejax.nn.DenseSparse` ones.

        They compute what the materialised parameters do; the masks keep the nonzeros of S.

        Raises:
          ValueError: for a factorised parameter that is not called `kernel`, naming it.
        """
        pairs = self.factors(state)
        params = {name: leaf for name, leaf in flatten(latent["params"]).items() if name not in pairs}
        masks = {name: jnp.asarray(True) for name in params}
        for name, pair in pairs.items():
            owner, _, leaf = name.rpartition("/")
            if leaf != "kernel":
                raise ValueError(
                    f"only a layer's kernel can be deployed as a DenseSparse layer, got {name!r}"
                )
            owner = f"{owner}/" if owner else ""
            params |= {owner + part: leaf for part, leaf in kernels(pair).items()}
            masks |= {owner + "dense_kernel": jnp.asarray(True), owner + "sparse_kernel": pair.sparse != 0}
        return unflatten_dict(params, sep="/"), unflatten_dict(masks, sep="/")

    def stored_values(self, params) -> float:
        """What the factorised parameters take, in values of 32 bits; the others count one each."""
        chosen = sparsifiable(params, self.include, self.exclude)
        values = 0.0
        for name, leaf in flatten(params).items():
            if name in chosen:
                values += dense_sparse.stored_values(*self._plan(name, leaf), self.pattern)
            else:
                values += leaf.size
        return values

    def _plan(self, name: str, weight):
        return dense_sparse.plan(weight.shape, self.budget, self.pattern, self.block, name)

    def _alternate(self, name: str, weight, factors: Factors) -> Factors:
        shape, _ = self._plan(name, weight)
        return dense_sparse.alternate(weight.reshape(shape), factors, self.pattern)

    def _factorise(self, name: str, weight) -> Factors:
        shape, rank = self._plan(name, weight)
        return dense_sparse.factorise(weight.reshape(shape), rank, self.pattern, self.iterations)


def _matrix(factors: Factors):
    """D S as the matrix `(rows, out)`."""
    blocks = dense_sparse.product(factors)
    return blocks.reshape(-1, blocks.shape[-1])
