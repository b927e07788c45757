"""Allocation: how a global sparsity budget is divided over the sparsified leaves.

Every allocation is a function `f(leaves, sparsity, **options) -> {path: sparsity}`. `leaves` is the flat
dict of `masks.sparsifiable`; the rules on shapes (`uniform`, `uniform_plus`, `erdos_renyi`, `erk`,
`erk_plus`) accept anything with a `.shape`, the rules on values (`lamp`, `global_`) need the arrays of
*scores* (for weights: their magnitudes). All of them spend the same budget: the sparsities, weighted by the
leaves' sizes, average to `sparsity`. `counts` turns them into integers on the host, exact at any size.

With N_l the size of leaf l, S the sparsity, d = 1 - S:
  uniform       S_l = S
  uniform_plus  first convolution dense, classifier at least 20 % dense, one rate for the rest
  erdos_renyi   d_l = eps (n_in + n_out) / (n_in n_out), the last two axes  (Mocanu et al. 2018)
  erk           d_l = eps (sum of shape / product of shape)^power           (Evci et al. 2020)
  erk_plus      erk with a dense classifier                                 (Liu et al. 2022)
  lamp          global top-k of layer-adaptive magnitudes                   (Lee et al. 2021)
  global        global top-k of the scores

Which leaf is first or last cannot be read from the order of a params tree, because JAX sorts dicts by name.
`first` and `last` take shell patterns on paths. By default the first convolution is the 4-D leaf, and the
classifier the 2-D leaf (no embedding), found as follows: the leaves named `stem` (or `head`, `classifier`,
`logits`) if there are some, otherwise the least nested ones; of these the first (or last) in natural order,
where `Dense_10` comes after `Dense_9`.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp

from sparsejax import masks, selection

FIRST = ("*stem/*",)
LAST = ("head/*", "*/head/*", "*_head/*", "*classifier/*", "*logits/*")


# --- rules on shapes ---------------------------------------------------------------------------------


def uniform(leaves, sparsity: float) -> dict[str, float]:
    """The same sparsity for every leaf."""
    return dict.fromkeys(leaves, masks.check_sparsity(sparsity))


def uniform_plus(
    leaves, sparsity: float, *, first: str | None = None, last: str | None = None, last_density: float = 0.2
) -> dict[str, float]:
    """Uniform, except that the first convolution is dense and the classifier keeps at least 20 %.

    The other leaves share the one rate that makes the whole budget exact. A model without convolutions (no
    4-D leaf) has no dense first leaf; with `first` any leaf can be chosen.

    Args:
      leaves: {path: anything with a shape}.
      sparsity: global sparsity in [0, 1).
      first, last: shell patterns on paths (see the module docstring for the default).
      last_density: the least density of the last leaf.

    Raises:
      ValueError: if these exceptions need more than the budget.
    """
    fixed = dict.fromkeys(_first(leaves, first), 1.0)
    rate = _common_density("uniform_plus", leaves, masks.check_sparsity(sparsity), fixed)
    tail = [name for name in last_leaves(leaves, last) if name not in fixed]
    if rate < last_density and tail:
        fixed |= dict.fromkeys(tail, last_density)
        rate = _common_density("uniform_plus", leaves, sparsity, fixed)
    return {name: 1.0 - fixed.get(name, rate) for name in leaves}


def erdos_renyi(leaves, sparsity: float) -> dict[str, float]:
    """Densities in proportion to (n_in + n_out) / (n_in n_out) of the last two axes (Mocanu et al. 2018)."""
    raw = {name: sum(leaf.shape[-2:]) / math.prod(leaf.shape[-2:]) for name, leaf in leaves.items()}
    return _proportional("erdos_renyi", leaves, masks.check_sparsity(sparsity), raw)


def erk(leaves, sparsity: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi-Kernel: densities in proportion to (sum of shape / product of shape)^power.

    All kernel axes count (Evci et al. 2020). Leaves whose share would exceed 1 become dense and the rest is
    shared again, until every density is at most 1.
    """
    return _proportional("erk", leaves, masks.check_sparsity(sparsity), _kernel_ratio(leaves, power))


