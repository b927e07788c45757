"""Kernels under `jax.vmap` and on meshes: the axes over which an operation is independent.

A kernel is a loop over independent problems (sequences, heads, rows). What `jax.vmap` adds is one more loop of
that kind, and a mesh that shards such an axis gives every device its own problems, with no communication. Neither
is something the compiler can see inside a loop of data-dependent length or a custom call, so it is said here.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels.meshes import vary


def independent(function, rule: str, axes: str, merge=None):
    """`function`, mapped and sharded along its independent axes without a look inside.

    Args:
      function: takes arrays and returns a tuple of arrays. The first axis of every one is the first of `axes`;
        an axis mapped by `jax.vmap` is merged into it.
      rule: the axes of arguments and results, one letter each, as in "btgd bsgd -> btgd bgt".
      axes: the letters of the independent axes. On a mesh these stay sharded, the others are gathered first.
      merge: how a mapped axis, first of those arguments that have it, is merged into the first axis of all:
        (its size, which arguments have it, arguments) -> arguments. None merges it into every argument's first.
    """
    merge = merge or _merge
    arguments, results = (side.split() for side in rule.split("->"))
    letters = dict.fromkeys("".join(arguments + results))
    sharded = custom_partitioning(lambda *args: function(*args))
    sharded.def_partition(
        partition=_partition(function, arguments, results, axes),
        sharding_rule=_spaced(arguments) + " -> " + _spaced(results),
        need_replication_factors=tuple(letter for letter in letters if letter not in axes),
    )

    @custom_vmap
    def mapped(*args):
        outs = (sharded if _partitioner_asks() else function)(*args)
        return tuple(vary(out, *args) for out in outs)  # which the partitioner's function forgets

    @mapped.def_vmap
    def _(size, is_mapped, *args):
        outs = mapped(*merge(size, is_mapped, args))
        return tuple(out.reshape(size, -1, *out.shape[1:]) for out in outs), (True,) * len(outs)

    return mapped


def _partitioner_asks():
    """Whether the compiler asks how to shard a function: not where only some axes of the mesh are manual."""
    manual = [kind == AxisType.Manual for kind in jax.sharding.get_abstract_mesh().axis_types]
    return all(manual) or not any(manual)


def _merge(size, is_mapped, args):
    args = [x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in zip(args, is_mapped, strict=True)]
    return [x.reshape(-1, *x.shape[2:]) for x in args]


def _spaced(terms):
    return ", ".join(" ".join(term) for term in terms)


def _partition(function, arguments, results, axes):
    """The partitioning callback: every array is sharded along the independent axes alone, and alike."""

    def partition(mesh, args, outs):
        del mesh  # the context's, which need not be the one of the shardings
        of_mesh, used = {}, set()  # independent axis -> axes of the mesh
        for term, leaf in zip(arguments + results, [*args, *outs], strict=True):
            for axis, names in zip(term, leaf.sharding.spec, strict=False):
                names = (names,) if isinstance(names, str) else tuple(names or ())
                if axis in axes and axis not in of_mesh and names and not used.intersection(names):
                    of_mesh[axis] = names
                    used.update(names)
        mesh = args[0].sharding.mesh

        def shardings(terms):
            specs = [PartitionSpec(*(of_mesh.get(axis) for axis in term)) for term in terms]
            return tuple(NamedSharding(mesh, spec) for spec in specs)

        def local(*args):
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return function(*args)

        return mesh, local, shardings(results), shardings(arguments)

    return partition
