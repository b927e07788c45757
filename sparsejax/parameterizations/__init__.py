"""Parameterizations: latent parameters that are trained, and the weights that are made of them.

A parameterization has three methods:

    init(key, params) -> (latent, state)
        The trained tree, and everything else it needs (frozen weights, counters, warm starts); {} if nothing.
        Latent trees that hold trained weights keep them under "params".
    materialize(latent, state, key=None) -> (params, state, penalty)
        The model's parameters, differentiable in `latent`; the next state; a scalar added to the loss. With a
        key (training) it may sample. Without one (evaluation) it is deterministic, keeps the state, and the
        penalty is 0.
    masks(latent, state) -> masks of the materialised parameters, or None
        None where the masks that a transform puts on the latent parameters say what is zero.

Masks of a transform apply to the latent parameters, before `materialize`. `Parameterized(model, ...)` looks
like a linen module, so that training loops need not know.
"""

import dataclasses
import inspect
from typing import Any

from flax import linen

from sparsejax.masks import choose
from sparsejax.parameterizations.dsformer import DSFormer
from sparsejax.parameterizations.fake_quant import FakeQuant
from sparsejax.parameterizations.maskllm import MaskLLM
from sparsejax.parameterizations.slorb import Slorb
from sparsejax.parameterizations.weight_scaling import WeightScaling

PARAMETERIZATIONS = {
    "dsformer": DSFormer,
    "fake_quant": FakeQuant,
    "maskllm": MaskLLM,
    "slorb": Slorb,
    "weight_scaling": WeightScaling,
}
COLLECTION = "parameterization"


def build(name: str, **kw):
    """The parameterization called `name`.

    Raises:
      ValueError: for an unknown name or keyword, listing the known ones, or a missing keyword.
    """
    factory = choose("parameterization", name, PARAMETERIZATIONS)
    for key in kw:
        choose(f"keyword of parameterization {name!r}", key, inspect.signature(factory).parameters)
    try:
        return factory(**{key: tuple(v) if isinstance(v, list) else v for key, v in kw.items()})
    except TypeError as error:
        raise ValueError(f"parameterization {name!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Parameterized:
    """A linen model whose parameters are made of others: `init` and `apply` as the model's own.

    Attributes:
      model: the linen module.
      parameterization: see the module.
    """

    model: linen.Module
    parameterization: Any

    def init(self, key, x, train: bool = False) -> dict[str, Any]:
        """The variables: `params` holds the latent parameters, `parameterization` the state if there is one."""
        return self.convert(key, self.model.init(key, x, train=train))

    def convert(self, key, variables) -> dict[str, Any]:
        """The variables that start from those of the plain model (pretrained ones, say)."""
        others = {name: value for name, value in variables.items() if name != "params"}
        latent, state = self.parameterization.init(key, variables["params"])
        return others | {"params": latent} | ({COLLECTION: state} if state else {})

    def revert(self, variables) -> dict[str, Any]:
        """The variables of the plain model, as evaluation uses them."""
        others = {name: value for name, value in variables.items() if name not in ("params", COLLECTION)}
        params, _, _ = self.parameterization.materialize(variables["params"], variables.get(COLLECTION, {}))
        return others | {"params": params}

    def masks(self, variables):
        """The parameterization's own masks of the plain model's parameters, or None."""
        return self.parameterization.masks(variables["params"], variables.get(COLLECTION, {}))

    def apply(self, variables, x, train: bool = False, mutable=False, rngs=None):
        """As `linen.Module.apply`; the penalty goes to the `losses` collection."""
        if not train:
            return self.model.apply(self.revert(variables), x, train=False, mutable=mutable, rngs=rngs)
        others = {name: value for name, value in variables.items() if name not in ("params", COLLECTION)}
        params, state, penalty = self.parameterization.materialize(
            variables["params"], variables.get(COLLECTION, {}), rngs["sample"]
        )
        outputs, updated = self.model.apply(
            others | {"params": params}, x, train=True, mutable=mutable or [], rngs=rngs
        )
        if mutable is False:
            return outputs
        updated = {**updated, "losses": {**updated.get("losses", {}), COLLECTION: penalty}}
        return outputs, updated | ({COLLECTION: state} if state else {})
