"""The training step of all proximal methods: forward-backward splitting around an Optax optimizer.

    v = theta + (the inner optimizer's update, from dense gradients);   theta <- prox_{gamma_t lambda f}(v)

with the learning rate gamma_t of the step, so that the update returned is prox(params + updates) - params.
The masks tell which groups are nonzero now: zero groups still get gradients and may come back. At step `end`
the k best groups by ||v_g|| / sqrt(d_g) (for `prox_l0` in the metric D, see there) are kept as they are, the others become zero, and from then on the
masks stay fixed and the inner optimizer works under them (fine-tuning).

The prox must be taken in the metric of the step. A step of SGD is one in the Euclidean metric. Adam's,
theta - gamma m / D with D = sqrt(v_hat) + eps, is one in the metric ||x||_D^2 = sum_i D_i x_i^2, and
`metric="adam"` takes the prox in it:

- exactly, for penalties and constraints on single weights or that keep or drop whole groups (`prox_l1`,
  `prox_l0`);
- with D averaged over each group, for those that shrink groups (`group_lasso`, `wgsef`): exact where D is
  constant on every group, a heuristic otherwise, because the step itself uses D weight by weight.

Two things to know when choosing lambda. Momentum beta in the inner SGD multiplies the gradient's stationary
contribution by 1 / (1 - beta) but not the prox, so that lambda acts like (1 - beta) lambda. And the prox is
applied after everything in the inner chain, weight decay included.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax.masks import Masks, choose, count
from sparsejax.patterns import NM, Pattern
from sparsejax.proximal import unit_mean, unit_norms
from sparsejax.selection import global_top_k_masks
from sparsejax.target import target_of
from sparsejax.topology import land_on_zero, masked_update, open_masks

METRICS = ("euclidean", "adam")
WEIGHTS = ("ones", "sizes")
_EPS = 1e-8


class ProximalState(NamedTuple):
    """count: steps taken; masks: the groups that are nonzero now; inner_state: the inner optimizer's;
    metrics: `groups`, how many are nonzero in all sparsified leaves, and `groups_before_end`, the same but
    not updated from step `end` on."""

    count: jnp.ndarray
    masks: Masks
    inner_state: optax.OptState
    metrics: dict[str, jnp.ndarray]


class Leaf(NamedTuple):
    """A sparsified leaf before its prox.

    Attributes:
      value: float32 array, v = params + updates.
      pattern: its groups.
      weights: d_g, broadcasting against the groups.
      metric: D of the value's shape, or 1.0 in the Euclidean metric.
      k: groups to keep, a host int.
    """

    value: Any
    pattern: Pattern
    weights: Any
    metric: Any
    k: int

    def group_metric(self):
        """D averaged over each group."""
        if jnp.ndim(self.metric) == 0:
            return jnp.float32(self.metric)
        return unit_mean(self.metric, self.pattern)


class Aim:
    """Which groups there are and how many each leaf keeps: a `Target`, or numbers of groups given outright.

    Args:
      k: None, or how many groups to keep: of every leaf (an int), or a mapping {path pattern: int} of which
        the most specific match counts. It replaces the target's sparsity.
      target: the keywords of `Target`. `allocation` is "uniform" unless given; "global" means that all leaves
        share one budget of groups, round((1 - sparsity) * groups) or `k`, and compete for it.
    """

    def __init__(self, k: int | Mapping[str, int] | None, target: Mapping):
        target = {"allocation": "uniform", **target}
        self.joint = target["allocation"] == "global"
        if target["allocation"] == "lamp":
            raise ValueError(
                "allocation 'lamp' follows the weights, but a prox needs fixed numbers of groups"
            )
        if k is not None and target.get("sparsity") is not None:
            raise ValueError(f"give either sparsity or k, got sparsity={target['sparsity']:g} and k={k}")
        if k is not None and target["allocation"] not in ("uniform", "global"):
            raise ValueError(
                f"give either allocation or k, got allocation={target['allocation']!r} and k={k}"
            )
        if k is not None or self.joint:
            # the counts are not the target's, which then only says which leaves and which patterns
            self.sparsity = target.get("sparsity")
            target["allocation"] = {"*": 0.0} if k is not None else "uniform"
        self.k, self.target = k, target_of(**target)

    def patterns(self, params) -> dict[str, Pattern]:
        """The pattern of every sparsified leaf."""
        return self.target.patterns(params)

    def counts(self, params) -> dict[str, int]:
        """How many groups every leaf keeps; under one budget, the budget for each.

        Raises:
          ValueError: for a `k` that is not between 1 and the number of groups, naming the leaf.
        """
        patterns, leaves = self.patterns(params), masks_lib.flatten(params)
        units = {name: pattern.units(leaves[name].shape) for name, pattern in patterns.items()}
        if self.joint and units:
            fixed = [name for name, pattern in patterns.items() if isinstance(pattern, NM)]
            if fixed:
                raise ValueError(f"{fixed[0]} cannot share a budget with others: N:M patterns fix their own")
            total = sum(units.values())
            kept = round((1 - self.sparsity) * total) if self.k is None else self.k
            self._check(kept, total, "all leaves together")
            return dict.fromkeys(units, kept)
        if self.k is None:
            return self.target.counts(params)
        rules = self.k if isinstance(self.k, Mapping) else {"*": self.k}
        found = {}
        for name, available in units.items():
            if isinstance(patterns[name], NM):
                raise ValueError(
                    f"{name} has pattern {patterns[name].n}:{patterns[name].m}, which fixes its own number: leave k out"
                )
            rule = masks_lib.best_rule(name, rules)
            if rule is None:
                raise ValueError(f"no rule of k matches {name!r} (rules: {', '.join(rules)})")
            self._check(rules[rule], available, name)
            found[name] = rules[rule]
        for rule in rules:
            if units and rule != "*" and not any(masks_lib.matches(name, (rule,)) for name in units):
                raise ValueError(
                    f"k rule {rule!r} matches no sparsified parameter (known: {', '.join(units)})"
                )
        return found

    @staticmethod
    def _check(k, units: int, name: str) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= units:
            raise ValueError(f"k for {name} must be an integer from 1 to its {units} groups, got {k}")

    def select(self, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
        """Which groups of every leaf are kept: the best by ||v_g|| / sqrt(d_g), as one bool per group."""
        scores = {name: unit_norms(leaf.value, leaf.pattern) for name, leaf in leaves.items()}
        scores = {name: score / jnp.sqrt(leaves[name].weights) for name, score in scores.items()}
        if self.joint and leaves:
            return global_top_k_masks(scores, next(iter(leaves.values())).k)
        return {name: leaf.pattern.select(scores[name], leaf.k) for name, leaf in leaves.items()}


Shrink = Callable[[Mapping[str, Leaf], Any], dict[str, Any]]


def forward_backward(
    inner: optax.GradientTransformation,
    shrink: Shrink,
    *,
    learning_rate: float | optax.Schedule,
    strength: float,
    end: int | None,
    steps: int | None,
    metric: str,
    b2: float,
    weights: str,
    aim: Aim,
    select: Callable[[Mapping[str, Leaf]], dict[str, Any]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transform that takes a prox after each step of `inner`.

    Args:
      inner: any Optax transformation.
      shrink: `(leaves, amount) -> {path: new value}` for all sparsified leaves, `amount` = gamma lambda.
      learning_rate: gamma, a float or the schedule that `inner` follows.
      strength: lambda, at least 0.
      end: the step (counted from 0) at which the best groups are fixed; None for 3/4 of `steps`.
      steps: the number of steps of the training, only read if `end` is None.
      metric: "euclidean", or "adam" for an inner optimizer with second moments `nu`.
      b2: the inner optimizer's decay of second moments, for Adam's bias correction.
      weights: of the groups, d_g: "ones" or "sizes".
      aim: the groups and their numbers.
      select: the groups to keep at `end`, `aim.select` unless given.

    Raises:
      ValueError: one sentence for a value out of range; in `init` for a pattern or k that does not fit.
    """
    end, rate = end_step(end, steps), rate_of(learning_rate)
    check_strength(strength)
    choose("metric", metric, METRICS)
    choose("weights", weights, WEIGHTS)

    def init(params):
        inner_state = inner.init(params)
        if metric == "adam":
            _second_moments(inner_state, params)
        aim.counts(params)  # for its errors
        masks = open_masks(aim.patterns(params), params)
        groups = _groups(aim.patterns(params), masks)
        metrics = {"groups": groups, "groups_before_end": jnp.array(groups)}
        return ProximalState(jnp.zeros([], jnp.int32), masks, inner_state, metrics)

    def update(grads, state, params=None, **extra_args):
        resting = state.count > end
        gates = jax.tree.map(lambda m: m | ~resting if m.ndim else m, state.masks)
        updates, inner_state = masked_update(inner, grads, state.inner_state, params, gates, extra_args)
        precondition = _adam_metric(inner_state, params, state.count, b2) if metric == "adam" else {}
        leaves = _leaves(aim, weights, params, updates, precondition)

        def move(values, chosen):
            """Updates that lead to the values, and the masks of the chosen groups."""
            masks = masks_lib.map_with_name(
                lambda n, p: leaves[n].pattern.expand(chosen[n], p.shape) if n in leaves else True, params
            )
            moved = masks_lib.map_with_name(
                lambda n, u, p: (values[n] - p).astype(p.dtype) if n in leaves else u, updates, params
            )
            return land_on_zero(moved, params, masks), jax.tree.map(jnp.asarray, masks)

        def proximal_step():
            values = shrink(leaves, strength * rate(state.count))
            return move(values, {n: leaf.pattern.reduce(values[n] != 0) for n, leaf in leaves.items()})

        def last_selection():
            return move({n: leaf.value for n, leaf in leaves.items()}, (select or aim.select)(leaves))

        def rest():
            return land_on_zero(updates, params, state.masks), state.masks

        stage = jnp.sign(state.count - end) + 1
        updates, masks = jax.lax.switch(stage, [proximal_step, last_selection, rest])
        groups = _groups(aim.patterns(params), masks)
        before = jnp.where(state.count < end, groups, state.metrics["groups_before_end"])
        metrics = {"groups": groups, "groups_before_end": before}
        return updates, ProximalState(optax.safe_increment(state.count), masks, inner_state, metrics)

    return optax.GradientTransformationExtraArgs(init, update)