def erk_plus(leaves, sparsity: float, *, power: float = 1.0, last: str | None = None) -> dict[str, float]:
    """ERK whose classifier stays dense (Liu et al. 2022, The Unreasonable Effectiveness of Random Pruning).

    Without a 2-D leaf there is no classifier, and it is plain ERK.

    Raises:
      ValueError: if the dense classifier alone needs the whole budget.
    """
    ratio = _kernel_ratio(leaves, power)
    return _proportional(
        "erk_plus", leaves, masks.check_sparsity(sparsity), ratio, dense=last_leaves(leaves, last)
    )


# --- rules on values ---------------------------------------------------------------------------------


def global_(leaves, sparsity: float) -> dict[str, float]:
    """The densities that one top-k over all scores leaves in every leaf (some may lose every weight).

    Args:
      leaves: {path: array of scores}; larger is kept, so pass magnitudes, not signed weights.
    """
    _require_values("global", leaves)
    kept = round((1.0 - masks.check_sparsity(sparsity)) * sum(_sizes(leaves).values()))
    chosen = selection.global_top_k_masks({name: jnp.asarray(leaf) for name, leaf in leaves.items()}, kept)
    return {name: 1.0 - int(jnp.sum(mask, dtype=jnp.uint32)) / mask.size for name, mask in chosen.items()}


def lamp(leaves, sparsity: float) -> dict[str, float]:
    """Layer-adaptive magnitudes: the densities of a global top-k of `lamp_scores` (Lee et al. 2021).

    The largest weight of every leaf scores 1, so no leaf is emptied while at least one weight per leaf is
    kept. Within a leaf the order is that of the magnitudes.

    Args:
      leaves: {path: array of weights or of their magnitudes} (the rule has no meaning for other scores).
    """
    _require_values("lamp", leaves)
    return global_(lamp_scores(dict(leaves)), sparsity)


def lamp_scores(weights):
    """LAMP scores of a tree of weights: score(u) = w_u^2 / sum_{v: w_v^2 >= w_u^2} w_v^2 within each leaf.

    Of equal magnitudes the one at the lowest position ranks higher and only the higher ranks enter its sum,
    so that the largest weight of every leaf scores exactly 1 and equal weights are still pruned one by one.
    Zeros score 0 (pruned weights enter no sum), also all of a leaf of zeros. Scaling a leaf changes no score.

    The cumulative sum runs over the magnitudes in order, so a sort per leaf is inherent here. Safe to jit.

    Args:
      weights: tree of arrays.

    Returns:
      The tree with float32 scores in [0, 1].
    """
    return jax.tree.map(_lamp_leaf, weights)


def _lamp_leaf(weight):
    magnitude = jnp.abs(jnp.ravel(weight).astype(jnp.float32))
    largest = jnp.max(magnitude, initial=0.0)
    # relative to the largest, the squares neither overflow nor (all) underflow
    squares = jnp.square(magnitude / jnp.where(largest == 0, 1.0, largest))
    order = jnp.argsort(-squares, stable=True)
    ranked = squares[order]
    scores = jnp.where(ranked > 0, ranked / jnp.cumsum(ranked), 0.0)
    # a parallel prefix sum need not be monotone in its last bit; the scores must be
    scores = jax.lax.cummin(scores)
    return jnp.zeros_like(scores).at[order].set(scores, unique_indices=True).reshape(weight.shape)


# --- explicit mappings, dispatch ---------------------------------------------------------------------


def explicit(leaves, mapping: Mapping[str, float]) -> dict[str, float]:
    """Sparsities from a mapping {shell pattern on paths: sparsity}; the most specific match wins.

    Raises:
      ValueError: for a leaf that no pattern matches, a pattern that matches no leaf, or a sparsity
        outside [0, 1).
    """
    for rule, value in mapping.items():
        masks.check_sparsity(value, f"sparsity of {rule!r}")
        if not any(masks.matches(name, (rule,)) for name in leaves):
            raise ValueError(
                f"allocation pattern {rule!r} matches no sparsified parameter (known: {', '.join(leaves)})"
            )
    result = {}
    for name in leaves:
        rule = masks.best_rule(name, mapping)
        if rule is None:
            raise ValueError(f"no allocation pattern matches {name!r} (patterns: {', '.join(mapping)})")
        result[name] = float(mapping[rule])
    return result


