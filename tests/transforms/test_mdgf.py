"""Mask-decay gradient flow against explicit products, closed forms and its two limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)
TARGETS = jnp.asarray(np.random.default_rng(1).normal(size=(32, 4)), jnp.float32)
START = {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(8, 4)), jnp.float32)}


def loss(params):
    return jnp.mean(jnp.square(jnp.tanh(INPUTS @ params["kernel"]) - TARGETS))


def train(tx, steps):
    """Yields (params before, params after, state before, state after) of every step."""
    params, state = START, tx.init(START)
    for _ in range(steps):
        grads = jax.grad(loss)(sparsejax.apply_masks(params, state.masks))
        updates, after = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        yield params, new, state, after
        params, state = new, after


@pytest.mark.parametrize(
    "decay, floors",
    [
        ("exponential", [1, 1, 1, np.exp(-0.2), np.exp(-0.4), np.exp(-0.6), 0, 0]),
        ("linear", [1, 1, 1, 0.8, 0.6, 0.4, 0, 0]),
    ],
)
def test_the_floor_over_steps(decay, floors):
    """Dense up to step 2 (j = 0), then the decay counted from it, strict from step 6."""
    tx = sparsejax.mdgf(optax.sgd(0.1), begin=2, end=6, decay=decay, beta=0.2, pattern="1:4")
    states = [tx.init(START), *(after for *_, after in train(tx, len(floors) - 1))]
    np.testing.assert_allclose([state.masks["kernel"].min() for state in states], floors, rtol=1e-6)
    np.testing.assert_allclose([state.metrics["mask_floor"] for state in states], floors, rtol=1e-6)


def test_a_linear_floor_stays_at_zero_once_there():
    tx = sparsejax.mdgf(optax.sgd(0.1), end=100, decay="linear", beta=0.4, pattern="1:4")
    assert [float(after.metrics["mask_floor"]) for *_, after in train(tx, 4)][2:] == [0.0, 0.0]


def test_the_default_rates_are_the_released_ones():
    for decay, floor in (("exponential", np.exp(-1e-4 * 5)), ("linear", 1 - 8e-4 * 5)):
        tx = sparsejax.mdgf(optax.sgd(0.1), end=100, decay=decay, pattern="1:4")
        *_, (*_, after) = train(tx, 5)
        np.testing.assert_allclose(after.metrics["mask_floor"], floor, rtol=1e-6)


@pytest.mark.parametrize("grad", ["scaled", "ste"])
def test_a_step_is_that_of_the_explicit_product(grad):
    """Autodiff of W * [M + (1 - M) delta] with M and delta constant, which scales what reaches pruned
    weights; with the straight-through gradient, that of the product itself."""
    tx = sparsejax.mdgf(optax.sgd(0.5), begin=0, end=10, beta=0.3, grad=grad, pattern="1:4")
    for step, (params, new, _, _) in enumerate(train(tx, 6)):
        weights = np.asarray(params["kernel"])
        groups = np.abs(weights).reshape(2, 4, 4)
        mask = (groups == groups.max(axis=1, keepdims=True)).reshape(8, 4)
        factor = jnp.asarray(np.where(mask, 1.0, np.exp(-0.3 * step)), jnp.float32)
        if grad == "scaled":
            grads = jax.grad(lambda w, f=factor: loss({"kernel": w * f}))(params["kernel"])
        else:
            grads = jax.grad(loss)({"kernel": params["kernel"] * factor})["kernel"]
        np.testing.assert_allclose(new["kernel"], params["kernel"] - 0.5 * grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad", ["scaled", "ste"])
def test_before_it_begins_training_is_dense(grad):
    tx, inner = sparsejax.mdgf(optax.adam(0.1), begin=5, end=9, grad=grad, pattern="1:4"), optax.adam(0.1)
    params, state = START, inner.init(START)
    for _, new, _, _ in train(tx, 5):
        updates, state = inner.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(new["kernel"], params["kernel"])


def test_after_its_end_scaled_pruned_weights_rest():
    tx = sparsejax.mdgf(optax.sgd(0.5, momentum=0.9), end=0, pattern="1:4")
    for params, new, state, _ in train(tx, 4):
        pruned = np.asarray(state.masks["kernel"]) == 0
        assert pruned.mean() == 0.75
        np.testing.assert_array_equal(np.asarray(new["kernel"])[pruned], np.asarray(params["kernel"])[pruned])
        assert (np.asarray(new["kernel"]) != np.asarray(params["kernel"]))[~pruned].all()


def test_after_its_end_ste_is_the_straight_through_estimator():
    runs = (
        sparsejax.mdgf(optax.adam(0.1), end=0, grad="ste", pattern="1:4"),
        sparsejax.ste(optax.adam(0.1), pattern="1:4"),
    )
    for (_, mine, _, state), (_, theirs, _, other) in zip(*(train(tx, 6) for tx in runs), strict=True):
        np.testing.assert_array_equal(mine["kernel"], theirs["kernel"])
        np.testing.assert_array_equal(state.masks["kernel"], other.masks["kernel"])


@pytest.mark.parametrize("grad, power", [("scaled", 2), ("ste", 0)])
def test_the_variance_of_pruned_gradients_falls_with_the_square_of_the_floor(grad, power):
    tx = sparsejax.mdgf(optax.sgd(1.0), begin=0, end=9, beta=0.5, grad=grad, pattern="1:4")
    state = tx.init(START)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, START), state, START)
    batches = jax.random.normal(jax.random.key(0), (2000, 8, 4))
    updates = jax.vmap(lambda g: tx.update({"kernel": g}, state, START)[0]["kernel"])(batches)
    pruned = np.asarray(state.masks["kernel"]) < 1
    ratio = np.var(np.asarray(updates)[:, pruned]) / np.var(np.asarray(batches)[:, pruned])
    assert ratio == pytest.approx(np.exp(-0.5 * 2) ** power, rel=1e-5)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"decay": "cosine"}, "unknown decay 'cosine'.*known: exponential, linear"),
        ({"grad": "masked"}, "unknown grad 'masked'.*known: scaled, ste"),
        ({"beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"begin": 11}, "0 <= begin <= end, got begin=11 and end=10"),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        sparsejax.mdgf(optax.sgd(0.1), **{"end": 10, **keywords}, pattern="1:4")
