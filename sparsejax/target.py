"""Target: how sparse, divided how, in which pattern, on which leaves. Every method aims at one.

The five keywords `sparsity`, `allocation`, `pattern`, `include` and `exclude` mean the same in every
transform and in `sparsejax.prune`; this is where they become exact counts and masks.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import allocation as allocations
from sparsejax import masks as masks_lib
from sparsejax import patterns as patterns_lib
from sparsejax import scores as scores_lib
from sparsejax.patterns import NM, Pattern
from sparsejax.selection import global_top_k_masks

_BY_VALUE = {"global": lambda scores: scores, "lamp": allocations.lamp_scores}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a sparse model should look like.

    The kept weights total round((1 - sparsity) N) of the N weights of the sparsified leaves: exactly for
    `Unstructured`, to within half of the largest unit where all units of a leaf are equally large (channels,
    blocks that divide the shape). Ragged blocks and unequal groups count as their leaf's average unit, so
    that the sparsity reached may be further off; `sparsejax.sparsity` tells it. An N:M leaf keeps n of every
    m whatever the allocation says. At `sparsity=0` every leaf is dense.

    Args:
      sparsity: fraction of zeros in [0, 1). An explicit allocation replaces it (it becomes None); with N:M
        alone it must be 1 - N/M, or None.
      allocation: a name of `sparsejax.allocation.ALLOCATIONS`, a mapping {path pattern: sparsity}, or a
        function `f(leaves, sparsity) -> {path: sparsity}`.
      pattern: a pattern, its name in a config (see `patterns.parse`), or a mapping {path pattern: pattern}
        whose most specific match counts.
      include, exclude: shell patterns on path names, see `masks.sparsifiable`.
    """

    sparsity: float | None = None
    allocation: str | Callable | Mapping[str, float] = "erk"
    pattern: str | Pattern | Mapping[str, Any] = "unstructured"
    include: Iterable[str] = masks_lib.INCLUDE
    exclude: Iterable[str] = ()

    def __post_init__(self):
        rules = self.pattern if isinstance(self.pattern, Mapping) else {"*": self.pattern}
        rules = {rule: patterns_lib.parse(pattern) for rule, pattern in rules.items()}
        object.__setattr__(self, "pattern", rules)
        nm = {pattern.sparsity for pattern in rules.values() if isinstance(pattern, NM)}
        if isinstance(self.allocation, Mapping):
            object.__setattr__(self, "sparsity", None)
        sparsity, only_nm = self.sparsity, all(isinstance(pattern, NM) for pattern in rules.values())
        if isinstance(self.allocation, str):
            masks_lib.choose("allocation", self.allocation, allocations.ALLOCATIONS)
        if sparsity is None and only_nm and len(nm) == 1:
            object.__setattr__(self, "sparsity", nm.pop())
        elif sparsity is not None:
            masks_lib.check_sparsity(sparsity)
            if only_nm and sparsity and all(abs(sparsity - fixed) > 1e-9 for fixed in nm):
                fixed = ", ".join(f"{p.n}:{p.m} has sparsity {p.sparsity:g}" for p in rules.values())
                raise ValueError(f"{fixed}, got sparsity={sparsity:g}")
        elif not isinstance(self.allocation, Mapping):
            raise ValueError("sparsity must be in [0, 1), got None")

    @property
    def by_value(self) -> bool:
        """Whether the allocation depends on the scores rather than on shapes alone."""
        return self.allocation in _BY_VALUE if isinstance(self.allocation, str) else False

    def patterns(self, params) -> dict[str, Pattern]:
        """The pattern of every sparsified leaf by path name; none at sparsity 0.

        Raises:
          ValueError: if the rules select nothing, or a pattern does not fit a leaf (naming it).
        """
        chosen = {}
        for name, leaf in masks_lib.sparsifiable(params, self.include, self.exclude).items():
            rule = masks_lib.best_rule(name, self.pattern)
            if rule is None:
                raise ValueError(f"no pattern rule matches {name!r} (rules: {', '.join(self.pattern)})")
            self.pattern[rule].check(name, leaf.shape)
            chosen[name] = self.pattern[rule]
        for rule in self.pattern:
            if rule != "*" and not any(masks_lib.matches(name, (rule,)) for name in chosen):
                raise ValueError(
                    f"pattern rule {rule!r} matches no sparsified parameter (known: {', '.join(chosen)})"
                )
        return {} if self.sparsity == 0 else chosen

    def counts(self, scores) -> dict[str, int]:
        """How many units every sparsified leaf keeps, as host ints.

        Args:
          scores: tree like the params. Only shapes matter, unless the allocation is by value.
        """
        leaves, patterns = masks_lib.flatten(scores), self.patterns(scores)
        units = {name: pattern.units(leaves[name].shape) for name, pattern in patterns.items()}
        free = {name: leaves[name] for name, pattern in patterns.items() if not isinstance(pattern, NM)}
        counts = dict(units)
        if free and self.by_value:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in free.values()):
                raise ValueError(
                    f"allocation {self.allocation!r} depends on the values of the scores: call it outside jax.jit"
                )
            counts |= {name: int(count) for name, count in self._competed(scores, 0.0, None).items()}
        elif free:
            sparsities = allocations.allocate(free, self.sparsity, self.allocation)
            budget = None if isinstance(self.allocation, Mapping) else self.sparsity
            counts |= allocations.counts(free, sparsities, budget, {name: units[name] for name in free})
        return {name: pattern.kept(leaves[name].shape, counts[name]) for name, pattern in patterns.items()}

    def counts_on_the_way(self, scores, dense_share, within=None) -> dict[str, Any]:
        """Counts between the final ones (`dense_share` 0) and all units (1); jit-safe.

        Args:
          scores: tree like the params.
          dense_share: scalar in [0, 1], may be traced: (s_final - s) / s_final at sparsity s.
          within: optional masks; an allocation by value only counts weights inside them.
        """
        leaves, patterns = masks_lib.flatten(scores), self.patterns(scores)
        units = {name: pattern.units(leaves[name].shape) for name, pattern in patterns.items()}
        if self.by_value:
            final = {name: p.kept(leaves[name].shape, 0) for name, p in patterns.items() if isinstance(p, NM)}
            competed = self._competed(scores, dense_share, within)
        else:
            final, competed = self.counts(scores), {}
        return {name: _blend(count, units[name], dense_share) for name, count in final.items()} | competed

    def _competed(self, scores, dense_share, within) -> dict[str, Any]:
        """Counts by one top-k over all leaves that compete for the budget (all but the N:M ones); jit-safe.

        Every weight enters with the score of its unit, so that units of different sizes share one budget of
        weights.
        """
        leaves, patterns = masks_lib.flatten(scores), self.patterns(scores)
        inside = {} if within is None else masks_lib.flatten(within)
        patterns = {name: pattern for name, pattern in patterns.items() if not isinstance(pattern, NM)}
        values = _BY_VALUE[self.allocation]({name: leaves[name] for name in patterns})
        values = {name: p.expand(p.pool(values[name]), leaves[name].shape) for name, p in patterns.items()}
        total = sum(leaf.size for leaf in values.values())
        k = _blend(round((1 - self.sparsity) * total), total, dense_share)
        candidates = {name: inside[name] for name in values} if inside else None
        kept = global_top_k_masks(values, k, candidates=candidates) if values else {}
        return {name: _in_units(mask, patterns[name]) for name, mask in kept.items()}

    def masks(self, scores, counts=None, within=None) -> masks_lib.Masks:
        """The allowed masks with the highest scores.

        Args:
          scores: tree like the params; higher is kept.
          counts: units to keep per leaf (ints or traced); default the target's own.
          within: optional masks like the scores; units outside them come last.

        Returns:
          Tree like `scores`: bool masks, and the scalar True for leaves that are not sparsified.
        """
        patterns = self.patterns(scores)
        counts = self.counts(scores) if counts is None else counts
        inside = {} if within is None else masks_lib.flatten(within)

        def leaf_mask(name, score):
            if name not in patterns:
                return jnp.asarray(True)
            pattern = patterns[name]
            candidates = pattern.reduce(inside[name]) if name in inside else None
            try:
                units = pattern.select(pattern.pool(score), counts[name], candidates=candidates)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            return pattern.expand(units, score.shape)

        return masks_lib.map_with_name(leaf_mask, scores)

    def random_masks(self, key, params) -> masks_lib.Masks:
        """Masks drawn uniformly at random, with the target's counts.

        An allocation by value takes its counts from the magnitudes of `params`.
        """
        patterns, leaves = self.patterns(params), masks_lib.flatten(params)
        counts = self.counts(scores_lib.magnitude(params) if self.by_value else params)
        drawn = random_units(key, patterns, leaves)
        chosen = {
            name: pattern.expand(pattern.select(drawn[name], counts[name]), leaves[name].shape)
            for name, pattern in patterns.items()
        }
        return masks_lib.map_with_name(lambda name, _: chosen.get(name, jnp.asarray(True)), params)


