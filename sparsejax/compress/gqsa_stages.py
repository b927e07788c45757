"""The two training stages of GQSA (Zeng et al. 2025): of a block on its outputs, of scales and zeros on the loss.

Latents are weights w, log-factors f of scales and zeros z. With rounding straight-through, s the initial scales and
`fake` that of `sparsejax.compress.quantise`,

  stage 1   mean of (block(x; fake(w, s exp(f), z)) - target)^2       over w, f and z
  stage 2   loss(model; s exp(f) (code - z))                          over f and z

by Adam, with a rate for each kind. Both keep their best state at the end of an epoch, the start included. Scales are
rounded to the dtype of the kernel, packed or not.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.compress.base import masked
from sparsejax.compress.quantise import Grid, Quantised, dense, encode, fake, fit
from sparsejax.masks import map_with_name


class Trained(NamedTuple):
    """What a stage gives.

    Attributes:
      params: with the dense values of the quantised kernels, in the dtypes of the given ones.
      layers: {path of a kernel: Quantised}.
      losses: before the first epoch and after each, over all batches.
    """

    params: Any
    layers: dict[str, Quantised]
    losses: list[float]


def bqpo(
    apply: Callable,
    params,
    masks: Mapping[str, jax.Array],
    batches: Sequence[tuple[Any, jax.Array]],
    *,
    bits: int = 4,
    group: int = 16,
    epochs: int = 5,
    weight_rate: float = 1e-4,
    scale_rate: float = 1e-3,
    zero_rate: float = 1e-2,
    seed: int = 0,
) -> Trained:
    """Stage 1 for one block.

    Args:
      apply: `(params, inputs) -> outputs` of the block; hashable, and equal for blocks that may share what is
        compiled.
      params: of the dense block, nested dicts.
      masks: {path of a kernel in params: bool mask of its shape}.
      batches: pairs (inputs, targets): any pytree, and the outputs of the dense block for it.
      bits, group: of the grids.
      epochs: through the batches, in a random order.
      weight_rate, scale_rate, zero_rate: of Adam, for weights, logarithms of scales, and zeros in units of codes.
      seed: of the orders.
    """
    kernels = kernels_of(params, masks)
    kernels = {name: masked(kernel.astype(jnp.float32), masks[name]) for name, kernel in kernels.items()}
    grids = {name: fit(kernel, bits=bits, group=group) for name, kernel in kernels.items()}
    latents = {
        "weight": kernels,
        "scale": {name: jnp.zeros_like(grid.scale) for name, grid in grids.items()},
        "zero": {name: grid.zero for name, grid in grids.items()},
    }
    dtypes = {name: kernel.dtype for name, kernel in kernels_of(params, masks).items()}
    scales = {name: grid.scale.astype(dtypes[name]) for name, grid in grids.items()}
    rates = (("scale", scale_rate), ("weight", weight_rate), ("zero", zero_rate))
    best, losses = _descend(
        _BlockLoss(apply, bits), latents, (params, scales, dict(masks)), batches, rates, epochs, seed
    )
    layers = {}
    for name, kernel in best["weight"].items():
        grid = Grid(_grown(scales[name], best["scale"][name]), jnp.round(best["zero"][name]))
        layers[name] = Quantised(encode(masked(kernel, masks[name]), grid, bits), grid, masks[name])
    return Trained(_insert(params, layers), layers, losses)


def e2e_oqp(
    loss: Callable,
    params,
    layers: Mapping[str, Quantised],
    batches: Sequence,
    *,
    epochs: int = 1,
    scale_rate: float = 1e-4,
    zero_rate: float = 1e-3,
    seed: int = 0,
) -> Trained:
    """Stage 2: scales and zeros alone; codes and masks are those of `layers`.

    Args:
      loss: `(params, batch) -> mean loss`, hashable.
      params: of the model, nested dicts; what is not in `layers` stays as it is.
      layers: {path of a kernel in params: Quantised}.
      batches: of equal weight.
      epochs, scale_rate, zero_rate, seed: as in `bqpo`.
    """
    latents = {
        "scale": {name: jnp.zeros(layer.grid.scale.shape) for name, layer in layers.items()},
        "zero": {name: layer.grid.zero for name, layer in layers.items()},
    }
    rates = (("scale", scale_rate), ("zero", zero_rate))
    best, losses = _descend(_CodeLoss(loss), latents, (params, dict(layers)), batches, rates, epochs, seed)
    layers = _regrid(layers, best)
    return Trained(_insert(params, layers), layers, losses)


@dataclasses.dataclass(frozen=True)
class _BlockLoss:
    """Mean squared difference of a quantised block's outputs from the targets."""

    apply: Callable
    bits: int

    def __call__(self, latents, fixed, batch):
        params, scales, masks = fixed
        inputs, targets = batch
        kernels = {
            name: fake(
                kernel,
                Grid(_grown(scales[name], latents["scale"][name]), latents["zero"][name]),
                masks[name],
                bits=self.bits,
            )
            for name, kernel in latents["weight"].items()
        }
        outputs = self.apply(with_kernels(params, kernels), inputs)
        return jnp.mean(jnp.square((outputs - targets).astype(jnp.float32)))


