"""Kernels that XLA cannot look into, under `jax.vmap` and on meshes: they are divided along the rows they multiply."""

import jax
from jax.custom_batching import custom_vmap

from pallas_kernels.batching import independent

TRANSPARENT = ("xla", "reference")  # what XLA divides by itself


def call(implementation: str, function, rule: str, *args):
    """`function(*args)`, an array, computed where the rows of `args` are.

    Args:
      implementation: what `function` consists of.
      function: of arrays.
      rule: the axes of arguments and result, one letter each, as in "mk kn -> mn". The rows are m. Where the result
        has them, they stay sharded on a mesh; all other axes are gathered first.
    """
    if implementation in TRANSPARENT:
        return function(*args)
    by_rows = "m" in rule.split("->")[1]
    sharded = independent(lambda *args: (function(*args),), rule, "m" if by_rows else "")

    @custom_vmap
    def run(*args):
        return sharded(*args)[0]

    @run.def_vmap
    def _(size, is_mapped, first, *rest):
        # One more axis of rows, which needs the other arguments only once.
        if by_rows and rule.startswith("m") and is_mapped == [True] + [False] * len(rest):
            return run(first.reshape(-1, first.shape[-1]), *rest).reshape(*first.shape[:2], -1), True
        axes = [0 if each else None for each in is_mapped]
        return jax.vmap(function, axes, axis_size=size)(first, *rest), True

    return run(*args)
