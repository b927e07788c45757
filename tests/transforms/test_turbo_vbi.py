"""Turbo-VBI: beliefs against an independent float64 version with brute-force chains, the gradient, the
end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import sparsejax
from sparsejax.masks import map_with_name

SLAB, SPIKE = (1.2, 0.9), (1.0, 0.02)
P01, P10 = 0.1, 0.3
SIZE = 50


def make_params(scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {
            "kernel": scale * jax.random.normal(keys[0], (6, 4)),
            "kernel_rho": -2.0 + jax.random.normal(keys[1], (6, 4)),
            "bias": jnp.zeros(4),
        },
        "second": {"kernel": 0.3 * jax.random.normal(keys[2], (2, 3, 1, 5))},
    }


def make_grads(params, step):
    key = jax.random.fold_in(jax.random.key(1), step)
    return map_with_name(
        lambda name, leaf: jax.random.normal(jax.random.fold_in(key, len(name)), leaf.shape), params
    )


def turbo(inner=None, **kwargs):
    inner = optax.sgd(0.1, momentum=0.9) if inner is None else inner
    keywords = {
        "train_size": SIZE,
        "end": 5,
        "update_every": 2,
        "slab": SLAB,
        "spike": SPIKE,
        "p01": P01,
        "p10": P10,
    }
    return sparsejax.turbo_vbi(inner, **{**keywords, **kwargs})


def train(tx, params, steps=8):
    """(params, state) after every step, the initial ones first."""
    state = jax.jit(tx.init)(params)
    update, run = jax.jit(tx.update), [(params, state)]
    for index in range(steps):
        updates, state = update(make_grads(params, index), state, params)
        params = optax.apply_updates(params, updates)
        run.append((params, state))
    return run


# --- an independent version --------------------------------------------------------------------------


def square_of(params, layer):
    mu = np.asarray(params[layer]["kernel"], np.float64)
    rho = params[layer].get("kernel_rho")
    return mu**2 + (0 if rho is None else np.log1p(np.exp(np.asarray(rho, np.float64))) ** 2)


def module_a(square, prior):
    """(message, E rho as a function of the prior) after five rounds of the paper's two updates."""

    def marginal(a, b):
        return b**a * scipy.special.gamma(a + 0.5) / scipy.special.gamma(a) / (b + square / 2) ** (a + 0.5)

    def precision(support):
        return [support * x + (1 - support) * y for x, y in zip(SLAB, SPIKE, strict=True)] + np.array(
            [np.full_like(square, 0.5), square / 2]
        )

    message = np.log(marginal(*SLAB) / marginal(*SPIKE))
    for _ in range(5):
        shape, rate = precision(scipy.special.expit(prior + message))
        log_mean, mean = scipy.special.digamma(shape) - np.log(rate), shape / rate
        weights = [
            b**a / scipy.special.gamma(a) * np.exp((a - 1) * log_mean - b * mean) for a, b in (SLAB, SPIKE)
        ]
        message = np.log(weights[0] / weights[1])

    def mean_precision(prior):
        shape, rate = precision(scipy.special.expit(prior + message))
        return shape / rate

    return message, mean_precision


def module_b(messages):
    """The extrinsic prior log-odds of a chain by summing over all its states."""
    step, start = np.array([[1 - P01, P01], [P10, 1 - P10]]), np.array([P10, P01]) / (P01 + P10)
    total = np.zeros((2, len(messages)))
    for states in itertools.product((0, 1), repeat=len(messages)):
        chance = start[states[0]] * np.prod([step[pair] for pair in itertools.pairwise(states)])
        for i, state in enumerate(states):
            total[state, i] += chance * np.exp(np.delete(messages * states, i).sum())
    return np.log(total[1] / total[0])


def expected_beliefs(history, layer, structure):
    """(precision, log-odds, prior) after a refresh at each of the parameters in `history`."""
    prior = np.full(square_of(history[0], layer).shape, np.log(P01 / P10))
    for params in history:
        message, mean_precision = module_a(square_of(params, layer), prior)
        if structure == "chain":
            columns = message.reshape(-1, message.shape[-1]).T
            prior = np.stack([module_b(column) for column in columns], axis=1).reshape(message.shape)
        log_odds, precision = prior + message, mean_precision(prior)
    return precision, log_odds, prior


