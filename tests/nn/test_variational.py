"""Mean-field layers: the plain layer in the limit, the right noise, and none of it outside the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax import flops, models, nn
from sparsejax.masks import apply_masks

DENSE = nn.VariationalDense(5, sigma=0.3)
CONV = nn.VariationalConv(5, sigma=0.3, kernel_size=(3, 2), strides=(2, 1))
INPUTS = {"dense": (DENSE, (4, 7)), "conv": (CONV, (2, 6, 5, 3))}


def setup(kind, **changes):
    layer, shape = INPUTS[kind]
    x = jax.random.normal(jax.random.key(0), shape)
    layer = layer.clone(**changes)
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    params["bias"] = jnp.arange(5.0)
    return layer, params, x


def sample(layer, variables, x, seed=0):
    return layer.apply(variables, x, rngs={"sample": jax.random.key(seed)})


def plain(kind):
    return linen.Dense(5) if kind == "dense" else linen.Conv(5, (3, 2), strides=(2, 1))


@pytest.mark.parametrize("kind", INPUTS)
def test_means_and_the_limit_of_no_variance_are_the_plain_layer(kind):
    layer, params, x = setup(kind, sigma=1e-20)
    point = {"params": {name: params[name] for name in ("kernel", "bias")}}
    expected = plain(kind).apply(point, x)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)
    np.testing.assert_allclose(sample(layer, {"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", INPUTS)
def test_outputs_are_distributed_as_with_sampled_weights(kind):
    layer, params, x = setup(kind)
    params["kernel_rho"] += jax.random.normal(jax.random.key(2), params["kernel_rho"].shape)
    sigma = np.log1p(np.exp(np.asarray(params["kernel_rho"])))

    def with_weights(key):
        kernel = params["kernel"] + sigma * jax.random.normal(key, sigma.shape)
        return plain(kind).apply({"params": {"kernel": kernel, "bias": params["bias"]}}, x)

    keys = jax.random.split(jax.random.key(3), 1500)
    ours = jax.jit(jax.vmap(lambda key: layer.apply({"params": params}, x, rngs={"sample": key})))(keys)
    theirs = jax.jit(jax.vmap(with_weights))(keys)
    errors = (ours.mean(0) - theirs.mean(0)) / theirs.std(0)
    assert np.abs(errors).max() < 5 * np.sqrt(2 / len(keys))
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=5 / np.sqrt(len(keys)))


def test_examples_have_noise_of_their_own():
    layer, params, x = setup("dense")
    y = sample(layer, {"params": params}, jnp.stack([x[0], x[0]]))
    assert (np.abs(y[0] - y[1]) > 1e-4).all()


@pytest.mark.parametrize("kind", INPUTS)
def test_nothing_is_uncertain_outside_the_mask(kind):
    layer, params, x = setup(kind)
    keep = np.zeros(params["kernel"].shape, bool)
    keep[..., 1:] = True  # the first output has no weight left
    masks = {"kernel": jnp.asarray(keep), "kernel_rho": jnp.asarray(keep), "bias": jnp.asarray(True)}
    y = sample(layer, {"params": params, "masks": masks}, x)
    np.testing.assert_array_equal(y[..., 0], params["bias"][0])
    assert np.std(y[..., 1]) > 0.1
    # what a layer that does not know the mask makes of a rho of zero: sigma = ln 2
    trapped = sample(layer, {"params": apply_masks(params, masks)}, x)
    assert np.std(trapped[..., 0]) > 0.1
    # one mask serves both leaves, also if that of rho says nothing
    masks["kernel_rho"] = jnp.asarray(True)
    np.testing.assert_array_equal(sample(layer, {"params": params, "masks": masks}, x), y)


def test_gradients_are_dense_for_means_zero_for_masked_deviations_and_finite():
    layer, params, x = setup("dense")
    keep = jnp.zeros((7, 5), bool).at[:, 1:4].set(True)
    masks = {"kernel": keep, "kernel_rho": keep, "bias": jnp.asarray(True)}
    weights = jax.random.normal(jax.random.key(4), (4, 5))
    grads = jax.grad(lambda p: jnp.sum(weights * sample(layer, {"params": p, "masks": masks}, x)))(params)
    np.testing.assert_allclose(grads["kernel"], x.T @ weights, rtol=1e-4, atol=1e-5)
    slopes = np.asarray(grads["kernel_rho"])
    assert np.isfinite(slopes).all() and not slopes[:, [0, 4]].any() and (slopes[:, 1:4] != 0).all()


def test_multiply_adds_are_those_of_one_product():
    layer, _, x = setup("dense")
    assert flops.layer_macs(layer, layer.init(jax.random.key(0), x), x) == {"kernel": 35}
    layer, _, x = setup("conv")
    macs = flops.layer_macs(layer, layer.init(jax.random.key(0), x), x)
    conv = plain("conv")
    assert macs == flops.layer_macs(conv, conv.init(jax.random.key(0), x), x)


def test_a_model_with_mean_field_layers_reads_masks():
    model = models.build("mlp", classes=3, hidden=(6,), linear={"name": "variational", "sigma": 0.01})
    params = model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    assert model.reads_masks and not models.build("mlp", classes=3).reads_masks
    np.testing.assert_allclose(jax.nn.softplus(params["dense_0"]["kernel_rho"]), 0.01, rtol=1e-4)


def test_bfloat16():
    layer, params, x = setup("dense", dtype=jnp.bfloat16)
    assert sample(layer, {"params": params}, x).dtype == jnp.bfloat16


def test_sigma_must_be_positive():
    with pytest.raises(ValueError, match=r"VariationalDense needs a positive sigma, got 0"):
        nn.VariationalDense(5, sigma=0)
