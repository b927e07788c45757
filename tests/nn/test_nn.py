"""Layers that read `masks` against flax's own layers, whose parameters are masked from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax import nn
from sparsejax.masks import apply_masks, dense_masks

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 3)), jnp.float32)
TOKENS = jnp.array([[0, 4, 2], [1, 1, 3]])
LAYERS = {
    "Dense": ({"features": 5}, IMAGES),
    "DenseGeneral": ({"features": (2, 4), "axis": (-2, -1)}, IMAGES),
    "Conv": ({"features": 4, "kernel_size": (3, 3), "strides": 2}, IMAGES),
    "ConvTranspose": ({"features": 4, "kernel_size": (3, 3), "strides": (2, 2)}, IMAGES),
    "Embed": ({"num_embeddings": 5, "features": 4}, TOKENS),
    "BatchNorm": ({"use_running_average": True}, IMAGES),
    "LayerNorm": ({}, IMAGES),
}


def pair(name):
    """Our layer, flax's, its input, and parameters that are nowhere zero."""
    kw, x = LAYERS[name]
    ours, stock = getattr(nn, name)(**kw), getattr(linen, name)(**kw)
    variables = stock.init(jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    return ours, stock, x, {**variables, "params": params}


def random_masks(params, dtype=bool):
    rng = np.random.default_rng(2)
    if dtype is bool:
        return jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape) < 0.5), params)
    return jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape), dtype), params)


@pytest.mark.parametrize("name", LAYERS)
def test_without_masks_a_layer_is_flax_bit_for_bit(name):
    ours, stock, x, variables = pair(name)
    mine = ours.init(jax.random.key(0), x)
    theirs = stock.init(jax.random.key(0), x)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)  # in particular, no `masks` are created
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    np.testing.assert_array_equal(ours.apply(variables, x), stock.apply(variables, x))


@pytest.mark.parametrize("dtype", [bool, jnp.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_masks_collection_equals_flax_with_masked_parameters(name, dtype):
    ours, stock, x, variables = pair(name)
    masks = random_masks(variables["params"], dtype)

    def objective(model, variables):
        return jnp.sum(jnp.sin(model.apply(variables, x)))

    @jax.jit
    @jax.value_and_grad
    def with_collection(params):
        return objective(ours, {**variables, "params": params, "masks": masks})

    @jax.jit
    @jax.value_and_grad
    def with_apply_masks(params):
        return objective(stock, {**variables, "params": apply_masks(params, masks)})

    value, gradient = with_collection(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, (value, gradient), with_apply_masks(variables["params"]))

    # The gradient is flax's own at the masked weights: dense, not multiplied by the mask.
    masked = jax.tree.map(lambda p, m: np.asarray(p) * np.asarray(m), variables["params"], masks)
    expected = jax.value_and_grad(lambda params: objective(stock, {**variables, "params": params}))(masked)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), (value, gradient), expected
    )
    if dtype is bool:
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(masks), strict=True)
        assert any(np.any((np.asarray(m) == 0) & (np.asarray(g) != 0)) for g, m in pairs)


class Net(linen.Module):
    """Ours or stock layers with the same names."""

    layers: object

    @linen.compact
    def __call__(self, x):
        x = linen.relu(self.layers.Conv(4, (3, 3), name="conv")(x))
        x = linen.LayerNorm(name="norm")(x)
        return self.layers.Dense(3, name="head")(x.reshape(len(x), -1))


def test_stock_model_with_apply_masks_equals_ours_with_the_collection():
    ours, stock = Net(nn), Net(linen)
    params = ours.init(jax.random.key(0), IMAGES)["params"]
    masks = dense_masks(params)
    masks["conv"]["kernel"] = jax.random.bernoulli(jax.random.key(1), 0.3, params["conv"]["kernel"].shape)
    masks["head"]["kernel"] = jnp.zeros(params["head"]["kernel"].shape, bool)

    def loss(model, variables):
        return jnp.sum((model.apply(variables, IMAGES) - 1.0) ** 2)

    value, gradient = jax.value_and_grad(lambda p: loss(ours, {"params": p, "masks": masks}))(params)
    expected, expected_gradient = jax.value_and_grad(
        lambda p: loss(stock, {"params": apply_masks(p, masks)})
    )(params)
    # A head without weights gives its zero bias, for 2 examples of 3 outputs.
    assert value == expected == 6.0
    jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)
    assert np.abs(gradient["head"]["kernel"]).max() > 0


def test_embed_attend_is_masked_too():
    _, _, _, variables = pair("Embed")
    layer = nn.Embed(5, 4)
    masks = random_masks(variables["params"])
    query = jnp.ones((2, 4))
    scores = layer.apply({**variables, "masks": masks}, query, method="attend")
    table = np.asarray(variables["params"]["embedding"]) * np.asarray(masks["embedding"])
    np.testing.assert_allclose(scores, np.ones((2, 4)) @ table.T, rtol=1e-6)


def test_the_mixin_serves_any_layer():
    class Bilinear(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x @ self.param("kernel", linen.initializers.ones, (3, 3)) @ x.T

    class MaskedBilinear(nn.MaskedParams, Bilinear):
        pass

    x = jnp.array([[1.0, 2.0, 3.0]])
    variables = MaskedBilinear().init(jax.random.key(0), x)
    assert MaskedBilinear().apply(variables, x) == 36.0
    masks = {"kernel": jnp.eye(3, dtype=bool)}
    assert MaskedBilinear().apply({**variables, "masks": masks}, x) == 14.0
