"""Removable channels: which slices of which leaves belong to one channel, and their physical removal.

A *group* is one channel of a layer: the output slice of the kernel that produces it with its bias, norm scale
and norm bias (its *own* weights), and the input slices of the kernels that it feeds. It is zero-invariant: if
all its own weights are zero then so is its activation, and the network equals the one without the channel
(Only Train Once, Chen et al. 2021).

`channels` finds the groups of any linen model by probing, without a graph of it. Put positive weights into
the model, zero some output channels of one kernel, and look at the gradient of the outputs:

  forwards   an input slice of a later kernel whose gradient is now zero is fed by zeroed channels only;
  backwards  with those input slices zero instead, the weights whose gradient is zero act on the outputs
             through the zeroed channels only. If the kernel is among them, its channels are removable; the
             output slices, vectors and norm statistics that come with it are the channel's own.

A residual stream or the model's output fails the second test, a norm over channels or an activation with
f(0) != 0 the first. Channels are told apart by codes in which all have equally many ones, so that C of them
take about log2(C) probes in each direction, and anything that depends on two channels shows a code with fewer
ones and is refused.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from sparsejax.masks import INCLUDE, Masks, apply_masks, flatten, map_with_name, matches


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """Where the channels of a layer lie in one leaf.

    Attributes:
      axis: the axis that they divide.
      channels: int array, the channel that each index of the axis belongs to, or -1 for none. A dense layer
        behind a flattened convolution has many indices of each channel.
    """

    axis: int
    channels: np.ndarray

    def lay(self, values, fill, ndim: int):
        """One value per channel laid along the axis of a leaf of `ndim` axes, `fill` where there is none."""
        along = jnp.where(self.channels >= 0, values[np.maximum(self.channels, 0)], fill)
        return along.reshape(self._shape(ndim))

    def _shape(self, ndim: int) -> list[int]:
        return [-1 if i == self.axis % ndim else 1 for i in range(ndim)]

    def silence(self, leaf, off):
        """A numpy leaf with zeros in the channels for which bool `off` is set."""
        hit = (self.channels >= 0) & off[self.channels]
        return np.where(hit.reshape(self._shape(leaf.ndim)), np.zeros_like(leaf), leaf)

    def equals(self, other: "Slices") -> bool:
        """Whether the other divides its leaf alike."""
        return self.axis == other.axis and np.array_equal(self.channels, other.channels)

    def sums(self, leaf, size: int):
        """float32 sums of a leaf over each of `size` channels."""
        axis = self.axis % leaf.ndim
        along = jnp.sum(leaf.astype(jnp.float32), axis=[i for i in range(leaf.ndim) if i != axis])
        inside = np.flatnonzero(self.channels >= 0)
        return jnp.zeros(size, jnp.float32).at[self.channels[inside]].add(along[inside])


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The channels that one kernel produces.

    Attributes:
      name: path of the kernel in the parameters.
      size: how many there are.
      own: {path of a parameter: Slices} of what must be zero for the channel to vanish.
      fed: {path of a parameter: Slices} of the inputs that it feeds; they no longer matter when it has
        vanished.
      statistics: {path with the collection: Slices} of other variables that go with the channel.
    """

    name: str
    size: int
    own: Mapping[str, Slices]
    fed: Mapping[str, Slices]
    statistics: Mapping[str, Slices] = dataclasses.field(default_factory=dict)


