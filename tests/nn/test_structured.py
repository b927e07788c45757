"""Circulant, Toeplitz and Hankel layers against scipy's matrices, dense gradients, and messages for bad sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen

from sparsejax import flops, models, nn
from sparsejax.masks import apply_masks


def scipy_matrix(name, k, inputs):
    """The (features, inputs) matrix of scipy whose parameters are k."""
    features = len(k) if name == "circulant" else len(k) - inputs + 1
    if name == "circulant":
        return scipy.linalg.circulant(k)
    if name == "toeplitz":
        return scipy.linalg.toeplitz(k[inputs - 1 :], k[inputs - 1 :: -1])
    return scipy.linalg.hankel(k[:features], k[features - 1 :])


# name, inputs, features, block
CASES = [
    ("circulant", 7, 7, None),
    ("circulant", 12, 8, 4),
    ("toeplitz", 9, 4, None),
    ("toeplitz", 3, 8, None),
    ("hankel", 9, 4, None),
    ("hankel", 1, 8, None),
    ("hankel", 8, 12, 4),
]


def layer_and_weights(name, inputs, features, block, **kwargs):
    layer = nn.linear({"name": name, "block": block, **kwargs}, features)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, inputs)))
    variables["params"]["bias"] = jnp.arange(features, dtype=jnp.float32)
    return layer, variables


def dense_by_scipy(name, kernel, inputs, block):
    """W of shape (inputs, features), block by block."""
    p, q, _ = kernel.shape
    blocks = [[scipy_matrix(name, kernel[i, j], block or inputs).T for j in range(q)] for i in range(p)]
    return np.block(blocks)


@pytest.mark.parametrize("name, inputs, features, block", CASES)
def test_layer_is_scipys_matrix(name, inputs, features, block):
    layer, variables = layer_and_weights(name, inputs, features, block)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    expected = dense_by_scipy(name, kernel, inputs, block)
    assert expected.shape == (inputs, features)
    dense = jax.jit(layer.to_dense)(variables)
    np.testing.assert_allclose(dense["kernel"], expected, rtol=1e-6)
    x = np.random.default_rng(1).standard_normal((2, 3, inputs))
    y = jax.jit(layer.apply)(variables, x.astype(np.float32))
    np.testing.assert_allclose(y, x @ expected + np.arange(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, inputs, features, block", [CASES[1], CASES[2], CASES[6]])
def test_gradients_are_those_of_the_dense_matrix(name, inputs, features, block):
    layer, variables = layer_and_weights(name, inputs, features, block)
    x = jax.random.normal(jax.random.key(2), (5, inputs))

    def through_fft(params, x):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    def through_dense(params, x):
        dense = layer.to_dense({"params": params})
        return jnp.sum(jnp.sin(x @ dense["kernel"] + dense["bias"]))

    ours = jax.jit(jax.grad(through_fft, (0, 1)))(variables["params"], x)
    expected = jax.jit(jax.grad(through_dense, (0, 1)))(variables["params"], x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, expected)


def test_hankel_is_toeplitz_after_reversal():
    hankel, variables = layer_and_weights("hankel", 5, 7, None)
    toeplitz = nn.Toeplitz(7)
    x = jax.random.normal(jax.random.key(3), (2, 5))
    np.testing.assert_allclose(
        jax.jit(hankel.apply)(variables, x), toeplitz.apply(variables, x[:, ::-1]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["circulant", "hankel"])
def test_initial_variance_dtypes_and_masks(name):
    layer = nn.linear({"name": name}, 512, dtype=jnp.bfloat16, use_bias=False)
    x = jax.random.normal(jax.random.key(0), (64, 512))
    variables, apply = jax.jit(layer.init)(jax.random.key(1), x), jax.jit(layer.apply)
    assert variables["params"]["kernel"].dtype == jnp.float32
    y = apply(variables, x)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.std(y.astype(jnp.float32))) == pytest.approx(1.0, rel=0.2)
    masks = {"kernel": jax.random.bernoulli(jax.random.key(2), 0.5, variables["params"]["kernel"].shape)}
    masked = apply({"params": apply_masks(variables["params"], masks)}, x)
    np.testing.assert_array_equal(apply({**variables, "masks": masks}, x), masked)


def test_parameters_and_macs():
    x = jax.ShapeDtypeStruct((3, 7, 64), jnp.float32)
    # Transforms of length 64, 64 + 128, and 2 * 16 in 4 + 2 blocks: 1.25 N log2 N each; 3 per complex product,
    # 1 per sum of two.
    expected = {
        ("circulant", 64, None): (64, 2 * 480 + 3 * 33),
        ("toeplitz", 128, None): (191, 2 * 1.25 * 192 * np.log2(192) + 3 * 97),
        ("hankel", 32, 16): (4 * 2 * 31, 6 * 200 + 2 * (4 * 3 + 3) * 17),
    }
    for (name, features, block), (parameters, macs) in expected.items():
        layer = nn.linear({"name": name, "block": block}, features, use_bias=False)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert flops.parameters(variables["params"]) == (parameters, parameters)
        assert flops.layer_macs(layer, variables, x) == {"kernel": 7 * round(macs)}
    assert 2 * 480 + 3 * 33 < 64 * 64


@pytest.mark.parametrize("name", ["circulant", "toeplitz", "hankel", "butterfly", "stnn"])
def test_a_model_is_built_of_them_and_multiplied_out(name):
    model = models.build("mlp", 3, hidden=(8, 8), linear={"name": name})
    x = jax.random.normal(jax.random.key(0), (4, 8))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params = jax.jit(lambda variables: nn.to_dense(model, variables, x))(variables)
    assert params["dense_1"]["kernel"].shape == (8, 8)
    expected = models.build("mlp", 3, hidden=(8, 8)).apply({"params": params}, x)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, keywords, message",
    [
        (
            "circulant",
            {},
            "Circulant layer layers_1: a circulant is square, but 6 inputs and 4 outputs differ",
        ),
        (
            "hankel",
            {"block": 4},
            "Hankel layer layers_1: block=4 must be an integer that divides both its 6 inputs and 4 outputs",
        ),
        (
            "toeplitz",
            {"block": 0},
            "Toeplitz layer layers_1: block=0 must be an integer that divides both its 6 inputs",
        ),
        ("circulant", {"block": 2.0}, "Circulant layer layers_1: block=2.0 must be an integer"),
        (
            "butterfly",
            {},
            "Butterfly layer layers_1: butterfly factors need a power of two, .* 6 inputs to 4",
        ),
        ("stnn", {"train_factors": True}, "StNN layer layers_1: butterfly factors need a power of two"),
    ],
)
def test_bad_sizes_name_the_layer(name, keywords, message):
    model = linen.Sequential([nn.Dense(6), nn.linear({"name": name, **keywords}, 4)])
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3)))
