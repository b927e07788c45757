"""STE and SR-STE against a training loop in numpy, closed forms and limiting cases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import straight_through
from sparsejax.masks import sad

RATE, MOMENTUM = 0.05, 0.9


def brute_mask(weights, n, m):
    """The N largest magnitudes of every M along axis 0, by a stable sort."""
    groups = np.abs(weights).reshape(-1, m, weights.shape[1])
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return mask.reshape(weights.shape)


@functools.cache
def regression():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 16)), rng.normal(size=(64, 6)), rng.normal(size=(16, 6))


def gradient(weights):
    """Of the mean squared error of a linear regression, at these weights."""
    inputs, targets, _ = regression()
    return inputs.T @ (inputs @ weights - targets) / len(inputs)


def train(tx, steps=25):
    """Yields (weights, state) after every step of the regression, with x64 so that numpy can be followed."""
    params = {"kernel": jnp.asarray(regression()[2])}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        masked = np.asarray(sparsejax.apply_masks(params, state.masks)["kernel"])
        updates, state = update({"kernel": jnp.asarray(gradient(masked))}, state, params)
        params = optax.apply_updates(params, updates)
        yield np.asarray(params["kernel"]), state


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (1, 8), (1, 16)])
@pytest.mark.parametrize("decay", [0.0, 0.5, -0.2])
def test_srste_equals_its_equation_in_numpy(n, m, decay):
    """W <- W - lr v, v <- 0.9 v + g + decay (1 - M) W: the term enters the momentum, g reaches all."""
    with jax.enable_x64(True):
        tx = sparsejax.sr_ste(optax.sgd(RATE, momentum=MOMENTUM), decay=decay, pattern=f"{n}:{m}")
        weights, velocity, flips = regression()[2], 0.0, 0
        mask = brute_mask(weights, n, m)
        for found, state in train(tx):
            velocity = MOMENTUM * velocity + gradient(mask * weights) + decay * ~mask * weights
            weights = weights - RATE * velocity
            flips += (mask != brute_mask(weights, n, m)).sum()
            mask = brute_mask(weights, n, m)
            np.testing.assert_allclose(found, weights, rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(state.masks["kernel"], mask)
            assert state.metrics["sad"] == flips
        assert flips > 0


def test_without_decay_it_is_ste_bit_for_bit():
    inner = optax.adam(0.01)
    for (a, first), (b, second) in zip(
        train(sparsejax.ste(inner, pattern="1:4")),
        train(sparsejax.sr_ste(inner, decay=0.0, pattern="1:4")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(first.masks["kernel"], second.masks["kernel"])


@pytest.mark.parametrize("decay", [0.0, 10.0])
def test_n_equal_to_m_is_the_inner_optimizer_bit_for_bit(decay):
    inner = optax.adam(0.01)
    for (a, _), (b, _) in zip(
        train(sparsejax.sr_ste(inner, decay=decay, pattern="4:4")),
        train(sparsejax.dense(inner)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def toy(tx, steps):
    """Two weights of one 1:2 group without a loss gradient."""
    params = {"kernel": jnp.asarray([[0.5], [-0.2]])}
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["kernel"]).ravel()


@pytest.mark.parametrize("decay", [0.5, -0.5])
def test_the_pruned_weight_decays_geometrically_and_the_kept_one_rests(decay):
    kept, pruned = toy(sparsejax.sr_ste(optax.sgd(0.1), decay=decay, pattern="1:2"), 10)
    assert kept == 0.5
    np.testing.assert_allclose(pruned, -0.2 * (1 - 0.1 * decay) ** 10, rtol=1e-6)


def test_the_decoupled_term_bypasses_the_inner_optimizer():
    """Under Adam the coupled term is normalised to steps of the learning rate, the decoupled one is not."""
    decoupled = {"decoupled": True, "learning_rate": lambda step: 0.1 / (1 + step)}
    _, pruned = toy(sparsejax.sr_ste(optax.adam(0.1), decay=0.5, pattern="1:2", **decoupled), 2)
    np.testing.assert_allclose(pruned, -0.2 * (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5), rtol=1e-6)
    _, pruned = toy(sparsejax.sr_ste(optax.adam(0.1), decay=0.5, pattern="1:2"), 1)
    np.testing.assert_allclose(pruned, -0.2 + 0.1, rtol=1e-5)


def test_shrink_adds_decay_times_weight_outside_the_mask_only():
    rng = np.random.default_rng(1)
    grads, params = ({"a": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)} for _ in range(2))
    mask = {"a": jnp.asarray(rng.random((6, 5)) < 0.5)}
    added = straight_through.shrink(grads, params, mask, 0.25)["a"]
    kept = np.asarray(mask["a"])
    np.testing.assert_array_equal(np.asarray(added)[kept], np.asarray(grads["a"])[kept])
    np.testing.assert_allclose(
        np.asarray(added - grads["a"])[~kept], 0.25 * np.asarray(params["a"])[~kept], rtol=1e-5
    )
    assert straight_through.shrink(grads, params, {"a": jnp.asarray(True)}, 0.25)["a"] is grads["a"]


def test_masks_rest_between_refreshes():
    states = [state for _, state in train(sparsejax.ste(optax.sgd(1.0), refresh_every=4, pattern="1:8"), 12)]
    moved = [bool((a.masks["kernel"] != b.masks["kernel"]).any()) for a, b in itertools.pairwise(states)]
    # states[i] is that after step i: masks change with steps 3, 7 and 11, for forward passes 4, 8 and 12
    assert [i + 1 for i, flag in enumerate(moved) if flag] == [3, 7, 11]


def test_more_decay_flips_fewer_masks():
    def flips(decay):
        *_, (_, state) = train(sparsejax.sr_ste(optax.sgd(0.3), decay=decay, pattern="1:8"), 200)
        return float(state.metrics["sad"])

    assert flips(1.0) < flips(0.2) < flips(0.0) < flips(-0.05)


def test_sad_counts_differences_and_sums_soft_ones():
    rng = np.random.default_rng(2)
    old, new = (rng.random((2, 7, 9)) < 0.5 for _ in range(2))
    trees = [{"a": jnp.asarray(x[0]), "b": jnp.asarray(x[1]), "c": jnp.asarray(True)} for x in (old, new)]
    assert jax.jit(sad)(*trees) == (old != new).sum()
    soft = [jax.tree.map(lambda leaf: 0.5 * leaf if leaf.ndim else leaf, tree) for tree in trees]
    np.testing.assert_allclose(sad(*soft), 0.5 * (old != new).sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "n, m, kept", [(2, 4, 0.868), (4, 8, 0.896), (1, 4, 0.617), (2, 8, 0.665), (1, 8, 0.431), (1, 16, 0.285)]
)
def test_share_of_a_gaussian_matrix_that_the_projection_keeps(n, m, kept):
    """Monte Carlo constants: an arbitrary mask would keep n/m."""
    weights = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)), jnp.float32)}
    masked = sparsejax.apply_masks(
        weights, sparsejax.ste(optax.sgd(1.0), pattern=f"{n}:{m}").init(weights).masks
    )
    energy = float(jnp.sum(masked["kernel"] ** 2) / jnp.sum(weights["kernel"] ** 2))
    assert energy == pytest.approx(kept, abs=2e-3)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: sparsejax.sr_ste(optax.sgd(0.1), decoupled=True, pattern="2:4"), "learning_rate, got None"),
        (lambda: sparsejax.ste(optax.sgd(0.1), refresh_every=0, pattern="2:4"), "at least 1 step, got 0"),
        (
            lambda: sparsejax.ste(optax.sgd(0.1), pattern="2:4").init({"d": {"kernel": jnp.ones((6, 8))}}),
            "2:4 needs axis -2 of d/kernel to be divisible by 4",
        ),
    ],
)  # fmt: skip
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
