"""Pruning: masks from scores in one call, after training or at initialisation.

`prune` keeps the highest scores within a budget, an allocation and a pattern. `at_init` computes the scores
of an untrained network and prunes by them, in one shot or, for SynFlow, over many rounds of shrinking density
with the scores recomputed in between (Tanaka et al. 2020). Train with its masks through
`sparsejax.fixed(inner, masks=...)`.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import jax

from sparsejax import masks as masks_lib
from sparsejax import scores as scores_lib
from sparsejax.target import Target


def prune(
    scores,
    sparsity: float | None,
    *,
    allocation: str | Callable | Mapping = "global",
    pattern="unstructured",
    include: Iterable[str] = masks_lib.INCLUDE,
    exclude: Iterable[str] = (),
) -> masks_lib.Masks:
    """Masks that keep the highest scores; see `sparsejax.target.Target` for the budget they meet exactly.

    Args:
      scores: tree like the parameters, higher is kept; concrete arrays for `lamp` and `global`.
      sparsity: global sparsity in [0, 1). None with an explicit mapping, and allowed with N:M.
      allocation: see `sparsejax.allocation`. `global` compares the units of all leaves by the pattern's
        pooled scores.
      pattern: a `sparsejax.patterns` object or its name in a config.
      include, exclude: which leaves are sparsified, see `sparsejax.masks.sparsifiable`.

    Returns:
      A tree like `scores`: bool masks of the sparsified leaves, the scalar True elsewhere.

    Raises:
      ValueError: for a sparsity outside [0, 1), a leaf that the pattern does not fit, unknown names, rules
        that select nothing, and NaN scores.
    """
    target = Target(
        sparsity=sparsity, allocation=allocation, pattern=pattern, include=include, exclude=exclude
    )
    return target.masks(scores)


def at_init(
    name: str,
    params,
    sparsity: float | None,
    *,
    loss: Callable | None = None,
    forward: Callable | None = None,
    input_shape: tuple[int, ...] | None = None,
    rounds: int | None = None,
    key=None,
    **rule,
) -> masks_lib.Masks:
    """Masks for a network at initialisation.

    Round r of `rounds` keeps the density (1 - sparsity)^(r / rounds) and scores the network that the rounds
    before left; the masks are nested.

    Args:
      name: "random", "magnitude", "snip", "grasp" or "synflow".
      params: the initial parameters.
      sparsity: global sparsity in [0, 1).
      loss: params -> scalar, for snip and grasp (see `sparsejax.scores`).
      forward: (params, x) -> outputs, for synflow.
      input_shape: shape of one input with a batch axis of 1, for synflow.
      rounds: default 100 for synflow, 1 for the others.
      key: JAX PRNG key, for random.
      **rule: `allocation` ("global"), `pattern`, `include`, `exclude`, as in `prune`.

    Returns:
      Masks as `prune` returns them.

    Raises:
      ValueError: for an unknown name or a missing argument, for rounds < 1, and as `prune` does.
    """
    given = {"loss": loss, "forward": forward, "input_shape": input_shape, "key": key}
    function, needed, default_rounds = masks_lib.choose("score at initialisation", name, AT_INIT)
    for argument in needed:
        if given[argument] is None:
            raise ValueError(f"pruning by {name!r} at initialisation needs {argument}=..., got None")
    rounds = default_rounds if rounds is None else rounds
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    target = Target(sparsity=sparsity, **({"allocation": "global"} | rule))
    score = jax.jit(lambda params: function(params, **{argument: given[argument] for argument in needed}))
    density, masks = _density(target, params), None
    for done in range(1, rounds + 1):
        found = score(params if masks is None else masks_lib.apply_masks(params, masks))
        on_the_way = done < rounds and density < 1.0
        share = (density ** (done / rounds) - density) / (1.0 - density) if on_the_way else 0.0
        masks = target.masks(found, target.counts_on_the_way(found, share, masks), masks)
    return masks


# The scores at initialisation: f(params, **arguments), the arguments it needs, and how many rounds it takes.
AT_INIT = {
    "random": (lambda params, key: scores_lib.random(key, params), ("key",), 1),
    "magnitude": (scores_lib.magnitude, (), 1),
    "snip": (scores_lib.snip, ("loss",), 1),
    "grasp": (scores_lib.grasp, ("loss",), 1),
    "synflow": (scores_lib.synflow, ("forward", "input_shape"), 100),
}


def _density(target: Target, params) -> float:
    """The share of weights that the target keeps (an explicit allocation has no sparsity of its own)."""
    if target.sparsity is not None:
        return 1.0 - target.sparsity
    leaves, counts = masks_lib.flatten(params), target.counts(params)
    sizes = {name: math.prod(leaves[name].shape) for name in counts}
    kept = sum(
        count * sizes[name] / target.patterns(params)[name].units(leaves[name].shape)
        for name, count in counts.items()
    )
    return kept / sum(sizes.values())