@dataclasses.dataclass(frozen=True)
class _CodeLoss:
    """The loss of a model whose kernels are made of fixed codes."""

    loss: Callable

    def __call__(self, latents, fixed, batch):
        params, layers = fixed
        return self.loss(_insert(params, _regrid(layers, latents)), batch)


def _regrid(layers, latents) -> dict[str, Quantised]:
    return {
        name: layer._replace(
            grid=Grid(_grown(layer.grid.scale, latents["scale"][name]), latents["zero"][name])
        )
        for name, layer in layers.items()
    }


def _grown(scale, factor):
    """scale exp(factor), in the dtype of `scale`: training sees the scales that are stored."""
    grown = scale.astype(jnp.float32) * jnp.exp(factor)
    return jnp.maximum(grown, jnp.finfo(scale.dtype).tiny).astype(scale.dtype)


def _descend(value, latents, fixed, batches, rates, epochs: int, seed: int):
    """The best latents at the end of an epoch (or at the start), and the mean loss at each of these times."""
    if epochs < 0:
        raise ValueError(f"epochs of gqsa must be at least 0, got {epochs}")
    if not batches:
        raise ValueError("gqsa cannot be trained without a batch")

    def mean(latents):
        return float(np.mean([_value(value, latents, fixed, batch) for batch in batches]))

    rng, state = np.random.default_rng(seed), _adam(rates).init(latents)
    best, losses = latents, [mean(latents)]
    for _ in range(epochs):
        for i in rng.permutation(len(batches)):
            latents, state = _step(value, rates, latents, state, fixed, batches[i])
        losses.append(mean(latents))
        if losses[-1] <= min(losses):
            best = latents
    return best, losses


def _adam(rates):
    return optax.multi_transform(
        {kind: optax.adam(rate) for kind, rate in rates},
        lambda latents: {kind: jax.tree.map(lambda _, kind=kind: kind, latents[kind]) for kind in latents},
    )


@jax.jit(static_argnums=0)
def _value(value, latents, fixed, batch):
    return value(latents, fixed, batch)


@jax.jit(static_argnums=(0, 1))
def _step(value, rates, latents, state, fixed, batch):
    grads = jax.grad(value)(latents, fixed, batch)
    updates, state = _adam(rates).update(grads, state, latents)
    return optax.apply_updates(latents, updates), state


def kernels_of(params, names: Iterable[str]) -> dict:
    """{path: leaf} of the leaves under these paths; ValueError for one that is not there."""
    found = {}
    map_with_name(lambda name, leaf: found.update({name: leaf}) if name in names else None, params)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{missing[0]} is not among the parameters")
    return found


def with_kernels(params, leaves: Mapping):
    """The tree with other leaves under these paths, in the dtypes of the old ones."""
    return map_with_name(
        lambda name, leaf: leaves[name].astype(leaf.dtype) if name in leaves else leaf, params
    )


def _insert(params, layers: Mapping[str, Quantised]):
    return with_kernels(params, {name: dense(layer) for name, layer in layers.items()})
