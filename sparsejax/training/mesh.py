"""Devices: the mesh, how arrays are laid out on it, and moving trees between host and mesh.

Without a mesh everything lives on one device. With `data:N,model:M` the batch is split over both axes and
every parameter, with the optimizer state that belongs to it, over `model` (fully sharded data parallel).
The arithmetic stays that of one device: `jax.jit` inserts the collectives.
"""

import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax.masks import choose, owner

AXES = ("data", "model")


def build_mesh(description) -> Mesh | None:
    """The mesh that `data:N,model:M` describes; None stays None, a `Mesh` is returned unchanged.

    Raises:
      ValueError: one sentence, for bad syntax, an unknown axis or sizes that do not divide the devices.
    """
    if description is None or isinstance(description, Mesh):
        return description
    sizes = dict.fromkeys(AXES, 1)
    for part in str(description).split(","):
        name, _, size = part.partition(":")
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh {description!r} must look like 'data:4,model:2'")
        sizes[choose("mesh axis", name.strip(), AXES)] = int(size)
    needed, devices = math.prod(sizes.values()), jax.devices()
    everyone = jax.process_count() == 1 or needed == len(devices)
    if len(devices) % needed or not everyone:
        raise ValueError(f"mesh {description!r} needs {needed} devices, which does not divide {len(devices)}")
    return Mesh(np.asarray(devices[:needed]).reshape(tuple(sizes.values())), AXES)


def check_batch(mesh: Mesh | None, **sizes: int) -> None:
    """Raises ValueError unless the mesh divides each of the named batch sizes."""
    for name, size in sizes.items():
        if mesh is not None and size % mesh.size:
            raise ValueError(f"config.{name}={size} is not divisible by the {mesh.size} devices of the mesh")


def param_spec(shape, size: int) -> PartitionSpec:
    """Shards the largest axis that `size` divides over `model`; no such axis: replicated."""
    axes = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or not axes:
        return PartitionSpec()
    axis = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * axis, "model")


def state_shardings(mesh: Mesh, state, params):
    """A sharding for every leaf of `state`.

    A leaf whose path ends with the path of a parameter and has its shape (moments, masks) is laid out as
    that parameter; everything else (counters, keys, factored moments) is replicated.
    """
    owners = dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path, leaf):
        param = owner(path, owners)
        follows = param is not None and param.shape == leaf.shape
        return NamedSharding(
            mesh, param_spec(leaf.shape, mesh.shape["model"]) if follows else PartitionSpec()
        )

    return jax.tree_util.tree_map_with_path(place, state)


def place(tree, shardings):
    """Puts host or single-device arrays on the mesh; every process must hold the same values."""

    def put(leaf, sharding):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def batch_placer(mesh: Mesh | None):
    """A function that splits a batch of host arrays over the whole mesh.

    Without a mesh it returns the batch itself: a jitted function takes host arrays faster than `device_put`.
    """
    if mesh is None:
        return lambda batch: batch
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    return lambda batch: jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]), batch
    )


def to_host(tree):
    """The whole tree as numpy arrays on every process, however it was sharded (a collective)."""

    def fetch(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def is_main() -> bool:
    """Whether this process writes files and prints: the first of a `jax.distributed` job."""
    return jax.process_index() == 0
