"""Turbo-VBI: Structured Bayesian Compression for Deep Neural Networks (Xia, Tsang, Lau; 2023).

Every weight has a support s, a precision rho and a value w with the hierarchical prior of `sparsejax.bayes`;
the prior on s may be structured. While t < `end` the objective is

    loss + kl_scale / N * sum of KL(q(w) || N(0, 1 / E rho)),     q(w) = N(mu, sigma^2)

where the loss is the model's, and this transform adds the gradient of the rest. Every `update_every` steps, E
rho is found anew from E w^2 = mu^2 + sigma^2 in two modules that exchange messages:

    A  q(rho) = Gamma(P a + (1 - P) a_ + 1/2, P b + (1 - P) b_ + E w^2 / 2) and P = q(s = 1) in turn, which
       leaves the message l = log-odds(P) - log-odds(pi) of the likelihood, without the prior pi that went in
    B  pi <- the prior of each s given the messages of all others: a binary Markov chain along the inputs of
       every output, exactly, by forward and backward messages; "independent" leaves pi as it is

At `end` a weight is removed where P < 1/2 or |mu| < `threshold`, and training goes on with fixed masks and
without the KL. How sparse that is is an outcome; with a `sparsity` the weights of largest log-odds P stay
instead, exactly so many.

A leaf without a sibling `X_rho` has sigma = 0: q(w) is a point, and this is the EM algorithm of the prior.

Departures: A starts from P with rho integrated out (`bayes.marginal_log_odds`), because its factors otherwise
keep each other where they were first. The updates are those of real weights (the authors' released demo is for
complex ones: +1 and E|w|^2 in place of +1/2 and E w^2 / 2).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import bayes, topology
from sparsejax.bayes import Beliefs, Gamma, Hierarchy
from sparsejax.masks import Masks, choose, flatten, map_with_name
from sparsejax.patterns import NM
from sparsejax.schedules import updates_due
from sparsejax.target import target_of

STRUCTURES = ("chain", "independent")


class TurboVbiState(NamedTuple):
    """count: steps taken; masks: all True before `end`; precision: E rho; log_odds: of P; prior: the log-odds
    of pi (all three float32 like the params, scalars for leaves that are not sparsified); metrics: `kl` of
    the weights in nats, `active`: the mean of P, `run_length`: of the final masks along the chains, 0 before
    `end`; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    precision: optax.Updates
    log_odds: optax.Updates
    prior: optax.Updates
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def turbo_vbi(
    inner: optax.GradientTransformation,
    *,
    train_size: int,
    end: int,
    structure: str = "chain",
    p01: float = 0.05,
    p10: float = 0.2,
    slab: Sequence[float] = (1.0, 1.0),
    spike: Sequence[float] = (1.0, 0.01),
    kl_scale: float = 1.0,
    update_every: int = 100,
    threshold: float = 0.01,
    sparsity: float | None = None,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Infers which weights are active, removes the others at `end` and trains on.

    Args:
      inner: any Optax transformation; it sees masked gradients, those of the KL added.
      train_size: N, the number of training examples.
      end: the step at which weights are removed; training should go on beyond it.
      structure: "chain" or "independent", see above.
      p01, p10: the chain's probabilities of becoming active and of becoming inactive, in (0, 1): runs of
        active weights have a mean length of 1 / p10, a share p01 / (p01 + p10) is active. "independent" has
        that share.
      slab, spike: (a, b) and (a_, b_); their ratio b / a is the variance that active and inactive weights
        should have. The defaults suit weights of unit size, those of a network need smaller b.
      kl_scale: weight of the KL; 1 is the evidence lower bound.
      update_every: steps between updates of q(rho), q(s) and pi.
      threshold: least |mu| of a weight that stays.
      sparsity: None for an outcome, or what it shall be, in [0, 1); at 0 this is the inner optimizer.
      **target: `allocation` ("global", of a given sparsity), `pattern`, `include`, `exclude`, see `Target`.
    """
    free = sparsity is None and "allocation" not in target
    aim = target_of(**{"sparsity": sparsity, "allocation": {"*": 0.0} if free else "global", **target})
    chain = choose("structure", structure, STRUCTURES) == "chain"
    if not (0 < p01 < 1 and 0 < p10 < 1):
        raise ValueError(f"p01 and p10 must be in (0, 1), got p01={p01} and p10={p10}")
    if any(np.shape(gamma) != (2,) or min(gamma) <= 0 for gamma in (slab, spike)):
        raise ValueError(f"slab and spike must be pairs of positive numbers, got {slab!r} and {spike!r}")
    if aim.allocation == "lamp":
        raise ValueError("turbo_vbi ranks weights by log-odds, for which allocation='lamp' is not defined")
    if train_size < 1 or kl_scale < 0 or end < 1:
        raise ValueError(
            "turbo_vbi needs train_size >= 1, kl_scale >= 0 and end >= 1, got "
            f"{train_size}, {kl_scale} and {end}"
        )
    hierarchy = Hierarchy(Gamma(*slab), Gamma(*spike), p01, p10, chain)
    due = updates_due(update_every, end=end, force_end=True)

    def init(params):
        patterns = aim.patterns(params)
        bayes.check_patterns(patterns, params)
        start = map_with_name(lambda _, leaf: jnp.full(leaf.shape, hierarchy.rest, jnp.float32), params)
        masks = bayes.tie_masks(topology.open_masks(patterns, params))
        metrics = {name: jnp.zeros([], jnp.float32) for name in ("active", "kl", "run_length")}
        beliefs = _infer(hierarchy, patterns, params, start)
        return TurboVbiState(jnp.zeros([], jnp.int32), masks, *beliefs, metrics, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        patterns = aim.patterns(params)
        beliefs = jax.lax.cond(
            due(state.count),
            lambda held: _infer(hierarchy, patterns, params, held.prior),
            lambda held: held,
            Beliefs(state.precision, state.log_odds, state.prior),
        )
        precision = {name: flatten(beliefs.precision)[name] for name in patterns}
        weight = jnp.where(state.count < end, kl_scale / train_size, 0.0)
        grads, kl = bayes.add_kl_gradient(grads, params, state.masks, precision, weight)

        def change(masks):
            if patterns and not free:
                values = jax.tree.map(jax.nn.log_sigmoid, beliefs.log_odds)
                masks = aim.masks(values, aim.counts_on_the_way(values, 0.0))
            else:
                masks = topology.change_leaves(
                    partial(_outcome, threshold), patterns, masks, beliefs.log_odds, params
                )
            return bayes.tie_masks(masks)

        metrics = state.metrics | {"active": _active(patterns, beliefs.log_odds), "kl": kl}
        state = state._replace(**beliefs._asdict(), metrics=metrics)
        ending = state.count == end
        updates, new = topology.evolve(inner, ending, change, grads, state, params, extra_args)
        runs = jnp.where(ending, _run_length(patterns, new.masks), metrics["run_length"])
        return updates, new._replace(metrics=metrics | {"run_length": runs})

    return optax.GradientTransformationExtraArgs(init, update)


def _infer(hierarchy, patterns, params, prior) -> Beliefs:
    """Modules A and B for every sparsified leaf, in chains along its inputs; scalar zeros for the others."""
    leaves, priors = flatten(params), flatten(prior)
    found = {}
    for name in patterns:
        mu, sigma = bayes.posterior(name, leaves)
        chains = [bayes.as_chains(leaf) for leaf in (mu**2 + sigma**2, priors[name])]
        found[name] = [belief.reshape(mu.shape) for belief in bayes.turbo_round(*chains, hierarchy)]

    def pick(index):
        return map_with_name(
            lambda name, _: found[name][index] if name in found else jnp.zeros([], jnp.float32), params
        )

    return Beliefs(*(pick(index) for index in range(len(Beliefs._fields))))


def _outcome(threshold, _, pattern, mask, log_odds, mean):
    """The units at least half of whose weights are active by posterior and size; n of every m under N:M."""
    if isinstance(pattern, NM):
        return pattern.expand(pattern.select(pattern.pool(log_odds)), mask.shape)
    active = (log_odds >= 0) & (jnp.abs(mean) >= threshold)
    return pattern.expand(pattern.pool(active.astype(jnp.float32)) >= 0.5, mask.shape)


def _active(patterns, log_odds):
    """The mean posterior probability of being active over all sparsified weights; 0 without any."""
    leaves = [flatten(log_odds)[name] for name in patterns]
    total = sum(jnp.sum(jax.nn.sigmoid(leaf)) for leaf in leaves)
    return jnp.float32(total / max(1, sum(leaf.size for leaf in leaves)))


def _run_length(patterns, masks):
    """The mean length of the runs of kept weights along all chains; 0 without any."""
    runs = [bayes.count_runs(bayes.as_chains(flatten(masks)[name])) for name in patterns]
    kept, starts = (sum(part) for part in zip(*runs, strict=True)) if runs else (0, 0)
    return jnp.float32(kept) / jnp.maximum(starts, 1)