def target_of(**keywords) -> Target:
    """`Target(**keywords)`, with one sentence for an unknown keyword."""
    known = [field.name for field in dataclasses.fields(Target)]
    for keyword in keywords:
        masks_lib.choose("keyword (besides the method's own)", keyword, known)
    return Target(**keywords)


def random_units(key, patterns: Mapping[str, Pattern], leaves) -> dict[str, Any]:
    """Independent uniform scores for every unit (not every weight: small units must not be disfavoured)."""
    grids = {
        name: jax.eval_shape(pattern.pool, jax.ShapeDtypeStruct(leaves[name].shape, jnp.float32))
        for name, pattern in patterns.items()
    }
    return scores_lib.random(key, grids)


def _blend(final: int, full: int, share):
    """round(final + share * (full - final)), exact at both ends also where float32 is not."""
    extra = jnp.round(jnp.float32(full - final) * share)
    return jnp.where(share >= 1, jnp.uint32(full), jnp.uint32(final) + extra.astype(jnp.uint32))


def _in_units(mask, pattern):
    """How many units the kept weights of a (traced) mask amount to, to the nearest."""
    weights, units = masks_lib.count(mask), pattern.units(mask.shape)
    return weights if mask.size == units else jnp.round(weights * (units / mask.size)).astype(jnp.uint32)
