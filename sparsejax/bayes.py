"""Bayes: the pure functions of variational inference over sparse weights.

Everything is elementwise in float32 unless said otherwise, and safe where a posterior is much narrower than
its mean.

Gaussian posteriors q(w) = N(mu, sigma^2), with t = |mu| / sigma and phi, Phi the standard normal density and
distribution function. The folded normal |w| exceeds |mu| on average by sigma d(t), where
d(t) = 2 (phi(t) - t Phi(-t)), so

  E|w| = |mu| + sigma d          var|w| = sigma^2 (1 - 2 t d - d^2)

which, unlike sigma^2 + mu^2 - (E|w|)^2, loses no digits for large t. SSVI (Li et al. 2024) ranks weights by
these.

Hierarchical prior (Turbo-VBI, Xia et al. 2023): a support s in {0, 1}, a precision rho and a weight w each,

  s ~ Bernoulli(pi)
  rho | s ~ Gamma(a, b) if s = 1 (the slab), Gamma(a_, b_) if s = 0 (the spike)
  w | rho ~ N(0, 1 / rho)

with the factorised posterior q(w) q(rho) q(s). Its closed-form updates are `precision_update` and
`support_log_odds`; `chain_messages` is the exact prior of each support under a binary Markov chain, given
what is known of all others. Supports are carried as log-odds ln(P(s=1) / P(s=0)).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import digamma, gammaln, log_ndtr, ndtr
from jax.scipy.stats import norm

from sparsejax.masks import flatten, map_with_name

ROUNDS = 5  # of the two updates of module A, each time
_TINY = 1e-30
# Nodes of the trapezoid rule for the moments of exp|w|, in standard deviations: exact to 0.5 % of a variance.
_NODES = np.arange(-8.0, 8.25, 0.25)


class Gamma(NamedTuple):
    """Gamma(shape, rate) of a precision: mean shape / rate."""

    shape: Any
    rate: Any


class Hierarchy(NamedTuple):
    """The prior of supports, precisions and weights: host numbers, see `chain_messages` for the last three.

    slab, spike: Gamma(a, b) and Gamma(a_, b_).
    p01, p10: of the chain.
    chain: whether the supports are one, or independent with the same share p01 / (p01 + p10) of active ones.
    """

    slab: Gamma
    spike: Gamma
    p01: float
    p10: float
    chain: bool = True

    @property
    def rest(self) -> float:
        """The log-odds ln(p01 / p10) of a support of which nothing is known."""
        return float(np.log(self.p01 / self.p10))


class Beliefs(NamedTuple):
    """What a round of inference finds, arrays of one shape.

    precision: E rho; log_odds: of q(s = 1); prior: the log-odds that module B gives each support.
    """

    precision: Any
    log_odds: Any
    prior: Any


# --- Gaussian posteriors -----------------------------------------------------------------------------


def kl_normal(mu, sigma, precision):
    """KL(N(mu, sigma^2) || N(0, 1 / precision)) of every weight, in nats; sigma must be positive."""
    return 0.5 * (precision * (mu**2 + sigma**2) - 1.0 - jnp.log(precision) - 2.0 * jnp.log(sigma))


def inverse_softplus(value: float) -> float:
    """x with ln(1 + exp(x)) = value, for a positive host float."""
    return float(np.log(np.expm1(value)))


def snr(mu, sigma):
    """|mu| / sigma, the signal-to-noise ratio of w."""
    mu, sigma = _float32(mu, sigma)
    return jnp.abs(mu) / jnp.maximum(sigma, _TINY)


def abs_mean(mu, sigma):
    """E|w|."""
    mu, sigma = _float32(mu, sigma)
    return jnp.abs(mu) + sigma * _excess(snr(mu, sigma))


def snr_abs(mu, sigma):
    """E|w| / std|w|: from 1.3236 at mu = 0 strictly increasing in |mu| / sigma, to which it tends."""
    t = snr(mu, sigma)
    excess = _excess(t)
    return (t + excess) / jnp.sqrt(1.0 - 2.0 * t * excess - excess**2)


def exp_abs_mean(mu, sigma):
    """ln E exp|w|: the logarithm, for the sake of digits; it ranks weights as E exp|w| does."""
    mu, sigma = _float32(mu, sigma)
    t = snr(mu, sigma)
    halves = jnp.logaddexp(log_ndtr(t + sigma), log_ndtr(sigma - t) - 2.0 * jnp.abs(mu))
    return jnp.abs(mu) + 0.5 * sigma**2 + halves


def snr_exp_abs(mu, sigma):
    """E exp|w| / std exp|w|, by quadrature: the closed form cancels in float32 where sigma is small."""
    mu, sigma = _float32(mu, sigma)
    sigma = jnp.maximum(sigma, _TINY)
    t = snr(mu, sigma)
    nodes = jnp.asarray(_NODES, jnp.float32)
    weights = norm.pdf(nodes) / jnp.sum(norm.pdf(nodes))

    def moment(power, centre):
        def add(total, node):
            z, weight = node
            value = jnp.expm1(sigma * jnp.maximum(z, -z - 2.0 * t)) / sigma  # (exp(|w| - |mu|) - 1) / sigma
            return total + weight * (value - centre) ** power, None

        return lax.scan(add, jnp.zeros_like(t), (nodes, weights))[0]

    mean = moment(1, 0.0)
    return (1.0 + sigma * mean) / (sigma * jnp.sqrt(moment(2, mean)))


def _excess(t):
    # beyond 15 it is below the smallest float32, and t Phi(-t) could overflow
    near = jnp.minimum(t, 15.0)
    return 2.0 * (norm.pdf(near) - near * ndtr(-near))


def _float32(mu, sigma):
    return jnp.asarray(mu, jnp.float32), jnp.asarray(sigma, jnp.float32)


# --- the hierarchical prior --------------------------------------------------------------------------


def precision_update(square, support, slab: Gamma, spike: Gamma) -> Gamma:
    """The best q(rho) = Gamma(shape, rate), given the other factors.

    shape = P a + (1 - P) a_ + 1/2 and rate = P b + (1 - P) b_ + E[w^2] / 2, for real weights.

    Args:
      square: E_q[w^2] = mu^2 + sigma^2.
      support: P = q(s = 1), like `square`.
      slab, spike: the prior's Gamma(a, b) and Gamma(a_, b_).
    """

    def mix(active, inactive):
        return support * active + (1.0 - support) * inactive

    return Gamma(mix(slab.shape, spike.shape) + 0.5, mix(slab.rate, spike.rate) + 0.5 * square)


def support_log_odds(precision: Gamma, slab: Gamma, spike: Gamma):
    """What q(rho) says of the support: q(s = 1) = sigmoid(prior log-odds + this).

    ln(b^a / Gamma(a)) + (a - 1) E ln rho - b E rho of the slab, less the same of the spike. It is the message
    to the prior on s, extrinsic: the log-odds of q(s) without those of the prior.
    """
    mean, mean_log = precision.shape / precision.rate, digamma(precision.shape) - jnp.log(precision.rate)

    def expected(prior):
        constant = prior.shape * jnp.log(prior.rate) - gammaln(prior.shape)
        return constant + (prior.shape - 1.0) * mean_log - prior.rate * mean

    return expected(slab) - expected(spike)


def marginal_log_odds(square, slab: Gamma, spike: Gamma):
    """ln p(w | s=1) / p(w | s=0) at w^2 = `square`, with the precision integrated out.

    A starting point for the alternation of the two updates above. Each of them only climbs, and with both
    factors at "active" (or "inactive") a weight stays there whatever it is: started from the marginal, they
    climb the hill that explains the weight.
    """

    def log_density(prior):
        constant = prior.shape * jnp.log(prior.rate) - gammaln(prior.shape) + gammaln(prior.shape + 0.5)
        return constant - (prior.shape + 0.5) * jnp.log(prior.rate + 0.5 * square)

    return log_density(slab) - log_density(spike)


def chain_messages(log_odds, p01: float, p10: float):
    """The prior log-odds of every support given the messages of all *others* along a binary Markov chain.

    p(s_1) is stationary; p(s_i+1 = 1 | s_i = 0) = p01 and p(s_i+1 = 0 | s_i = 1) = p10. Forward and backward
    messages are log-odds; adding both to the own message gives the exact posterior. With p01 = 1 - p10 the
    supports are independent and the answer does not depend on the messages.

    Args:
      log_odds: array (length, ...), chains along the first axis: the messages, from -inf to inf excluded.
      p01, p10: host floats in (0, 1).

    Returns:
      Array like `log_odds`.
    """

    def step(own, stay, enter, leave, remain):
        """ln of (stay e^own + enter) / (leave e^own + remain)."""
        return jnp.logaddexp(np.log(stay) + own, np.log(enter)) - jnp.logaddexp(
            np.log(leave) + own, np.log(remain)
        )

    def forward(before, message):
        return step(before + message, 1 - p10, p01, p10, 1 - p01), before

    def backward(after, message):
        return step(after + message, 1 - p10, p10, p01, 1 - p01), after

    edge = jnp.zeros_like(log_odds[0])
    _, left = lax.scan(forward, edge + np.log(p01 / p10), log_odds)
    _, right = lax.scan(backward, edge, log_odds, reverse=True)
    return left + right


@jax.jit(static_argnames="hierarchy")
def turbo_round(square, prior, hierarchy: Hierarchy) -> Beliefs:
    """q(rho) and q(s) alternated `ROUNDS` times (module A), then the prior of s by messages (module B).

    Args:
      square: E_q[w^2], array (length, ...) with the chains along the first axis.
      prior: log-odds of the prior of s, like `square`: at first `hierarchy.rest`, then that of the last round.
      hierarchy: the prior.
    """
    slab, spike = hierarchy.slab, hierarchy.spike

    def alternate(_, message):
        precision = precision_update(square, jax.nn.sigmoid(prior + message), slab, spike)
        return support_log_odds(precision, slab, spike)

    message = lax.fori_loop(0, ROUNDS, alternate, marginal_log_odds(square, slab, spike))
    if hierarchy.chain:
        prior = chain_messages(message, hierarchy.p01, hierarchy.p10)
    log_odds = prior + message
    precision = precision_update(square, jax.nn.sigmoid(log_odds), slab, spike)
    return Beliefs(precision.shape / precision.rate, log_odds, prior)


def as_chains(leaf):
    """A kernel `(..., inputs, outputs)` as (length, outputs): a chain over the flattened inputs per output."""
    return leaf.reshape(-1, leaf.shape[-1])


def count_runs(active):
    """(number of True, number of runs of True along the first axis): their ratio is the mean run length.

    Args:
      active: bool (length, ...).
    """
    before = jnp.concatenate([jnp.zeros_like(active[:1]), active[:-1]])
    return jnp.sum(active), jnp.sum(active & ~before)


# --- posteriors in a parameter tree ------------------------------------------------------------------

SCALE = "_rho"  # the leaf `kernel_rho` holds softplus^-1(sigma) of the leaf `kernel`


def standard_deviation(rho):
    """sigma = softplus(rho), in float32."""
    return jax.nn.softplus(jnp.asarray(rho, jnp.float32))


def gaussian_leaves(params) -> dict[str, str]:
    """`{name of a mean: name of its rho}` for every leaf `X` that has a sibling `X_rho`, by path name."""
    leaves = flatten(params)
    return {name: name + SCALE for name in leaves if name + SCALE in leaves}


def tie_masks(masks):
    """The masks with that of every mean also on its rho, in a buffer of its own."""
    leaves = flatten(masks)
    owners = {rho: mean for mean, rho in gaussian_leaves(masks).items()}
    return map_with_name(
        lambda name, mask: jnp.array(leaves[owners[name]]) if name in owners else mask, masks
    )


def check_patterns(patterns, params) -> None:
    """A ValueError if a rho is among the parameters to sparsify, naming it: it shares the mask of its mean."""
    for mean, rho in gaussian_leaves(params).items():
        if rho in patterns:
            raise ValueError(f"{rho} shares the mask of {mean} and cannot have its own: exclude '*{SCALE}'")


def posterior(name: str, leaves):
    """(mu, sigma) of the leaf `name` in float32; sigma is zero, a scalar, for a leaf without a rho.

    Args:
      name: path name of the mean.
      leaves: the parameters by path name.
    """
    rho = leaves.get(name + SCALE)
    mean = jnp.asarray(leaves[name], jnp.float32)
    return mean, jnp.float32(0.0) if rho is None else standard_deviation(rho)


def add_kl_gradient(grads, params, masks, precision, scale):
    """The gradients of loss + scale * KL(q || prior), and the KL: what the loss would be with the KL in it.

    The sum is over the weights inside the masks of the leaves that `precision` names. A leaf `X` with a
    sibling `X_rho` is N(mu, softplus(rho)^2); one without is a point, whose KL up to a constant is
    precision w^2 / 2.

    Args:
      grads: gradients of the loss, a tree like the params.
      params: the parameters.
      masks: of the same structure.
      precision: `{path name: precision of the prior N(0, 1 / precision)}`, scalars or like the leaf.
      scale: float scalar, may be traced: 1 / (number of training examples) for a loss that is their mean.

    Returns:
      (gradients, KL); the KL is a float32 scalar.
    """
    kept = flatten(masks)

    if not precision:
        return grads, jnp.zeros([], jnp.float32)

    def divergence(params):
        leaves, total = flatten(params), jnp.float32(0.0)
        for name, strength in precision.items():
            mu, sigma = posterior(name, leaves)
            terms = kl_normal(mu, sigma, strength) if sigma.ndim else 0.5 * strength * mu**2
            total += jnp.sum(jnp.where(kept[name], terms, 0.0))
        return total

    value, slopes = jax.value_and_grad(divergence)(params)
    added = jax.tree.map(lambda grad, slope: grad + (scale * slope).astype(grad.dtype), grads, slopes)
    return added, value
