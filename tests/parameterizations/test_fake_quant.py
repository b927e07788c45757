"""Fake quantisation against its formula, brute force over the levels, and its limit of many bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import apply_masks
from sparsejax.parameterizations.fake_quant import FakeQuant, quantise
from sparsejax.patterns import NM

KEY = jax.random.key(0)


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree():
    return {"dense": {"kernel": weights(8, 5), "bias": weights(5)}, "head": {"kernel": weights(5, 3)}}


def materialized(method, params):
    return method.materialize(*method.init(KEY, params))[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(8, 5), (3, 3, 4, 2)])
def test_every_weight_takes_the_nearest_level_of_its_channel(bits, shape):
    weight = weights(*shape)
    found = np.asarray(materialized(FakeQuant(bits=bits), {"kernel": weight})["kernel"], np.float64)
    for channel in range(shape[-1]):
        exact = np.asarray(weight[..., channel], np.float64).ravel()
        steps = 2 ** (bits - 1) - 1
        levels = np.linspace(-1, 1, 2 * steps + 1) * np.abs(exact).max()
        nearest = levels[np.abs(exact[:, None] - levels).argmin(1)]
        np.testing.assert_allclose(found[..., channel].ravel(), nearest, rtol=1e-5, atol=1e-6)


def test_an_example_by_hand():
    # Three bits have the levels -3 ... 3, here of step 0.5.
    weight = jnp.array([[1.5], [-0.7], [0.2], [0.3], [0.0]])
    np.testing.assert_allclose(quantise(weight, 3), [[1.5], [-0.5], [0.0], [0.5], [0.0]], atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_and_2_4_masks_survive(bits):
    params = tree()
    mask = NM(2, 4).mask(jnp.abs(params["dense"]["kernel"]))
    masks = {"dense": {"kernel": mask, "bias": True}, "head": {"kernel": True}}
    latent, state = FakeQuant(bits=bits).init(KEY, params)
    found = FakeQuant(bits=bits).materialize(apply_masks(latent, {"params": masks}), state, KEY)[0]
    kernel = np.asarray(found["dense"]["kernel"])
    assert np.all(kernel[~np.asarray(mask)] == 0)
    assert np.all((kernel.reshape(2, 4, 5) != 0).sum(1) <= 2)
    empty = materialized(FakeQuant(bits=bits), {"kernel": jnp.zeros((4, 2))})["kernel"]
    np.testing.assert_array_equal(empty, 0)


def test_channels_too_small_for_a_scale_become_zero():
    found = quantise(jnp.array([[1e-37, 1.0], [0, 0], [5e-38, -1.0]]), 8)
    np.testing.assert_array_equal(found, [[0, 1], [0, 0], [0, -1]])


def test_many_bits_are_the_weights_themselves():
    params = tree()
    kernel = np.asarray(params["dense"]["kernel"])
    errors = [
        np.abs(materialized(FakeQuant(bits=bits), params)["dense"]["kernel"] - kernel).max()
        for bits in (4, 8, 12, 16)
    ]
    bound = np.abs(kernel).max() / (2 ** (np.array([4, 8, 12, 16]) - 1) - 1) / 2
    assert np.all(errors <= bound * 1.01) and np.all(np.array(errors) > bound / 4)


def test_gradients_pass_straight_through():
    params, method = tree(), FakeQuant(bits=3)
    latent, state = method.init(KEY, params)

    def objective(latent):
        found = method.materialize(latent, state, KEY)[0]
        return jnp.sum(jnp.sin(found["dense"]["kernel"])) + jnp.sum(jnp.square(found["dense"]["bias"]))

    grads = jax.grad(objective)(latent)["params"]["dense"]
    np.testing.assert_allclose(grads["kernel"], np.cos(quantise(params["dense"]["kernel"], 3)), rtol=1e-6)
    np.testing.assert_allclose(grads["bias"], 2 * params["dense"]["bias"], rtol=1e-6)


def test_what_is_quantised_and_what_is_reported():
    params = tree()
    method = FakeQuant(bits=4, exclude="head/*")
    latent, state = method.init(KEY, params)
    found, after, penalty = method.materialize(latent, state, KEY)
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])
    np.testing.assert_array_equal(found["dense"]["bias"], params["dense"]["bias"])
    assert len(np.unique(found["dense"]["kernel"][:, 0])) < len(np.unique(params["dense"]["kernel"][:, 0]))
    assert (state, after, penalty) == ({}, {}, 0) and method.masks(latent, state) is None


def test_bfloat16_weights_stay_bfloat16():
    weight = weights(16, 4).astype(jnp.bfloat16)
    found = materialized(FakeQuant(bits=4), {"kernel": weight})["kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, quantise(weight.astype(jnp.float32), 4).astype(jnp.bfloat16))


@pytest.mark.parametrize("bits", [1, 17, 8.0])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits of fake_quant must be an integer from 2 to 16, got {bits}"):
        FakeQuant(bits=bits)


def test_rules_that_match_nothing_are_named():
    with pytest.raises(ValueError, match="exclude rule 'tail/\\*' matches no parameter"):
        FakeQuant(exclude=("tail/*",)).init(KEY, tree())
