"""Linear layers whose weight is a product or sum of factors, and conversion of models to and from dense ones.

A factorised layer has the input, the output and the bias of a Dense, but stores the weight W of shape
(inputs, features) as factors. It knows its W: `layer.to_dense(variables)` gives the parameters of the Dense
that computes the same, and, where the structure allows it, `layer.from_dense(params)` those of the layer that
is nearest to a given Dense. `to_dense`, `from_dense` and `convert` do this for every such layer of a model, of
whatever class: only these two methods are asked for.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype

from sparsejax.masks import flatten
from sparsejax.nn.layers import MaskedParams


class FactorisedLinear(MaskedParams):
    """What factorised layers share: `x (..., inputs) -> (..., features)`, a bias, dtypes as in linen's Dense.

    A subclass declares its parameters in `factors(inputs)`, multiplies by them in `product(x, *factors)`, and
    has `to_dense`, perhaps `from_dense`. Its parameters with two or more axes end in `kernel`.

    Attributes:
      features: width of the output.
      use_bias: whether to add a bias, zero at initialisation.
      dtype: dtype of the computation, None for that of inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x):
        """`x W + bias`."""
        factors = self.factors(x.shape[-1])
        bias = None
        if self.use_bias:
            bias = self.param("bias", linen.initializers.zeros, (self.features,), self.param_dtype)
        x, bias, *factors = promote_dtype(x, bias, *factors, dtype=self.dtype)
        y = self.product(x, *factors)
        return y if bias is None else y + bias

    @linen.nowrap
    def macs(self, kernel, inputs: int) -> int:
        """Multiply-adds per position that are booked on one of the kernels (`sparsejax.flops`)."""
        return kernel.size

    @property
    def label(self) -> str:
        """How an error names this layer: its class and its path in the model."""
        return " ".join([type(self).__name__, "layer", "/".join(self.path)]).strip()


def with_bias(kernels: Mapping, params: Mapping) -> dict[str, Any]:
    """The parameters `kernels` with the bias of `params`, if there is one."""
    return {**kernels, **{name: params[name] for name in ("bias",) if name in params}}


def uniform(fan_in: int):
    """The initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), that of both papers."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


# --- whole models ------------------------------------------------------------------------------------


def factorised_layers(model: linen.Module, *inputs, **kwargs) -> dict[tuple[str, ...], linen.Module]:
    """The layers of a model that have a `to_dense`, by path; the model is traced with shapes only.

    Args:
      model: any linen module.
      *inputs, **kwargs: as for `model.init`; arrays or `jax.ShapeDtypeStruct`s.
    """
    found = {}

    def intercept(call, args, kw, context):
        if hasattr(context.module, "to_dense"):
            found[context.module.path] = context.module
        return call(*args, **kw)

    with linen.intercept_methods(intercept):
        jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **kwargs), *inputs)
    return found


def to_dense(model: linen.Module, variables: Mapping, *inputs, **kwargs) -> Any:
    """The parameters of the same model with plain Dense layers in place of the factorised ones.

    Args:
      model: the factorised model.
      variables: its variables: `params` and whatever the layers need besides (`constants`).
      *inputs, **kwargs: as for `model.init`.

    Returns:
      The params; a factorised layer's have become `{"kernel": (inputs, features), "bias": (features,)}`.
    """
    params = variables["params"]
    for path, layer in factorised_layers(model, *inputs, **kwargs).items():
        own = {name: found for name, tree in variables.items() if (found := _get(tree, path)) is not None}
        params = _set(params, path, layer.to_dense(own))
    return params


def from_dense(model: linen.Module, params: Any, *inputs, **kwargs) -> Any:
    """The parameters of a factorised model, each factorised layer as near as can be to a given Dense.

    Args:
      model: the factorised model.
      params: parameters of the same model with Dense layers.
      *inputs, **kwargs: as for `model.init`.

    Raises:
      ValueError: if a layer has no `from_dense`, or the dense parameters lack its kernel, naming it.
    """
    for path, layer in factorised_layers(model, *inputs, **kwargs).items():
        if not hasattr(layer, "from_dense"):
            raise ValueError(
                f"{'/'.join(path)} cannot be made from a dense layer: {type(layer).__name__} has no from_dense"
            )
        dense = _get(params, path)
        if dense is None or "kernel" not in dense:
            raise ValueError(f"the dense parameters have no leaf {'/'.join((*path, 'kernel'))!r}")
        params = _set(params, path, layer.from_dense(dense))
    return params


def convert(
    source: linen.Module, variables: Mapping, target: linen.Module, key, *inputs, **kwargs
) -> dict[str, Any]:
    """Variables of `target` that stand for the trained `variables` of `source`.

    Models of equal parameter shapes and factorised layers share them. Otherwise the factorised layers of the source are
    multiplied out (reverse sparsification) and those of the target projected (dense-to-sparse): the two models
    are to differ in how their linear layers are made, and in nothing else. Other collections are the source's
    where they have equal shapes, and else the target's own at initialisation.

    Args:
      source, variables: the trained model.
      target: the other model.
      key: of the target's initialisation.
      *inputs, **kwargs: as for `init` of both.

    Raises:
      ValueError: as `from_dense`. Whether the result fits the target in every other leaf is not checked.
    """

    def draw():
        return target.init(key, *inputs, **kwargs)

    alike = _shapes(variables["params"]) == _shapes(jax.eval_shape(draw)["params"])
    if alike and _layers(source, inputs, kwargs) == _layers(target, inputs, kwargs):
        return dict(variables)
    params = from_dense(target, to_dense(source, variables, *inputs, **kwargs), *inputs, **kwargs)
    fresh = jax.jit(draw)()
    shared = [name for name in fresh if _shapes(variables.get(name, {})) == _shapes(fresh[name])]
    return {**fresh, **{name: variables[name] for name in shared}, "params": params}


def _layers(model, inputs, kwargs) -> dict[tuple, tuple]:
    """What gives the parameters of every factorised layer their meaning: its type and fields."""
    found = {}
    for path, layer in factorised_layers(model, *inputs, **kwargs).items():
        fields = set(layer.__dataclass_fields__) - {"parent", "name", "dtype", "param_dtype"}
        found[path] = type(layer), {name: getattr(layer, name) for name in fields}
    return found


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def _get(tree, path):
    for name in path:
        if name not in tree:
            return None
        tree = tree[name]
    return tree


def _set(tree, path, value):
    if not path:
        return value
    return {**tree, path[0]: _set(tree[path[0]], path[1:], value)}


__all__ = ["FactorisedLinear", "convert", "factorised_layers", "from_dense", "to_dense"]
