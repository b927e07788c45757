"""SSVI: one mask for mean and deviation, a constant count, the KL's gradient, and RigL in the limit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import bayes, models
from sparsejax.masks import apply_masks, flatten, map_with_name
from sparsejax.transforms.ssvi import SCORES

DYNAMIC = {"sparsity": 0.7, "update_every": 2, "update_end": 9, "drop_fraction": 0.87}


def make_params(rho=-3.0, spread=0.5):
    """A Gaussian layer and a plain one."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {
            "kernel": jax.random.normal(keys[0], (8, 12)),
            "kernel_rho": rho + spread * jax.random.normal(keys[1], (8, 12)),
            "bias": jnp.zeros(12),
        },
        "head": {"kernel": jax.random.normal(keys[2], (12, 6))},
    }


def make_grads(params, step):
    key = jax.random.fold_in(jax.random.key(1), step)
    return map_with_name(
        lambda name, leaf: jax.random.normal(jax.random.fold_in(key, len(name)), leaf.shape), params
    )


def train(tx, params, steps=10):
    """(params, state) after every step, the initial ones first."""
    state = tx.init(params)
    update, run = jax.jit(tx.update), [(params, state)]
    for index in range(steps):
        updates, state = update(make_grads(params, index), state, params)
        params = optax.apply_updates(params, updates)
        run.append((params, state))
    return run


def ssvi(inner=None, **kwargs):
    inner = optax.sgd(0.1, momentum=0.9) if inner is None else inner
    return sparsejax.ssvi(inner, **{"train_size": 100, **DYNAMIC, **kwargs})