def end_step(end: int | None, steps: int | None) -> int:
    """The step at which groups are fixed: `end`, or 3/4 of `steps`; a ValueError without either."""
    if end is None and steps is None:
        raise ValueError(
            "give either end, the step at which groups are fixed, or steps, of which it takes 3/4"
        )
    end = steps * 3 // 4 if end is None else end
    if end < 0:
        raise ValueError(f"end must be a step that is at least 0, got {end}")
    return end


def rate_of(learning_rate: float | optax.Schedule) -> optax.Schedule:
    """The learning rate as a schedule."""
    return learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)


def check_strength(strength) -> None:
    """A ValueError unless the strength of a penalty is a finite number of at least 0."""
    if not (isinstance(strength, (int, float)) and 0 <= strength < float("inf")):
        raise ValueError(f"strength must be a finite number of at least 0, got {strength}")


def _groups(patterns, masks):
    """How many groups are nonzero, as a float32 scalar."""
    masks = masks_lib.flatten(masks)
    return sum((count(p.reduce(masks[n])).astype(jnp.float32) for n, p in patterns.items()), jnp.float32(0))


def _leaves(aim: Aim, weights: str, params, updates, precondition: Mapping) -> dict[str, Leaf]:
    params, updates = masks_lib.flatten(params), masks_lib.flatten(updates)
    counts, leaves = aim.counts(params), {}
    for name, pattern in aim.patterns(params).items():
        value = params[name].astype(jnp.float32) + updates[name].astype(jnp.float32)
        sizes = pattern.unit_sizes(value.shape) if weights == "sizes" else 1.0
        metric = precondition.get(name, 1.0)
        leaves[name] = Leaf(value, pattern, jnp.asarray(sizes, jnp.float32), metric, counts[name])
    return leaves


def _second_moments(inner_state, params):
    found = [nu for _, nu in optax.tree_utils.tree_get_all_with_path(inner_state, "nu")]
    if len(found) != 1 or jax.tree.structure(found[0]) != jax.tree.structure(params):
        raise ValueError(
            "metric='adam' needs an inner optimizer that keeps second moments of all parameters as `nu`, "
            f"such as optax.adam, but {len(found)} such fields were found"
        )
    return found[0]


def _adam_metric(inner_state, params, steps, b2: float) -> dict[str, Any]:
    """D = sqrt(v_hat) + eps of every leaf, by path name, after `steps` + 1 updates."""
    scale = 1 - jnp.float32(b2) ** (steps + 1)
    moments = masks_lib.flatten(_second_moments(inner_state, params))
    return {name: jnp.sqrt(nu.astype(jnp.float32) / scale) + _EPS for name, nu in moments.items()}