class Groups:
    """All groups of a model, numbered layer by layer; a value per group is an array of shape (count,).

    Attributes:
      layers: tuple of `Layer`.
      count: number of groups, G.
      layer: int array (G,), the index of every group's layer.

    Raises:
      ValueError: if there is no layer, or a leaf is the own of two (naming it): groups must be disjoint.
    """

    def __init__(self, layers: Iterable[Layer]):
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("groups need at least one layer of channels, got none")
        owners: dict[str, str] = {}
        for layer in self.layers:
            for path in layer.own:
                if path in owners:
                    raise ValueError(
                        f"groups must not overlap, but {path} belongs to both {owners[path]} and {layer.name}"
                    )
                owners[path] = layer.name
        sizes = [layer.size for layer in self.layers]
        self.count = sum(sizes)
        self.layer = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.cumsum([0, *sizes])

    def split(self, values) -> list:
        """One array per layer from one value per group."""
        return [values[a:b] for a, b in itertools.pairwise(self._starts)]

    def check(self, params) -> None:
        """Raises ValueError, naming the first leaf, unless the groups fit the parameters."""
        leaves = flatten(params)
        for layer in self.layers:
            for path, slices in (*layer.own.items(), *layer.fed.items()):
                if path not in leaves:
                    raise ValueError(
                        f"the groups of {layer.name} name {path!r}, which is no parameter "
                        f"(parameters: {', '.join(leaves)})"
                    )
                shape = leaves[path].shape
                if not -len(shape) <= slices.axis < len(shape) or shape[slices.axis] != len(slices.channels):
                    raise ValueError(
                        f"the groups of {layer.name} divide axis {slices.axis} of {path} into "
                        f"{len(slices.channels)} indices, but its shape is {tuple(shape)}"
                    )

    def sums(self, tree):
        """float32 (G,): the sum of a tree like the parameters over the own weights of every group."""
        leaves = flatten(tree)
        return jnp.concatenate(
            [
                sum(slices.sums(leaves[path], layer.size) for path, slices in layer.own.items())
                for layer in self.layers
            ]
        )

    def select(self, flags, inside, outside):
        """Own weights of the groups flagged by bool (G,) from the tree `inside`, all else from `outside`."""
        laid = self._lay(flags, False, lambda layer: layer.own)

        def leaf(name, chosen, other):
            return jnp.where(laid[name][0](other.ndim), chosen, other) if name in laid else other

        return map_with_name(leaf, inside, outside)

    def masks(self, params, kept) -> Masks:
        """Masks of the network without the groups that `kept`, bool (G,), leaves out.

        All own weights of a dropped group are masked, and the inputs that it feeds. Leaves that belong to no
        group stay dense, the others get a bool mask of their shape.
        """
        laid = self._lay(kept, True, lambda layer: {**layer.own, **layer.fed})

        def mask(name, leaf):
            if name not in laid:
                return jnp.asarray(True)
            parts = [part(leaf.ndim) for part in laid[name]]
            return jnp.broadcast_to(functools.reduce(jnp.logical_and, parts), leaf.shape)

        return map_with_name(mask, params)

    def _lay(self, values, fill, members) -> dict[str, list]:
        """{path: functions from a leaf's number of axes to the values of its groups, laid along it}."""
        found: dict[str, list] = {}
        for layer, part in zip(self.layers, self.split(values), strict=True):
            for path, slices in members(layer).items():
                found.setdefault(path, []).append(functools.partial(slices.lay, part, fill))
        return found


# --- finding the groups ------------------------------------------------------------------------------


def channels(model: linen.Module, variables, *example_inputs, **kwargs) -> Groups:
    """The removable channels of a linen model, found by probing (see the module).

    Costs about 3 log2(C) gradients for a kernel of C output channels, of a batch like the inputs.

    Args:
      model: any linen module whose kernels have their output channels last, as flax's have.
      variables: its variables; of parameters and batch statistics only shapes and dtypes matter.
      *example_inputs: inputs as for `model.apply`, best a batch of one; floats are replaced by positive
        random numbers.
      **kwargs: keywords of the call, for example `train=False`.

    Raises:
      ValueError: if no kernel has removable channels.
    """
    probe = _Probe(model, variables, example_inputs, kwargs)
    kernels = [
        name
        for name, leaf in flatten(variables["params"]).items()
        if jnp.ndim(leaf) >= 2 and matches(name, INCLUDE)
    ]
    layers: list[Layer] = []
    for name in kernels:
        if not any(name in layer.own for layer in layers):
            layer = probe.layer("params/" + name)
            layers += [layer] if layer else []
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no kernel whose channels can be removed (kernels: {', '.join(kernels)})"
        )
    return Groups(layers)


class _Probe:
    """A model with positive weights, and the question which entries lose their influence on its outputs."""

    def __init__(self, model, variables, inputs, kwargs):
        rng = np.random.default_rng(0)
        leaves = {name: np.asarray(leaf) for name, leaf in flatten(dict(variables)).items()}
        inputs = jax.tree.map(lambda x: _positive(rng, x) if _is_float(np.asarray(x)) else x, inputs)
        structure = jax.tree.structure(dict(variables))
        floats = [name for name, leaf in leaves.items() if _is_float(leaf)]

        def total(probed, others):
            tree = structure.unflatten([{**others, **probed}[name] for name in leaves])
            outputs = jax.tree.leaves(model.apply(tree, *inputs, **kwargs))
            weighted = (jnp.ravel(out).astype(jnp.float32) @ jnp.linspace(1, 2, out.size) for out in outputs)
            return sum(weighted)

        gradient = jax.jit(jax.grad(total))

        def dead(values):
            """Which entries of every float leaf have no influence on the outputs."""
            others = {name: leaf for name, leaf in values.items() if name not in floats}
            grads = jax.device_get(gradient({name: values[name] for name in floats}, others))
            return {name: np.asarray(grad) == 0 for name, grad in grads.items()}

        self.dead = dead
        self.values = {name: _probe_value(rng, name, leaf) for name, leaf in leaves.items()}
        self.unbiased = {
            name: np.zeros_like(leaf) if name.endswith("bias") else leaf for name, leaf in self.values.items()
        }

    def layer(self, path: str) -> Layer | None:
        """The removable channels of the kernel `path`, None if it has none."""
        kernel = self.values[path]
        outputs = {path: Slices(kernel.ndim - 1, np.arange(kernel.shape[-1]))}
        if kernel.shape[-1] < 2:
            return None
        fed = self.dying(self.unbiased, outputs)
        fed = {name: slices for name, slices in fed.items() if slices.axis < self.values[name].ndim - 1}
        own = self.dying(self.values, fed) if fed else {}
        own = {name: slices for name, slices in own.items() if name not in fed}
        if path not in own or not own[path].equals(outputs[path]):
            return None
        # what the definition asks for: with its own weights zero, and no other, a channel is silent
        params = {name: slices for name, slices in own.items() if name.startswith("params/")}
        silent = self.dying(self.values, params)
        if not all(name in silent and silent[name].equals(slices) for name, slices in fed.items()):
            return None
        statistics = {name: slices for name, slices in own.items() if name not in params}
        return Layer(_short(path), kernel.shape[-1], _by_name(params), _by_name(fed), statistics)

    def dying(self, values, zeroed: Mapping[str, Slices]) -> dict[str, Slices]:
        """The slices of every leaf that lose their influence with exactly one channel of `zeroed`."""
        size = 1 + max(slices.channels.max() for slices in zeroed.values())
        length, codes = _codes(size)
        alive = {name: ~dead for name, dead in self.dead(values).items()}
        seen = {name: np.zeros(flags.shape, np.int64) for name, flags in alive.items()}
        for bit in range(length):
            off = (codes >> bit & 1).astype(bool)
            changed = {name: slices.silence(values[name], off) for name, slices in zeroed.items()}
            for name, dead in self.dead({**values, **changed}).items():
                seen[name] += dead.astype(np.int64) << bit
        channel = np.full(1 << length, -1)
        channel[codes] = np.arange(size)
        found = {name: _slices(channel[seen[name]], alive[name]) for name in seen}
        return {name: slices for name, slices in found.items() if slices is not None}


