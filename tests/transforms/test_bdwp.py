"""BDWP against training loops in numpy, limiting cases and the paper's cost formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import sparsejax
from sparsejax import flops, nn
from sparsejax.patterns import NM

RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.normal(size=(32, 8)).astype(np.float32), RNG.normal(size=(32, 8)).astype(np.float32)


class Net(linen.Module):
    """Two layers, so that a gradient of the input is needed."""

    @linen.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name="second")(
            jnp.tanh(nn.Dense(8, use_bias=False, name="first")(x))
        )


def train(tx, steps=12):
    """Yields (params, state) after every step; the model reads the masks."""
    params = Net().init(jax.random.key(0), INPUTS)["params"]
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            extra = {"backward_masks": state.backward_masks} if hasattr(state, "backward_masks") else {}
            outputs = Net().apply({"params": params, "masks": state.masks, **extra}, INPUTS)
            return jnp.mean(jnp.square(outputs - TARGETS))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        yield params, state


def brute(weights, axis, n=2, m=4):
    """N largest of every M along an axis of a matrix, by a stable sort."""
    rows = np.abs(np.asarray(weights)) if axis == 1 else np.abs(np.asarray(weights)).T
    groups = rows.reshape(rows.shape[0], -1, m)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(-groups, axis=2, kind="stable")[..., :n], True, axis=2)
    mask = mask.reshape(rows.shape)
    return mask if axis == 1 else mask.T


@pytest.mark.parametrize("variant", ["bdwp", "sdwp", "sdgp"])
def test_training_equals_the_three_products_in_numpy(variant):
    first, second = (
        np.asarray(leaf["kernel"], np.float64)
        for leaf in Net().init(jax.random.key(0), INPUTS)["params"].values()
    )
    for params, state in train(sparsejax.bdwp(optax.sgd(0.5), variant=variant, pattern="2:4")):
        forward = [w * brute(w, 0) if variant == "bdwp" else w for w in (first, second)]
        hidden = np.tanh(INPUTS @ forward[0])
        error = 2 * (hidden @ forward[1] - TARGETS) / TARGETS.size
        if variant == "sdgp":
            back = (error * brute(error, 1)) @ second.T
        else:
            back = error @ (second * brute(second, 1)).T
        first, second = first - 0.5 * INPUTS.T @ (back * (1 - hidden**2)), second - 0.5 * hidden.T @ error
        np.testing.assert_allclose(params["first"]["kernel"], first, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(params["second"]["kernel"], second, rtol=1e-3, atol=1e-5)
        for name in ("first", "second"):
            weights, mask = params[name]["kernel"], state.masks[name]["kernel"]
            np.testing.assert_array_equal(mask, brute(weights, 0) if variant == "bdwp" else np.ones((8, 8)))
            expected = np.arange(4) < 2 if variant == "sdgp" else brute(weights, 1)
            np.testing.assert_array_equal(state.backward_masks[name]["kernel"], expected)


@pytest.mark.parametrize("variant", ["bdwp", "sdwp", "sdgp"])
def test_n_equal_to_m_is_dense_training(variant):
    runs = (
        train(sparsejax.bdwp(optax.adam(0.01), variant=variant, pattern="4:4")),
        train(sparsejax.dense(optax.adam(0.01))),
    )
    for (mine, _), (dense, _) in zip(*runs, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), mine, dense)


def test_with_a_transposable_mask_it_is_the_straight_through_estimator():
    """Weights whose 2:4 mask along the inputs is also their mask along the outputs."""
    square = np.kron(np.ones((2, 2)), [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    weights = {"kernel": jnp.asarray(RNG.normal(size=(8, 8)) * 0.01 + square, jnp.float32)}
    state = sparsejax.bdwp(optax.sgd(0.1), pattern="2:4").init(weights)
    np.testing.assert_array_equal(state.masks["kernel"], square)
    np.testing.assert_array_equal(state.backward_masks["kernel"], square)

    def grads(masks):
        def loss(weights, x):
            return jnp.sum(jnp.sin(nn.Dense(8, use_bias=False).apply({"params": weights, **masks}, x)))

        return jax.grad(loss, argnums=(0, 1))(weights, INPUTS)

    both = grads({"masks": state.masks, "backward_masks": state.backward_masks})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        both,
        grads({"masks": state.masks}),
    )


def test_the_decay_pulls_on_what_the_forward_pass_prunes():
    weights = {"kernel": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)}
    tx = sparsejax.bdwp(optax.sgd(0.1), decay=0.5, pattern="2:4")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)
    expected = -0.1 * 0.5 * np.asarray(weights["kernel"]) * ~brute(weights["kernel"], 0)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "variant, n, m, expected",
    [
        ("bdwp", 2, 4, 2 / 3), ("bdwp", 2, 8, 1 / 2), ("bdwp", 1, 16, (2 / 16 + 1) / 3),
        ("sdwp", 2, 8, 3 / 4), ("sdgp", 2, 8, 3 / 4),
    ],
)  # fmt: skip
def test_cost_of_a_step(variant, n, m, expected):
    """(2 N/M + 1) / 3 where both products with weights are sparse, (N/M + 2) / 3 where one is."""
    params = {"kernel": jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32)}
    state = sparsejax.bdwp(optax.sgd(0.1), variant=variant, pattern=f"{n}:{m}").init(params)
    macs = {"kernel": 256}
    forward, backward = (
        flops.inference_flops(macs, sparsejax.densities(masks))
        for masks in (state.masks, state.backward_masks)
    )
    assert flops.training_flops_ratio("bdwp", 512.0, forward, backward=backward) == pytest.approx(expected)


def test_cost_of_the_straight_through_estimator():
    for method in ("ste", "sr_ste"):
        assert flops.training_flops_ratio(method, 1.0, 2 / 8) == pytest.approx(0.75)
    assert flops.training_flops_ratio("bdwp", 1.0, 2 / 8) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"variant": "sdpp", "pattern": "2:4"}, "unknown variant 'sdpp'.*known: bdwp, sdgp, sdwp"),
        (
            {"variant": "sdwp", "decay": 0.5, "pattern": "2:4"},
            "decay acts on .*variant='sdwp', got decay=0.5",
        ),
        ({"pattern": "channel", "sparsity": 0.5}, "bdwp needs N:M patterns.*got Channel"),
        ({"pattern": NM(2, 4, axis=-1)}, "bdwp needs N:M patterns along the input axis -2"),
        (
            {"pattern": "2:4"},
            r"2:4 needs axis -1 of d/kernel to be divisible by 4, but its shape is \(8, 6\)",
        ),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        sparsejax.bdwp(optax.sgd(0.1), **keywords).init({"d": {"kernel": jnp.ones((8, 6))}})
