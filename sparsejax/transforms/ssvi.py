"""SSVI: Training Bayesian Neural Networks with Sparse Subspace Variational Inference (Li et al. 2024).

Every weight of a variational layer (`sparsejax.nn.VariationalDense`) is q(w) = N(mu, sigma^2), and a fixed
number of them is active; the others are zero, mean and deviation. The objective is

    loss + kl_scale u(t) / N * sum over active weights of KL(q(w) || N(0, prior_sigma^2))

with N training examples and the warm-up u(t) = min(t / kl_warmup, 1). The loss is the model's; this transform
adds the gradient of the rest. Every `update_every` steps, in every sparsified leaf with n active weights and
r = floor(f(t) n), f(t) = drop_fraction / 2 (1 + cos(pi t / update_end)):

    keep = the n - r active weights of largest score;  add = the r others of largest |dL/dmu|.

Scores, all of q(w) in closed form (`sparsejax.bayes`):

    abs      |mu|           snr      |mu| / sigma
    abs_mean E|w|           snr_abs  E|w| / std|w|
    exp_mean E exp|w|       snr_exp  E exp|w| / std exp|w|

snr_abs increases strictly with snr, so the two make the same choice; on other patterns than single weights
they differ in how a unit averages. An added weight starts at mu = 0 and at the mean rho of the active weights
of its leaf.

Masks are tied: `X` and `X_rho` have the same one. A leaf without an `X_rho` is a point: it has no KL, all
scores are |w|, and the method is RigL (Evci et al. 2020). Departures: the step that changes the masks still
updates the survivors (`topology`), and a weight that was just removed may be added again. It then keeps its
posterior.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import bayes, schedules, scores, topology
from sparsejax.masks import Masks, choose, copy_masks, count, flatten, is_sparsified, map_with_name
from sparsejax.schedules import drop_fraction_schedule, updates_due
from sparsejax.target import target_of

SCORES = {
    "abs": lambda mu, sigma: jnp.abs(mu),
    "abs_mean": bayes.abs_mean,
    "exp_mean": bayes.exp_abs_mean,
    "snr": bayes.snr,
    "snr_abs": bayes.snr_abs,
    "snr_exp": bayes.snr_exp_abs,
}
INITIAL = ("random", "score")


class SsviState(NamedTuple):
    """count: steps taken; masks: tied; fired: weights active at least once; metrics: `kl`, the KL of the
    active weights in nats; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    fired: Masks
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def ssvi(
    inner: optax.GradientTransformation,
    *,
    train_size: int,
    score: str = "snr_abs",
    kl_scale: float = 0.01,
    kl_warmup: int = 0,
    prior_sigma: float = 0.005,
    update_every: int = 100,
    drop_fraction: float | optax.Schedule = 0.3,
    update_end: int | None = None,
    initial: str = "random",
    seed: int = 0,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Trains a mean-field posterior in a sparse subspace that moves.

    Args:
      inner: any Optax transformation; it sees masked gradients, those of the KL added.
      train_size: N, the number of training examples.
      score: what is kept, a key of `SCORES`.
      kl_scale: weight of the KL; 1 is the evidence lower bound, 0 none.
      kl_warmup: steps over which that weight rises from 0; the paper takes half of training.
      prior_sigma: standard deviation of the prior.
      update_every: steps between changes of the masks.
      drop_fraction: share of the active weights to replace. A float is annealed by a cosine to 0 at
        `update_end` (and constant without one); a schedule is used as it is.
      update_end: step from which the masks stay fixed; the paper takes 3/4 of training. None never stops.
      initial: "random" masks, or those of the largest "score" of the initial parameters: from a trained dense
        posterior that is pruning after training.
      seed: of random initial masks.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`. At `sparsity`
        0 this is dense mean-field variational inference.
    """
    aim, rank = target_of(**target), choose("score", score, SCORES)
    choose("kind of initial masks", initial, INITIAL)
    if train_size < 1 or kl_scale < 0 or kl_warmup < 0 or not prior_sigma > 0:
        raise ValueError(
            "ssvi needs train_size >= 1, kl_scale >= 0, kl_warmup >= 0 and prior_sigma > 0, got "
            f"{train_size}, {kl_scale}, {kl_warmup} and {prior_sigma}"
        )
    warmup = schedules.linear(0, kl_warmup) if kl_warmup else schedules.constant(1.0)
    fraction, due = (
        drop_fraction_schedule(drop_fraction, update_end),
        updates_due(update_every, end=update_end),
    )

    def init(params):
        bayes.check_patterns(aim.patterns(params), params)
        if initial == "random":
            masks = aim.random_masks(jax.random.key(seed), params)
        else:
            masks = aim.masks(_scores(rank, params))
        masks = bayes.tie_masks(masks)
        metrics = {"kl": jnp.zeros([], jnp.float32)}
        return SsviState(jnp.zeros([], jnp.int32), masks, copy_masks(masks), metrics, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        patterns = aim.patterns(params)
        prior = dict.fromkeys(bayes.gaussian_leaves(params), prior_sigma**-2)
        weight = kl_scale * warmup(state.count) / train_size
        total, kl = bayes.add_kl_gradient(grads, params, state.masks, prior, weight)

        def change(masks):
            def leaf(_, pattern, mask, value, grad):
                return topology.drop_and_grow(pattern, mask, value, grad, fraction(state.count))

            values = _scores(rank, params)
            return bayes.tie_masks(
                topology.change_leaves(leaf, patterns, masks, values, scores.gradient(grads))
            )

        moved = state._replace(metrics={"kl": kl})
        updates, new = topology.evolve(inner, due(state.count), change, total, moved, params, extra_args)
        return _widen_added(updates, params, state.masks, new.masks), new

    return optax.GradientTransformationExtraArgs(init, update)


def _scores(rank, params):
    """The score of every weight by its posterior; |w| where there is none."""
    leaves, gaussian = flatten(params), bayes.gaussian_leaves(params)

    def leaf(name, param):
        return rank(*bayes.posterior(name, leaves)) if name in gaussian else jnp.abs(param)

    return map_with_name(leaf, params)


def _widen_added(updates, params, before, after):
    """Updates after which the rho of every added weight is the mean over those that were active before."""
    scales, old, new = set(bayes.gaussian_leaves(params).values()), flatten(before), flatten(after)

    def leaf(name, update, param):
        if name not in scales or not is_sparsified(new[name]):
            return update
        total = jnp.sum(jnp.where(old[name], param, 0.0), dtype=jnp.float32)
        mean = total / jnp.maximum(count(old[name]), 1)
        return jnp.where(new[name] & ~old[name], mean.astype(param.dtype) - param, update)

    return map_with_name(leaf, updates, params)