ALLOCATIONS = {
    "uniform": uniform,
    "uniform_plus": uniform_plus,
    "erdos_renyi": erdos_renyi,
    "erk": erk,
    "erk_plus": erk_plus,
    "lamp": lamp,
    "global": global_,
}


def allocate(leaves, sparsity: float | None, allocation: str | Callable | Mapping) -> dict[str, float]:
    """The sparsity of every leaf by a named rule, a callable, or an explicit mapping.

    Args:
      leaves: {path: array, or anything with a shape}; scores for `lamp` and `global`.
      sparsity: global sparsity in [0, 1); an explicit mapping does not use it, and may leave it None.
      allocation: a name of `ALLOCATIONS`, `f(leaves, sparsity) -> {path: sparsity}`, or {pattern: sparsity}.
    """
    if sparsity is not None or not isinstance(allocation, Mapping):
        masks.check_sparsity(sparsity)
    if isinstance(allocation, Mapping):
        return explicit(leaves, allocation)
    if callable(allocation):
        result = {name: float(value) for name, value in allocation(leaves, sparsity).items()}
        if set(result) != set(leaves) or not all(0.0 <= value <= 1.0 for value in result.values()):
            raise ValueError(
                f"an allocation must return a sparsity in [0, 1] for each of {sorted(leaves)}, got {result}"
            )
        return result
    return masks.choose("allocation", allocation, ALLOCATIONS)(leaves, sparsity)


