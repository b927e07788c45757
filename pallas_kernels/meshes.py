"""Operations on meshes whose axes are explicit, and inside `jax.shard_map`.

JAX then keeps track of how every intermediate result is sharded, or over which axes of the mesh it differs, and asks
loops and custom gradients to say so. Operations say it once, here, and are written as if there were no mesh.
"""

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_mesh(function, spec, *arrays):
    """`function(*arrays)`, wherever the arrays are.

    Inside `jax.shard_map` all of them vary where any of them does, so that the gradients of the others are summed over
    the mesh. Axes of a mesh that are explicit are automatic inside `function`, and explicit again for its results.

    Args:
      function: takes arrays and returns a tree of arrays.
      spec: takes the PartitionSpecs of the arrays, one entry for each axis, and returns those of the results.
    """

    def run(*arrays):
        return function(*(vary(array, *arrays) for array in arrays))

    shardings = [jax.typeof(array).sharding for array in arrays]
    mesh = next((each.mesh for each in shardings if AxisType.Explicit in each.mesh.axis_types), None)
    if mesh is None:
        return run(*arrays)
    specs = spec(*(each.spec for each in shardings))
    wanted = jax.tree.map(lambda each: NamedSharding(mesh, each), specs, is_leaf=_is_spec)
    return jax.sharding.auto_axes(run, out_sharding=wanted)(*arrays)


def vary(array, *others):
    """`array`, which inside `jax.shard_map` may differ between devices where any of the others does.

    What a loop carries has one type from beginning to end, so that zeros that such arrays are added to need this.
    """
    axes = frozenset().union(*map(_varying, others)) - _varying(array)
    return lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def like_rows(x, *others):
    """The spec of `(..., N)` for a first array `(..., K)`."""
    del others
    return PartitionSpec(*x[:-1], None)


def _varying(array):
    return jax.typeof(array).manual_axis_type.varying


def _is_spec(leaf):
    return isinstance(leaf, PartitionSpec)