@pytest.mark.parametrize("structure", ["chain", "independent"])
def test_beliefs_are_those_of_an_independent_version(structure):
    """Both layers, one of them a convolution without deviations, at the start, at step 2 and at step 4."""
    run = train(turbo(structure=structure), make_params(), 5)
    history = [run[0][0], run[2][0], run[4][0]]
    for layer in ("first", "second"):
        found = [getattr(run[5][1], field)[layer]["kernel"] for field in ("precision", "log_odds", "prior")]
        for ours, theirs in zip(found, expected_beliefs(history, layer, structure), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    assert run[5][1].precision["first"]["kernel_rho"].shape == ()


# --- training ----------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_kl_to_the_expected_precision():
    tx, params = turbo(optax.sgd(1.0), kl_scale=0.5), make_params()
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    precision = np.asarray(state.precision["first"]["kernel"], np.float64)
    mu, rho = (np.asarray(params["first"][name], np.float64) for name in ("kernel", "kernel_rho"))
    sigma = np.log1p(np.exp(rho))
    slope = (precision * sigma - 1 / sigma) / (1 + np.exp(-rho))
    np.testing.assert_allclose(updates["first"]["kernel"], -0.5 / SIZE * precision * mu, rtol=1e-4)
    np.testing.assert_allclose(updates["first"]["kernel_rho"], -0.5 / SIZE * slope, rtol=1e-4, atol=1e-7)
    points = np.asarray(params["second"]["kernel"]) * state.precision["second"]["kernel"]
    np.testing.assert_allclose(updates["second"]["kernel"], -0.5 / SIZE * points, rtol=1e-4)
    kl = 0.5 * (precision * (mu**2 + sigma**2) - 1 - np.log(precision * sigma**2))
    points = 0.5 * np.sum(np.asarray(params["second"]["kernel"]) * points)
    np.testing.assert_allclose(new.metrics["kl"], kl.sum() + points, rtol=1e-5)


def test_nothing_is_removed_before_the_end_and_nothing_changes_after_it():
    run = train(turbo(threshold=0.2), make_params(), 9)
    for _, state in run[:6]:
        assert sparsejax.sparsity(state.masks) == 0 and float(state.metrics["run_length"]) == 0
    params, state = run[5]  # what step 5 sees
    after = run[6][1]
    for layer in ("first", "second"):
        active = np.asarray(after.log_odds[layer]["kernel"]) >= 0
        expected = active & (np.abs(params[layer]["kernel"]) >= 0.2)
        np.testing.assert_array_equal(after.masks[layer]["kernel"], expected)
        assert 0 < expected.sum() < active.sum()
    np.testing.assert_array_equal(after.masks["first"]["kernel_rho"], after.masks["first"]["kernel"])
    for params, state in run[6:]:
        assert all(
            (state.masks[layer]["kernel"] == after.masks[layer]["kernel"]).all() for layer in state.masks
        )
        for name in ("kernel", "kernel_rho"):
            assert not np.asarray(params["first"][name])[~np.asarray(after.masks["first"]["kernel"])].any()


def test_after_the_end_it_is_the_inner_optimizer_under_fixed_masks():
    tx = turbo(optax.sgd(1.0))
    params, state = train(tx, make_params(), 7)[-1]
    grads = make_grads(params, 7)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    kept = np.asarray(state.masks["first"]["kernel"])
    np.testing.assert_array_equal(
        np.asarray(updates["first"]["kernel"])[kept], -np.asarray(grads["first"]["kernel"])[kept]
    )


def test_a_weak_weight_survives_in_a_burst_only():
    """The same weight between strong ones and alone: the chain keeps the first, the independent prior
    neither."""
    mu = np.full((12, 1), 1e-3, np.float32)
    mu[3:8] = 1.5
    mu[5] = mu[10] = 0.1
    params = {"layer": {"kernel": jnp.asarray(mu), "kernel_rho": jnp.full((12, 1), -8.0)}}
    kept = {}
    for structure in ("chain", "independent"):
        tx = turbo(
            optax.sgd(0.0), structure=structure, slab=(1.0, 1.0), spike=(1.0, 0.002), p01=0.05, p10=0.2
        )
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(7):
            _, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        kept[structure] = np.flatnonzero(state.masks["layer"]["kernel"])
        runs = {"chain": 5.0, "independent": 2.0}[structure]
        assert float(state.metrics["run_length"]) == runs
    assert kept["chain"].tolist() == [3, 4, 5, 6, 7] and kept["independent"].tolist() == [3, 4, 6, 7]


def test_a_given_sparsity_keeps_the_largest_log_odds():
    state = train(turbo(sparsity=0.75, allocation="uniform"), make_params(), 6)[-1][1]
    odds = np.asarray(state.log_odds["first"]["kernel"]).ravel()
    assert set(np.flatnonzero(state.masks["first"]["kernel"])) == set(np.argsort(-odds)[:6])


def test_patterns_decide_by_the_majority_of_a_unit():
    """Columns of which 6, 3, 2 and 0 weights of 6 are large; and the better one of each pair."""
    params = make_params()
    large = jnp.arange(6)[:, None] < jnp.array([6, 3, 2, 0])
    params["first"]["kernel"] *= jnp.where(large, 1.0, 1e-3)
    params["first"]["kernel_rho"] = jnp.full((6, 4), -6.0)
    still = {"inner": optax.sgd(0.0), "include": ("first/kernel",), "threshold": 0.0}
    state = train(turbo(pattern="channel", structure="independent", **still), params, 6)[-1][1]
    active = np.asarray(state.log_odds["first"]["kernel"]) >= 0
    assert active.mean(0).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 0])
    mask = np.asarray(state.masks["first"]["kernel"])
    assert mask.all(0).tolist() == [True, True, False, False] == mask.any(0).tolist()
    assert state.masks["second"]["kernel"].ndim == 0
    state = train(turbo(pattern="1:2", **still), params, 6)[-1][1]
    odds = np.asarray(state.log_odds["first"]["kernel"]).reshape(3, 2, 4)
    mask = np.asarray(state.masks["first"]["kernel"]).reshape(3, 2, 4)
    np.testing.assert_array_equal(mask, odds == odds.max(1, keepdims=True))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown structure 'tree' .known: chain, independent."):
        turbo(structure="tree")
    with pytest.raises(ValueError, match="p01 and p10 must be in .0, 1., got p01=0.1 and p10=1.0"):
        turbo(p10=1.0)
    with pytest.raises(
        ValueError, match="slab and spike must be pairs of positive numbers, got .1.0, 0.0. and"
    ):
        turbo(slab=(1.0, 0.0))
    with pytest.raises(ValueError, match="slab and spike must be pairs of positive numbers, got 1.0 and"):
        turbo(slab=1.0)
    with pytest.raises(ValueError, match="first/kernel_rho shares the mask of first/kernel and cannot"):
        turbo(include=("*",)).init(make_params())
    with pytest.raises(ValueError, match="turbo_vbi needs train_size >= 1, .*got 50, 1.0 and 0"):
        turbo(end=0)
    with pytest.raises(ValueError, match="allocation='lamp' is not defined"):
        turbo(sparsity=0.5, allocation="lamp")