def counts(
    leaves, sparsities: Mapping[str, float], sparsity: float | None, units: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many units every leaf keeps: integers by largest remainders, computed on the host.

    A unit is what a pattern keeps or drops as a whole (one weight, one block, one channel). The kept weights
    total round((1 - sparsity) N) exactly where a unit is one weight, otherwise to within half of the largest
    unit. No leaf keeps more than it has, and none with a positive density keeps nothing unless the budget is
    smaller than one unit per such leaf.

    Args:
      leaves: {path: anything with a shape}.
      sparsities: {path: sparsity}, as `allocate` returns them.
      sparsity: the global sparsity in [0, 1), or None to round every leaf on its own (explicit mappings).
      units: {path: number of units}; by default every weight is a unit.

    Raises:
      ValueError: if the sparsities do not spend the budget that `sparsity` sets.
    """
    sizes = _sizes(leaves)
    units = dict(sizes if units is None else units)
    quotas = {name: (1.0 - sparsities[name]) * units[name] for name in leaves}
    if sparsity is None:
        return {name: min(units[name], max(round(quotas[name]), int(quotas[name] > 0))) for name in leaves}
    weights = {name: Fraction(sizes[name], units[name]) for name in leaves}
    budget = round((1.0 - masks.check_sparsity(sparsity)) * sum(sizes.values()))
    spent = sum(quotas[name] * float(weights[name]) for name in leaves)
    if abs(spent - budget) > sum(weights.values()):
        raise ValueError(
            f"the allocation keeps {spent:.0f} of {sum(sizes.values())} weights, but sparsity={sparsity} "
            f"keeps {budget}"
        )
    return _apportion(quotas, units, weights, budget)


# --- internals ---------------------------------------------------------------------------------------


def _apportion(quotas, units, weights, budget: int) -> dict[str, int]:
    """Integers near the quotas whose weighted total is nearest to the budget (largest remainders first)."""
    least = {name: int(quota > 0) for name, quota in quotas.items()}
    if sum(least[name] * weights[name] for name in least) > budget:
        least = dict.fromkeys(least, 0)
    kept = {name: min(units[name], max(math.floor(quotas[name]), least[name])) for name in quotas}
    left = budget - sum(kept[name] * weights[name] for name in kept)
    progress = True
    while progress:
        progress = False
        for name in sorted(kept, key=lambda name: kept[name] - quotas[name]):
            if quotas[name] > 0 and kept[name] < units[name] and 2 * left >= weights[name]:
                kept[name], left, progress = kept[name] + 1, left - weights[name], True
        # raising small leaves to their one unit may have overspent: the largest surplus gives back
        for name in sorted(kept, key=lambda name: quotas[name] - kept[name]):
            if kept[name] > least[name] and -2 * left > weights[name]:
                kept[name], left, progress = kept[name] - 1, left + weights[name], True
    return kept


def _proportional(rule: str, leaves, sparsity: float, raw, dense=()) -> dict[str, float]:
    """Sparsities whose densities are eps * raw, at most 1, with `dense` leaves at 1 from the start."""
    sizes, dense = _sizes(leaves), set(dense)
    budget = (1.0 - sparsity) * sum(sizes.values())
    while True:
        free = [name for name in leaves if name not in dense]
        left = budget - sum(sizes[name] for name in dense)
        if not free or sparsity == 0:
            break
        if left <= 0:
            raise ValueError(
                f"allocation {rule!r} keeps {', '.join(sorted(dense))} dense, which leaves nothing for the "
                f"other leaves at sparsity={sparsity}"
            )
        scale = left / sum(raw[name] * sizes[name] for name in free)
        largest = max(raw[name] for name in free)
        if scale * largest <= 1.0:
            return {name: 0.0 if name in dense else 1.0 - scale * raw[name] for name in leaves}
        dense |= {name for name in free if raw[name] == largest}
    if left < -0.5:
        raise ValueError(
            f"allocation {rule!r} keeps every leaf dense ({', '.join(sorted(dense))}), which "
            f"sparsity={sparsity} does not allow"
        )
    return dict.fromkeys(leaves, 0.0)


def _common_density(rule: str, leaves, sparsity: float, fixed) -> float:
    """The one density of the leaves that are not in `fixed` (of {path: density}) that spends the budget."""
    sizes = _sizes(leaves)
    total = sum(sizes.values())
    left = (1.0 - sparsity) * total - sum(fixed[name] * sizes[name] for name in fixed)
    free = total - sum(sizes[name] for name in fixed)
    if (free and left <= 0) or (not free and abs(left) > 0.5):
        kept = ", ".join(f"{name} at density {value:g}" for name, value in fixed.items())
        raise ValueError(f"allocation {rule!r} keeps {kept}, which sparsity={sparsity} does not allow")
    return left / free if free else 1.0


def _kernel_ratio(leaves, power: float) -> dict[str, float]:
    return {name: (sum(leaf.shape) / math.prod(leaf.shape)) ** power for name, leaf in leaves.items()}


def _first(leaves, rule: str | None) -> list[str]:
    if rule is not None:
        return _chosen("first", leaves, rule)
    return _preferred([name for name, leaf in leaves.items() if len(leaf.shape) == 4], FIRST)[:1]


def last_leaves(leaves, rule: str | None = None) -> list[str]:
    """The classifier's paths: the leaves that `rule` matches, or the one found as the module docstring
    says."""
    if rule is not None:
        return _chosen("last", leaves, rule)
    matrices = [name for name, leaf in leaves.items() if len(leaf.shape) == 2]
    return _preferred([name for name in matrices if not name.endswith("embedding")], LAST)[-1:]


def _preferred(names, rules) -> list[str]:
    """The names that match the rules, or else the least nested ones, in natural order."""
    depth = min((name.count("/") for name in names), default=0)
    found = [name for name in names if masks.matches(name, rules)]
    return sorted(found or [name for name in names if name.count("/") == depth], key=_natural)


def _chosen(option: str, leaves, rule: str) -> list[str]:
    found = [name for name in leaves if fnmatch.fnmatchcase(name, rule)]
    if not found:
        raise ValueError(f"{option}={rule!r} matches no sparsified parameter (known: {', '.join(leaves)})")
    return found


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _sizes(leaves) -> dict[str, int]:
    return {name: math.prod(leaf.shape) for name, leaf in leaves.items()}


def _require_values(rule: str, leaves) -> None:
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer) or not hasattr(leaf, "__array__"):
            raise ValueError(
                f"allocation {rule!r} depends on the values of the scores: {name} must be a concrete array, "
                f"got {type(leaf).__name__} (outside jax.jit, with arrays instead of shapes)"
            )
