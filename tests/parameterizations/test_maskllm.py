"""MaskLLM against brute force over the candidates, the Gumbel-max law and the limits of its prior."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from sparsejax.masks import flatten
from sparsejax.parameterizations.maskllm import MaskLLM, candidates, sample
from sparsejax.patterns import NM

KEY = jax.random.key(0)


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree():
    return {
        "conv": {"kernel": weights(2, 3, 8, 6, seed=1)},
        "dense": {"kernel": weights(16, 6, seed=2), "bias": weights(6)},
        "head": {"kernel": weights(6, 3)},
    }


def learner(**keywords):
    return MaskLLM(**{"steps": 10, "exclude": ("head/*",), **keywords})


def start(method, params):
    return jax.jit(method.init)(KEY, params)


def magnitude_mask(weight, n, m):
    """The n largest of every m along the contracted axis, by sorting each group."""
    mask = np.zeros(weight.shape, bool)
    for index in np.ndindex(*weight.shape[:-2], weight.shape[-2] // m, weight.shape[-1]):
        *lead, group, column = index
        rows = group * m + np.argsort(-np.abs(weight[(*lead, slice(group * m, (group + 1) * m), column)]))[:n]
        mask[(*lead, rows, column)] = True
    return mask


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (2, 8), (4, 8), (1, 16)])
def test_candidates_are_all_masks_in_order(n, m):
    table = candidates(n, m)
    assert table.shape == (math.comb(m, n), m)
    assert np.all(table.sum(1) == n) and np.all(table.sum(0) == math.comb(m - 1, n - 1))
    assert {tuple(row) for row in table} == {
        row for row in itertools.product((False, True), repeat=m) if sum(row) == n
    }


def test_candidates_of_2_4_are_in_the_papers_order():
    rows = ["".join(str(int(kept)) for kept in row) for row in candidates(2, 4)]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("1:8", 1, 8)])
def test_a_strong_prior_gives_its_mask(pattern, n, m):
    params = tree()
    method = learner(pattern=pattern, prior_strength=1e4)
    masks = method.masks(*start(method, params))
    for name in ("conv", "dense"):
        expected = magnitude_mask(np.asarray(params[name]["kernel"]), n, m)
        np.testing.assert_array_equal(masks[name]["kernel"], expected)
    assert masks["head"]["kernel"].ndim == 0 and masks["dense"]["bias"].ndim == 0


def test_a_given_prior_and_the_size_of_its_push():
    params = {name: tree()[name] for name in ("dense", "head")}
    given = jax.tree.map(lambda _: jnp.asarray(True), params)
    given["dense"]["kernel"] = jnp.asarray(np.tile([[False], [True], [True], [False]], (4, 6)))
    plain, _ = start(learner(prior=None), params)
    pushed, _ = start(learner(prior=given), params)
    before, after = (np.asarray(x["logits"]["dense"]["kernel"]) for x in (plain, pushed))
    assert before.shape == (4, 6, 6) and abs(before.std() - 0.01) < 2e-3 and abs(before.mean()) < 2e-3
    # 0110 shares one weight with all candidates (the mean) but itself and 1001.
    push = 3.0 * before.std() * np.array([0, 0, -1, 1, 0, 0])
    np.testing.assert_allclose(after - before, np.broadcast_to(push[:, None], before.shape), atol=1e-7)


@pytest.mark.parametrize("tau, hard", [(1e-4, False), (4.0, True)])
def test_samples_follow_the_softmax_of_the_scaled_logits(tau, hard):
    logits, kappa, draws = np.array([0.1, -0.1, 0.0, 0.2, -0.3, 0.05], np.float32), 5.0, 100_000
    spread = jnp.broadcast_to(jnp.asarray(logits)[:, None], (6, draws))
    shares = np.asarray(sample(KEY, spread, kappa, tau, axis=0, hard=hard))
    counts = np.bincount(shares.argmax(0), minlength=6)
    expected = scipy.special.softmax(kappa * logits.astype(np.float64)) * draws
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    assert np.mean(shares.max(0) > 0.999) > 0.99


def test_a_high_temperature_mixes_all_candidates_evenly():
    shares = sample(KEY, weights(6, 1000), 5.0, 1e5, axis=0)
    np.testing.assert_allclose(shares, 1 / 6, atol=1e-3)


def test_hard_samples_have_the_gradient_of_soft_ones():
    logits, values = weights(6, 7), weights(6, 7, seed=3)

    def objective(logits, hard):
        return jnp.sum(values * sample(KEY, logits, 3.0, 0.7, axis=0, hard=hard))

    np.testing.assert_array_equal(*(jax.grad(objective)(logits, hard) for hard in (False, True)))
    drawn = np.asarray(sample(KEY, logits, 3.0, 0.7, axis=0, hard=True))
    assert set(np.unique(drawn)) == {0.0, 1.0}


@pytest.mark.parametrize("pattern, n, m, hard", [("2:4", 2, 4, False), ("2:8", 2, 8, True)])
def test_sampled_masks_keep_n_of_every_m(pattern, n, m, hard):
    params = {"body": {"kernel": jnp.ones((3, 16, 6))}, "head": {"kernel": weights(6, 3)}}
    method = learner(pattern=pattern, hard=hard)
    latent, state = start(method, params)
    found, _, _ = jax.jit(method.materialize)(latent, state, jax.random.key(1))
    mask = np.asarray(found["body"]["kernel"])
    np.testing.assert_allclose(mask.reshape(3, -1, m, 6).sum(-2), n, rtol=1e-5)
    assert mask.min() >= 0 and mask.max() <= 1 + 1e-6
    assert np.all((mask == 0) | (mask == 1)) == hard
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])


def test_evaluation_keeps_the_candidate_of_the_largest_logit():
    params = tree()
    method = learner(prior=None)
    latent, state = start(method, params)
    found, after, penalty = method.materialize(latent, state)
    logits, weight = np.asarray(latent["logits"]["conv"]["kernel"]), np.asarray(params["conv"]["kernel"])
    table = candidates(2, 4)
    for i, j, group, column in np.ndindex(2, 3, 2, 6):
        kept = table[logits[i, j, group, :, column].argmax()]
        rows = slice(4 * group, 4 * group + 4)
        expected = weight[i, j, rows, column] * kept
        np.testing.assert_array_equal(found["conv"]["kernel"][i, j, rows, column], expected)
    assert penalty == 0 and after["count"] == 0
    np.testing.assert_array_equal(found["dense"]["bias"], params["dense"]["bias"])


def test_another_axis_groups_along_it():
    params = {"kernel": weights(3, 8)}
    method = MaskLLM(steps=1, pattern=NM(1, 4, axis=-1), prior_strength=1e4)
    latent, state = start(method, params)
    assert latent["logits"]["kernel"].shape == (3, 2, 4)
    expected = magnitude_mask(np.asarray(params["kernel"]).T, 1, 4).T
    np.testing.assert_array_equal(method.masks(latent, state)["kernel"], expected)


def test_the_reward_is_the_norm_of_what_is_kept_and_fades():
    params = {name: {"kernel": weights(4, size)} for name, size in (("body", 6), ("tail", 6), ("head", 3))}
    method = learner(reward=0.5, steps=4)
    latent, state = start(method, params)
    materialize = jax.jit(method.materialize)
    for step in range(6):
        found, state, penalty = materialize(latent, state, jax.random.key(step))
        kept = [np.square(found[name]["kernel"]).sum() for name in ("body", "tail")]
        np.testing.assert_allclose(penalty, -0.5 * max(0.0, 1 - step / 4) * sum(kept), rtol=1e-5)
    assert state["count"] == 6


def test_the_reward_alone_keeps_the_largest_weights():
    rng = np.random.default_rng(0)
    groups = rng.permuted(np.tile([1.0, -2.0, 3.0, -4.0], (10, 1)), axis=1)
    params = {"kernel": jnp.asarray(groups.T, jnp.float32)}
    method = MaskLLM(steps=100, reward=1.0, prior=None, kappa=(1.0, 1.0), temperature=(1.0, 1.0))
    latent, state = start(method, params)

    def step(latent, key):
        grads = jax.grad(lambda latent: method.materialize(latent, state, key)[2])(latent)
        return jax.tree.map(lambda logit, grad: logit - 0.03 * grad, latent, grads), None

    latent, _ = jax.lax.scan(step, latent, jax.random.split(KEY, 400))
    np.testing.assert_array_equal(method.masks(latent, state)["kernel"], magnitude_mask(groups.T, 2, 4))


def test_scale_and_temperature_anneal_linearly():
    params = {"kernel": jnp.ones((4, 1))}
    method = MaskLLM(steps=4, prior=None)
    latent, state = start(method, params)
    materialize = jax.jit(method.materialize)
    for step in range(6):
        share = min(step / 4, 1.0)
        kappa, tau = 100 + 400 * share, 4 - 3.95 * share
        found, state, _ = materialize(latent, state, KEY)
        noise = jax.random.gumbel(jax.random.split(KEY, 1)[0], (1, 6, 1))
        soft = scipy.special.softmax((kappa * np.asarray(latent["logits"]["kernel"]) + noise) / tau, axis=1)
        expected = candidates(2, 4).T.astype(float) @ soft[0]
        np.testing.assert_allclose(found["kernel"], expected, rtol=1e-3, atol=1e-5)


def test_learned_mask_is_the_best_of_all_candidates():
    # One group per column: ||X W - X (W * m)||^2 for correlated inputs, where magnitude is a bad guide.
    rng = np.random.default_rng(6)
    inputs = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 4))
    weight = rng.standard_normal((4, 6))
    table = candidates(2, 4)
    errors = np.array([np.square(inputs @ (weight - weight * row[:, None])).sum(0) for row in table])
    best = table[errors.argmin(0)].T
    assert not np.array_equal(best, magnitude_mask(weight, 2, 4))

    steps = 400
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    method = MaskLLM(steps=steps, prior=None, reward=0.0)
    latent, state = start(method, params)
    tx = optax.adam(0.01)

    def step(carry, key):
        latent, state, opt_state = carry

        def loss(latent):
            found, after, penalty = method.materialize(latent, state, key)
            difference = jnp.asarray(inputs, jnp.float32) @ (params["kernel"] - found["kernel"])
            return jnp.mean(jnp.square(difference)) + penalty, after

        grads, state = jax.grad(loss, has_aux=True)(latent)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(latent, updates), state, opt_state), None

    carry, _ = jax.lax.scan(step, (latent, state, tx.init(latent)), jax.random.split(KEY, steps))
    np.testing.assert_array_equal(method.masks(carry[0], carry[1])["kernel"], best)


def test_only_logits_are_latent_and_weights_keep_their_dtype():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree())
    method = learner()
    latent, state = jax.eval_shape(method.init, KEY, params)
    assert list(flatten(latent)) == ["logits/conv/kernel", "logits/dense/kernel"]
    for key in (None, KEY):
        found, _, penalty = jax.eval_shape(method.materialize, latent, state, key)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
        assert penalty.dtype == jnp.float32


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"pattern": "unstructured"}, "maskllm needs an N:M pattern such as 2:4, got 'unstructured'"),
        ({"pattern": "8:16"}, "8:16 has 12870 of them; allowed are at most 256"),
        ({"prior": "wanda"}, r"unknown prior of maskllm 'wanda' \(known: magnitude\)"),
        ({"kappa": (0.0, 1.0)}, r"kappa of maskllm must be two positive numbers, first and last, got \(0.0"),
        ({"temperature": (1.0,)}, "temperature of maskllm must be two positive numbers"),
        ({"steps": 0}, "steps of maskllm must be at least 1, got 0"),
        ({"reward": -1.0}, "reward of maskllm must be at least 0, got -1.0"),
    ],
)
def test_bad_keywords(keywords, message):
    with pytest.raises(ValueError, match=message):
        learner(**keywords)


def test_leaves_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="2:4 needs axis -2 of head/kernel to be divisible by 4"):
        learner(exclude=()).init(KEY, tree())
    prior = jax.tree.map(lambda _: jnp.asarray(True), tree())
    prior["dense"]["kernel"] = jnp.ones((4, 4), bool)
    with pytest.raises(ValueError, match=r"the mask of dense/kernel has shape \(4, 4\)"):
        learner(prior=prior).init(KEY, tree())