def softplus(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


@pytest.mark.parametrize("score", SCORES)
def test_the_active_count_is_constant_and_the_mask_is_one(score):
    run = train(ssvi(score=score), make_params())
    counts = {name: int(mask.sum()) for name, mask in flatten(run[0][1].masks).items() if mask.ndim}
    moved = 0
    for (_, before), (params, state) in zip(run, run[1:], strict=False):
        masks, values = flatten(state.masks), flatten(params)
        assert {name: int(mask.sum()) for name, mask in masks.items() if mask.ndim} == counts
        np.testing.assert_array_equal(masks["first/kernel"], masks["first/kernel_rho"])
        for name in counts:
            assert not np.asarray(values[name])[~np.asarray(masks[name])].any()
        moved += int((masks["first/kernel"] & ~before.masks["first"]["kernel"]).sum())
    assert moved > 5 and set(counts) == {"first/kernel", "first/kernel_rho", "head/kernel"}


def test_what_is_removed_and_added_is_what_a_sort_says():
    (_, _), (_, _), (params, state), (_, after) = train(
        ssvi(drop_fraction=lambda step: 0.5), make_params(), 3
    )
    active = np.asarray(state.masks["first"]["kernel"]).ravel()
    mu, rho = (np.asarray(params["first"][name], np.float64).ravel() for name in ("kernel", "kernel_rho"))
    ratio = np.where(active, np.abs(mu) / softplus(rho), -1.0)
    kept = set(np.argsort(-ratio)[: active.sum() - active.sum() // 2])
    steep = np.abs(np.asarray(make_grads(params, 2)["first"]["kernel"])).ravel()
    others = [i for i in np.argsort(-steep) if i not in kept]
    expected = kept | set(others[: active.sum() // 2])
    assert set(np.flatnonzero(after.masks["first"]["kernel"])) == expected


def test_added_weights_start_at_zero_with_the_mean_rho_of_the_active_ones():
    run, added = train(ssvi(), make_params()), 0
    for (past, before), (params, state) in zip(run[1:], run[2:], strict=False):
        old, new = (np.asarray(s.masks["first"]["kernel"]) for s in (before, state))
        fresh = new & ~old
        added += fresh.sum()
        assert not np.asarray(params["first"]["kernel"])[fresh].any()
        mean = np.asarray(past["first"]["kernel_rho"])[old].mean()
        np.testing.assert_allclose(np.asarray(params["first"]["kernel_rho"])[fresh], mean, rtol=1e-5)
    assert added > 5


def test_equivalent_scores_make_the_same_choices():
    runs = {score: train(ssvi(score=score), make_params())[-1] for score in ("snr", "snr_abs", "abs")}
    chex.assert_trees_all_equal(runs["snr"][1].masks, runs["snr_abs"][1].masks)
    assert (runs["abs"][1].masks["first"]["kernel"] != runs["snr"][1].masks["first"]["kernel"]).any()


def test_without_variance_and_kl_it_is_rigl():
    params = make_params(rho=-30.0, spread=0.0)
    point = {"first": {k: v for k, v in params["first"].items() if k != "kernel_rho"}, "head": params["head"]}
    ours = train(ssvi(kl_scale=0.0), params)
    theirs = train(sparsejax.rigl(optax.sgd(0.1, momentum=0.9), **DYNAMIC), point)
    for (found, state), (expected, rigl) in zip(ours, theirs, strict=True):
        for layer in point:
            for name in point[layer]:
                np.testing.assert_array_equal(state.masks[layer][name], rigl.masks[layer][name])
                np.testing.assert_array_equal(found[layer][name], expected[layer][name])


def test_plain_leaves_are_trained_by_rigl():
    params = {"a": {"kernel": make_params()["first"]["kernel"]}, "b": make_params()["head"]}
    ours = train(ssvi(score="snr"), params)[-1]
    theirs = train(sparsejax.rigl(optax.sgd(0.1, momentum=0.9), **DYNAMIC), params)[-1]
    chex.assert_trees_all_equal((ours[0], ours[1].masks), (theirs[0], theirs[1].masks))
    assert float(ours[1].metrics["kl"]) == 0


@pytest.mark.parametrize("step, warmup", [(0, 0.0), (1, 0.25), (5, 1.0)])
def test_the_gradient_and_the_value_of_the_kl(step, warmup):
    scale, prior, size = 0.5, 0.1, 40
    tx = ssvi(optax.sgd(1.0), kl_scale=scale, kl_warmup=4, prior_sigma=prior, train_size=size, sparsity=0.4)
    params, state = make_params(), tx.init(make_params())
    params = apply_masks(params, state.masks)
    state = state._replace(count=jnp.int32(step))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, new = jax.jit(tx.update)(zeros, state, params)
    mask = np.asarray(state.masks["first"]["kernel"])
    mu, rho = (np.asarray(params["first"][name], np.float64) for name in ("kernel", "kernel_rho"))
    sigma, factor = softplus(rho), warmup * scale / size
    kl = np.log(prior / sigma) + (sigma**2 + mu**2) / (2 * prior**2) - 0.5
    np.testing.assert_allclose(new.metrics["kl"], kl[mask].sum(), rtol=1e-5)
    slope = (sigma / prior**2 - 1 / sigma) / (1 + np.exp(-rho))
    for name, expected in (("kernel", mu / prior**2), ("kernel_rho", slope)):
        np.testing.assert_allclose(updates["first"][name], -factor * np.where(mask, expected, 0), rtol=1e-4)
    assert not np.asarray(updates["first"]["bias"]).any() and not np.asarray(updates["head"]["kernel"]).any()


def test_at_sparsity_zero_it_is_dense_variational_inference():
    tx = ssvi(sparsity=0.0, kl_scale=1.0)
    inner, params = optax.sgd(0.1, momentum=0.9), make_params()

    def bound(params):
        mu, sigma = params["first"]["kernel"], jax.nn.softplus(params["first"]["kernel_rho"])
        return jnp.sum(bayes.kl_normal(mu, sigma, 0.005**-2)) / 100

    expected, state = params, inner.init(params)
    for index in range(3):
        grads = jax.tree.map(jnp.add, make_grads(expected, index), jax.grad(bound)(expected))
        updates, state = inner.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    found, final = train(tx, params, 3)[-1]
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sparsejax.sparsity(final.masks) == 0


def test_initial_masks_by_score_prune_a_posterior():
    params = make_params()
    masks = ssvi(initial="score", allocation="uniform", score="snr").init(params).masks
    mu, sigma = (np.asarray(params["first"]["kernel"]), softplus(params["first"]["kernel_rho"]))
    best = np.argsort(-(np.abs(mu) / sigma).ravel())[: round(0.3 * mu.size)]
    assert set(np.flatnonzero(masks["first"]["kernel"])) == set(best)
    np.testing.assert_array_equal(masks["first"]["kernel"], masks["first"]["kernel_rho"])


def test_a_network_learns_with_one_percent_noise_and_no_noise_off_the_masks():
    """Two clusters: a sparse mean-field network separates them, its masks read by its layers."""
    model = models.build("mlp", classes=2, hidden=(16,), linear={"name": "variational", "sigma": 0.01})
    x = jax.random.normal(jax.random.key(0), (128, 6))
    y = (x[:, 0] + x[:, 1] > 0).astype(jnp.int32)
    params = model.init(jax.random.key(1), x)["params"]
    tx = sparsejax.ssvi(
        optax.adam(3e-2), train_size=128, sparsity=0.6, exclude=("head/*",), update_every=10, update_end=60
    )

    @jax.jit
    def step(params, state, key):
        def loss(params):
            variables = {"params": params, "masks": sparsejax.get_masks(state)}
            logits = model.apply(variables, x, rngs={"sample": key})
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for index in range(80):
        params, state = step(params, state, jax.random.key(index))
    outputs = model.apply({"params": params, "masks": sparsejax.get_masks(state)}, x)
    assert np.mean(np.argmax(outputs, -1) == np.asarray(y)) > 0.9
    assert round(sparsejax.sparsity(state.masks), 2) == 0.6


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown score 'sn'.*did you mean 'snr'.*abs_mean"):
        ssvi(score="sn")
    with pytest.raises(ValueError, match="unknown kind of initial masks 'dense'.*random, score"):
        ssvi(initial="dense")
    with pytest.raises(
        ValueError, match="ssvi needs train_size >= 1.*prior_sigma > 0, got 0, 0.01, 0 and 0.005"
    ):
        ssvi(train_size=0)