def _codes(size: int) -> tuple[int, np.ndarray]:
    """The shortest length of codes with half their bits set of which there are `size`, and these codes."""
    length = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= size)
    words = itertools.islice(itertools.combinations(range(length), length // 2), size)
    return length, np.array([sum(1 << bit for bit in word) for word in words])


def _slices(labels, alive) -> Slices | None:
    """The axis that the labels of the live entries depend on, with the label of every index; else None."""
    if not np.any(alive & (labels >= 0)):
        return None
    for axis in reversed(range(labels.ndim)):
        rows = np.moveaxis(np.where(alive, labels, -1), axis, 0).reshape(labels.shape[axis], -1)
        known = np.moveaxis(alive, axis, 0).reshape(rows.shape)
        found = rows.max(1)
        if np.all((rows == found[:, None]) | ~known):
            return Slices(axis, found)
    return None


def _probe_value(rng, name: str, leaf):
    kind = name.rsplit("/", 1)[-1]
    if not _is_float(leaf):
        return leaf
    if not name.startswith("params/"):
        return {"mean": np.zeros_like, "var": np.ones_like}.get(kind, np.asarray)(leaf)
    fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 1
    return (_positive(rng, leaf) / fan_in).astype(leaf.dtype)


def _positive(rng, leaf):
    return rng.uniform(0.5, 1.5, np.shape(leaf)).astype(np.asarray(leaf).dtype)


def _is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _short(path: str) -> str:
    return path.removeprefix("params/")


def _by_name(slices: Mapping[str, Slices]) -> dict[str, Slices]:
    return {_short(path): part for path, part in slices.items()}


# --- removing them -----------------------------------------------------------------------------------


def remove(model: linen.Module, variables, masks, groups: Groups) -> tuple[linen.Module, dict]:
    """The smaller model without the groups whose own weights are all zero, with the same outputs.

    Args:
      model: a linen module with a method `narrowed({layer path: width}) -> module`, as those of
        `sparsejax.models` have.
      variables: its variables.
      masks: masks of the parameters, or None if the zeros are already in them.
      groups: the groups of the model, from `channels`.

    Returns:
      (model, variables). A layer without any channel left keeps one, which is silent.

    Raises:
      ValueError: if the model cannot be narrowed, or the groups do not fit the variables.
    """
    if not hasattr(model, "narrowed"):
        raise ValueError(
            f"{type(model).__name__} has no method narrowed(widths), which returns it with layers of other widths"
        )
    groups.check(variables["params"])
    params = variables["params"] if masks is None else apply_masks(variables["params"], masks)
    nonzero = np.asarray(groups.sums(jax.tree.map(lambda leaf: leaf != 0, params))) > 0
    variables, widths = dict(variables) | {"params": params}, {}
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(variables).items()}
    for layer, kept in zip(groups.layers, groups.split(nonzero), strict=True):
        kept = kept if kept.any() else np.arange(layer.size) == 0
        parameters = {"params/" + path: slices for path, slices in (*layer.own.items(), *layer.fed.items())}
        for path, slices in (*parameters.items(), *layer.statistics.items()):
            chosen = np.flatnonzero((slices.channels < 0) | kept[slices.channels])
            leaves[path] = leaves[path].take(chosen, slices.axis)
        widths |= {
            path.rpartition("/")[0]: leaves["params/" + path].shape[-1]
            for path in layer.own
            if matches(path, INCLUDE)
        }
    return model.narrowed(widths), map_with_name(lambda name, _: jnp.asarray(leaves[name]), variables)
