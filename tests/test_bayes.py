"""The formulas of `sparsejax.bayes` against scipy, numerical integration, Monte Carlo and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

from sparsejax import bayes
from sparsejax.bayes import Gamma, Hierarchy
from sparsejax.selection import top_k_mask

MEANS = np.array([0.0, 0.02, -0.3, 1.0, -2.0, 0.01])
SIGMAS = np.array([0.5, 0.4, 0.3, 0.2, 0.8, 6e-4])
SLAB, SPIKE = Gamma(1.0, 1.0), Gamma(1.0, 0.01)


# --- Gaussian posteriors -----------------------------------------------------------------------------


def test_absolute_moments_are_those_of_the_folded_normal():
    folded = scipy.stats.foldnorm(np.abs(MEANS) / SIGMAS, scale=SIGMAS)
    np.testing.assert_allclose(bayes.abs_mean(MEANS, SIGMAS), folded.mean(), rtol=1e-6)
    np.testing.assert_allclose(bayes.snr_abs(MEANS, SIGMAS), folded.mean() / folded.std(), rtol=1e-5)


def test_scores_match_monte_carlo():
    draws = np.random.default_rng(0).normal(MEANS, SIGMAS, (400_000, len(MEANS)))
    for values, mean, ratio in (
        (np.abs(draws), bayes.abs_mean, bayes.snr_abs),
        (np.exp(np.abs(draws)), lambda mu, sigma: np.exp(bayes.exp_abs_mean(mu, sigma)), bayes.snr_exp_abs),
    ):
        np.testing.assert_allclose(mean(MEANS, SIGMAS), values.mean(0), rtol=0.01)
        np.testing.assert_allclose(ratio(MEANS, SIGMAS), values.mean(0) / values.std(0), rtol=0.02)


@pytest.mark.parametrize("mean, sigma", [*zip(MEANS, SIGMAS, strict=True), (0.1, 1e-6)])
def test_exponential_scores_match_quadrature(mean, sigma):
    def moment(power):
        """E (exp|w| - exp|mean|)^power, where nothing cancels."""

        def integrand(z):
            return (np.exp(abs(mean + sigma * z)) - np.exp(abs(mean))) ** power * scipy.stats.norm.pdf(z)

        kink = np.clip(-mean / sigma, -9, 9)
        return sum(
            scipy.integrate.quad(integrand, *ends, epsabs=1e-9 * sigma**power)[0]
            for ends in ((-9, kink), (kink, 9))
        )

    expected = np.exp(abs(mean)) + moment(1)
    np.testing.assert_allclose(bayes.exp_abs_mean(mean, sigma), np.log(expected), rtol=2e-6, atol=1e-7)
    ratio = expected / np.sqrt(moment(2) - moment(1) ** 2)
    np.testing.assert_allclose(bayes.snr_exp_abs(mean, sigma), ratio, rtol=0.006)


def test_snr_of_the_absolute_value_increases_with_the_ratio_to_which_it_tends():
    ratios = np.linspace(0, 8, 161)
    scores = np.asarray(bayes.snr_abs(ratios * 0.01, np.full_like(ratios, 0.01)))
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(scores[0], np.sqrt(2 / np.pi) / np.sqrt(1 - 2 / np.pi), rtol=1e-6)
    np.testing.assert_allclose(scores[0], 1.32361, atol=1e-5)
    np.testing.assert_allclose(bayes.snr_abs(np.array([1e2, 1e5, 1e9]), 1.0), [1e2, 1e5, 1e9], rtol=1e-6)


def test_snr_of_the_absolute_value_keeps_the_same_weights_as_the_ratio():
    rng = np.random.default_rng(1)
    mu, sigma = rng.normal(size=500), np.exp(rng.normal(size=500))
    keep = [np.asarray(top_k_mask(score(mu, sigma), 150)) for score in (bayes.snr, bayes.snr_abs)]
    np.testing.assert_array_equal(*keep)
    assert (keep[0] != np.asarray(top_k_mask(np.abs(mu), 150))).any()


@pytest.mark.parametrize(
    "score", [bayes.abs_mean, bayes.snr, bayes.snr_abs, bayes.exp_abs_mean, bayes.snr_exp_abs]
)
def test_scores_are_finite_where_sigma_vanishes(score):
    assert np.isfinite(score(np.array([0.0, 1e-3, 2.0]), np.array([0.0, 1e-30, 1e-38]))).all()


@pytest.mark.parametrize("mu, sigma, precision", [(0.3, 0.2, 4.0), (-1.0, 0.05, 0.5), (0.0, 2.0, 1.0)])
def test_kl_of_normals_matches_integration(mu, sigma, precision):
    posterior, prior = scipy.stats.norm(mu, sigma), scipy.stats.norm(0, precision**-0.5)
    ends = mu - 12 * sigma, mu + 12 * sigma
    expected, _ = scipy.integrate.quad(
        lambda w: posterior.pdf(w) * (posterior.logpdf(w) - prior.logpdf(w)), *ends
    )
    np.testing.assert_allclose(bayes.kl_normal(mu, sigma, precision), expected, rtol=1e-5)


def test_softplus_and_its_inverse():
    for sigma in (1e-6, 6e-4, 0.693, 20.0):
        np.testing.assert_allclose(bayes.standard_deviation(bayes.inverse_softplus(sigma)), sigma, rtol=1e-5)


# --- the hierarchical prior --------------------------------------------------------------------------


def elbo(shape, rate, support, square, pi, slab=SLAB, spike=SPIKE):
    """The evidence lower bound of one weight but for the terms of q(w) alone, from the definitions, in
    float64."""
    mean, mean_log = shape / rate, scipy.special.digamma(shape) - np.log(rate)

    def log_gamma_prior(a, b):
        return a * np.log(b) - scipy.special.gammaln(a) + (a - 1) * mean_log - b * mean

    bound = 0.5 * mean_log - 0.5 * mean * square + scipy.stats.gamma(shape, scale=1 / rate).entropy()
    for chance, prior, gamma in ((support, pi, slab), (1 - support, 1 - pi, spike)):
        bound += chance * (log_gamma_prior(*gamma) + np.log(prior) - np.log(chance))
    return bound


def test_updates_reach_the_published_fixed_point():
    support, prior = 0.5, np.log(0.4 / 0.6)
    for _ in range(60):
        precision = bayes.precision_update(0.3, support, SLAB, SPIKE)
        support = jax.nn.sigmoid(prior + bayes.support_log_odds(precision, SLAB, SPIKE))
    np.testing.assert_allclose([*precision, support], [1.5, 1.09557, 0.94502], atol=1e-5)


@pytest.mark.parametrize("slab, spike", [(SLAB, SPIKE), (Gamma(2.0, 0.5), Gamma(1.5, 0.02))])
@pytest.mark.parametrize("square, pi", [(0.3, 0.4), (1.7, 0.1)])
def test_updates_maximise_the_bound_numerically(slab, spike, square, pi):
    support = 0.7
    precision = bayes.precision_update(square, support, slab, spike)
    best = scipy.optimize.minimize(
        lambda x: -elbo(*np.exp(x), support, square, pi, slab, spike),
        [0.0, 0.0],
        tol=1e-12,
        method="Nelder-Mead",
    )
    np.testing.assert_allclose(precision, np.exp(best.x), rtol=1e-4)
    log_odds = np.log(pi / (1 - pi)) + bayes.support_log_odds(precision, slab, spike)
    best = scipy.optimize.minimize_scalar(
        lambda x: -elbo(*precision, scipy.special.expit(x), square, pi, slab, spike), (-3, 3), tol=1e-10
    )
    np.testing.assert_allclose(log_odds, best.x, atol=1e-3)


@pytest.mark.parametrize("square", [1e-4, 0.01, 0.3, 4.0])
@pytest.mark.parametrize("support", [0.01, 0.5, 0.99])
def test_exact_updates_never_lower_the_bound(square, support):
    pi, bounds, precision = 0.4, [], Gamma(1.0, 1.0)
    for _ in range(8):
        precision = [float(value) for value in bayes.precision_update(square, support, SLAB, SPIKE)]
        bounds.append(elbo(*precision, support, square, pi))
        odds = np.log(pi / (1 - pi)) + float(bayes.support_log_odds(Gamma(*precision), SLAB, SPIKE))
        support = np.clip(scipy.special.expit(odds), 1e-12, 1 - 1e-12)
        bounds.append(elbo(*precision, support, square, pi))
    assert (np.diff(bounds) >= -1e-5).all() and bounds[-1] > bounds[0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_marginal_log_odds_integrate_the_precision_out(value):
    def density(prior):
        gamma = scipy.stats.gamma(prior.shape, scale=1 / prior.rate)
        return scipy.integrate.quad(
            lambda rho: gamma.pdf(rho) * scipy.stats.norm.pdf(value, scale=rho**-0.5), 0, gamma.ppf(1 - 1e-12)
        )[0]

    expected = np.log(density(SLAB) / density(SPIKE))
    np.testing.assert_allclose(bayes.marginal_log_odds(value**2, SLAB, SPIKE), expected, rtol=1e-4)


# --- chains ------------------------------------------------------------------------------------------


def brute_force(log_odds, p01, p10):
    """(posterior log-odds, prior log-odds without the own message) by summing over all states."""
    step = np.array([[1 - p01, p01], [p10, 1 - p10]])
    start = np.array([p10, p01]) / (p01 + p10)
    with_own, without = np.zeros((2, len(log_odds))), np.zeros((2, len(log_odds)))
    for states in itertools.product((0, 1), repeat=len(log_odds)):
        chance = start[states[0]] * np.prod([step[pair] for pair in itertools.pairwise(states)])
        weights = np.exp(np.array(log_odds) * states)
        for i, state in enumerate(states):
            with_own[state, i] += chance * weights.prod()
            without[state, i] += chance * np.delete(weights, i).prod()
    return np.log(with_own[1] / with_own[0]), np.log(without[1] / without[0])


@pytest.mark.parametrize("p01, p10", [(0.1, 0.3), (0.02, 0.5), (0.6, 0.1)])
def test_chain_messages_match_the_sum_over_all_states(p01, p10):
    messages = np.random.default_rng(2).normal(0, 2, (5, 3))
    found = np.asarray(jax.jit(lambda x: bayes.chain_messages(x, p01, p10))(messages))
    for column in range(3):
        posterior, prior = brute_force(messages[:, column], p01, p10)
        np.testing.assert_allclose(found[:, column], prior, atol=1e-5)
        np.testing.assert_allclose(found[:, column] + messages[:, column], posterior, atol=1e-5)


def test_the_message_is_extrinsic():
    """The new prior of a support depends on all other weights and not on its own."""
    hierarchy = Hierarchy(SLAB, SPIKE, 0.1, 0.3)
    square = np.full((5, 1), 0.05, np.float32)
    changed = square.copy()
    changed[2] = 2.0
    prior = jnp.full(square.shape, hierarchy.rest)
    before, after = (bayes.turbo_round(values, prior, hierarchy) for values in (square, changed))
    moved = np.abs(np.asarray(after.prior - before.prior)).ravel()
    assert moved[2] < 1e-6 and (moved[[1, 3]] > 0.1).all()
    assert after.log_odds[2] - before.log_odds[2] > 1


def test_a_chain_that_forgets_is_the_independent_prior():
    messages = np.random.default_rng(3).normal(0, 3, (7, 2))
    found = bayes.chain_messages(jnp.asarray(messages, jnp.float32), 0.2, 0.8)
    np.testing.assert_allclose(found, np.log(0.2 / 0.8), atol=1e-5)


def test_overwhelming_messages_do_not_overflow():
    messages = jnp.asarray([1e4, -1e4, 1e4, 0.0, -1e5], jnp.float32)
    found = np.asarray(bayes.chain_messages(messages, 0.1, 0.3))
    # between two certainly active neighbours: 1 -> 1 -> 1 against 1 -> 0 -> 1
    np.testing.assert_allclose(found[1], np.log(0.7 * 0.7 / (0.3 * 0.1)), rtol=1e-3)
    assert np.isfinite(found).all()


def test_a_round_lets_neighbours_decide_a_doubtful_weight():
    square = np.full((9, 2), 1e-5, np.float32)
    square[3:6, 0] = 1.0
    square[4, 0] = square[4, 1] = 0.02  # the same doubtful weight, inside a burst and alone
    hierarchy = Hierarchy(SLAB, Gamma(1.0, 0.001), 0.05, 0.2)
    prior = jnp.full(square.shape, hierarchy.rest)
    for _ in range(3):
        beliefs = bayes.turbo_round(square, prior, hierarchy)
        prior = beliefs.prior
    active = np.asarray(beliefs.log_odds) > 0
    np.testing.assert_array_equal(active[:, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert not active[:, 1].any()
    alone = bayes.turbo_round(square, jnp.full(square.shape, hierarchy.rest), hierarchy._replace(chain=False))
    np.testing.assert_array_equal(alone.log_odds[4, 0], alone.log_odds[4, 1])
    np.testing.assert_array_equal(alone.prior, np.float32(hierarchy.rest))


def test_runs_are_counted_along_the_first_axis():
    flags = np.random.default_rng(4).random((40, 6)) < 0.5
    runs = sum(key for column in flags.T for key, _ in itertools.groupby(column))
    assert tuple(map(int, bayes.count_runs(flags))) == (flags.sum(), runs)


# --- posteriors in a tree ----------------------------------------------------------------------------


def test_posteriors_are_found_by_name():
    params = {
        "a": {"kernel": jnp.ones((2, 2)), "kernel_rho": jnp.zeros((2, 2))},
        "b": {"kernel": jnp.ones(3)},
    }
    assert bayes.gaussian_leaves(params) == {"a/kernel": "a/kernel_rho"}
    masks = {"a": {"kernel": jnp.eye(2, dtype=bool), "kernel_rho": jnp.asarray(True)}, "b": {"kernel": True}}
    tied = bayes.tie_masks(masks)
    np.testing.assert_array_equal(tied["a"]["kernel_rho"], np.eye(2, dtype=bool))
    assert tied["b"]["kernel"] is True
