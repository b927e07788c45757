"""SLoRB against numpy's least squares and the two products that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax.models import MLP
from sparsejax.parameterizations import Parameterized, build

BLOCK = 4


def params():
    kernel = jax.random.normal(jax.random.key(0), (16, 6))
    return {"dense": {"kernel": kernel, "bias": jnp.ones(6)}, "head": {"kernel": jnp.ones((6, 3))}}


def branch(pattern="2:4", **kw):
    return build("slorb", block=BLOCK, pattern=pattern, exclude=["head/*"], **kw)


def pruned(kernel, n=2, m=4):
    """The weights that N:M pruning by magnitude removes, zero elsewhere, by ranks."""
    groups = np.asarray(kernel, np.float64).reshape(-1, m, kernel.shape[-1])
    gone = np.abs(groups).argsort(1).argsort(1) < m - n
    return (groups * gone).reshape(kernel.shape)


def indicator(inputs, block):
    """P, (inputs, inputs / block)."""
    return np.kron(np.eye(inputs // block), np.ones((block, 1)))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_it_starts_as_the_least_squares_fit_of_what_was_pruned(n, m):
    kernel, p = params()["dense"]["kernel"], indicator(16, BLOCK)
    latent, state = branch(f"{n}:{m}").init(jax.random.key(0), params())
    fit, *_ = np.linalg.lstsq(p, pruned(kernel, n, m), rcond=None)
    found = np.asarray(latent["branch"]["dense"]["kernel"]["blocks"], np.float64)
    np.testing.assert_allclose(found, fit, rtol=1e-5, atol=1e-7)
    assert state == {} and latent["branch"].keys() == {"dense"}
    kept = np.asarray(kernel) - pruned(kernel, n, m)
    boosted = np.linalg.norm(kernel - (kept + p @ found))
    assert boosted < np.linalg.norm(kernel - kept)
    np.testing.assert_allclose(
        boosted**2, np.sum(pruned(kernel, n, m) ** 2) - BLOCK * np.sum(found**2), rtol=1e-5
    )


def test_it_adds_nothing_where_the_means_of_the_blocks_are_zero():
    kernel = jnp.asarray([[3.0], [2.0], [1.0], [-1.0]])
    latent, _ = build("slorb", block=4).init(jax.random.key(0), {"kernel": kernel})
    np.testing.assert_array_equal(latent["branch"]["kernel"]["blocks"], 0.0)


def test_the_layer_is_masked_product_plus_low_rank_product():
    made = branch()
    latent, state = made.init(jax.random.key(0), params())
    latent["branch"]["dense"]["kernel"]["blocks"] = jax.random.normal(jax.random.key(5), (4, 6))
    mask = sparsejax.patterns.NM(2, 4).mask(jnp.abs(latent["params"]["dense"]["kernel"]))
    masks = sparsejax.masks.dense_masks(latent)
    masks["params"]["dense"]["kernel"] = mask
    weights, _, penalty = made.materialize(sparsejax.apply_masks(latent, masks), state)
    x = np.random.default_rng(0).normal(size=(7, 16))
    sparse = np.where(mask, latent["params"]["dense"]["kernel"], 0.0)
    expected = x @ sparse + (x @ indicator(16, BLOCK)) @ np.asarray(
        latent["branch"]["dense"]["kernel"]["blocks"]
    )
    np.testing.assert_allclose(x @ np.asarray(weights["dense"]["kernel"]), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights["head"]["kernel"], 1.0)
    assert penalty == 0.0 and "branch/dense/kernel/blocks" not in sparsejax.masks.sparsifiable(latent)


def test_convolutions_fit_every_tap():
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 8, 3))
    latent, _ = build("slorb", block=4).init(jax.random.key(0), {"kernel": kernel})
    for tap in np.ndindex(2, 2):
        fit, *_ = np.linalg.lstsq(indicator(8, 4), pruned(kernel[tap]), rcond=None)
        np.testing.assert_allclose(latent["branch"]["kernel"]["blocks"][tap], fit, rtol=1e-5, atol=1e-7)


def test_it_serves_a_model():
    model = Parameterized(MLP(classes=3, hidden=(8,)), build("slorb", block=4, exclude=("head/*",)))
    x = jax.random.normal(jax.random.key(2), (5, 16))
    variables = jax.jit(lambda key: model.init(key, x))(jax.random.key(0))
    plain = model.revert(variables)
    np.testing.assert_allclose(model.apply(variables, x), model.model.apply(plain, x), rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="the blocks of SLoRB hold at least one input, got block=0"):
        build("slorb", block=0)
    with pytest.raises(
        ValueError, match="blocks of 5 needs axis -2 of dense/kernel to be divisible by 5, but"
    ):
        build("slorb", block=5, exclude=("head/*",)).init(jax.random.key(0), params())
    with pytest.raises(ValueError, match="unknown pattern '2-4'"):
        build("slorb", pattern="2-4")
    with pytest.raises(ValueError, match="SLoRB needs an N:M pattern such as 2:4, got 'channel'"):
        build("slorb", pattern="channel")
