"""Butterfly products against numpy's Fourier transform and explicit sparse factors; StNN against scipy's Hankel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from sparsejax import flops, nn


def explicit_factor(own, other, stage):
    """The n x n matrix of one stage: row i has entries at i and at i xor 2^stage."""
    n = len(own)
    matrix = np.zeros((n, n), np.result_type(own))
    for i in range(n):
        matrix[i, i] = own[i]
        matrix[i, i ^ (1 << stage)] = other[i]
    return matrix


def explicit_product(factors):
    """All stages after the bit reversal, as a matrix that multiplies column vectors."""
    n = factors.shape[-1]
    bits = n.bit_length() - 1
    order = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(n)]
    product = np.eye(n)[order].astype(factors.dtype)
    for stage, (own, other) in enumerate(factors):
        product = explicit_factor(own, other, stage) @ product
    return product


@pytest.mark.parametrize("n", [2, 64])
def test_twiddle_factors_are_the_fourier_transform(n):
    x = np.random.default_rng(n).standard_normal((3, n)) + 1j * np.random.default_rng(1).standard_normal(
        (3, n)
    )
    factors = nn.fourier_factors(n)
    assert factors.shape == (n.bit_length() - 1, 2, n)
    x, multiply = jnp.asarray(x, jnp.complex64), jax.jit(nn.butterfly_matmul)
    np.testing.assert_allclose(
        multiply(x, factors) * np.sqrt(n), np.fft.fft(x), rtol=1e-4, atol=1e-4 * np.sqrt(n)
    )
    inverse = multiply(x, nn.fourier_factors(n, inverse=True)) / np.sqrt(n)
    np.testing.assert_allclose(inverse, np.fft.ifft(x), rtol=1e-4, atol=1e-5)


def test_product_is_that_of_explicit_sparse_factors():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((4, 2, 16)).astype(np.float32)
    x = rng.standard_normal((5, 16)).astype(np.float32)
    np.testing.assert_allclose(
        nn.butterfly_matmul(jnp.asarray(x), jnp.asarray(factors)),
        x @ explicit_product(factors).T,
        rtol=1e-3,
        atol=1e-4,
    )


def init(layer, inputs, seed=0):
    return jax.jit(layer.init)(jax.random.key(seed), jnp.ones((1, inputs)))


@pytest.mark.parametrize("inputs, features, complex_", [(16, 16, False), (8, 20, True), (16, 5, False)])
def test_layer_is_a_stack_of_products(inputs, features, complex_):
    layer = nn.Butterfly(features, complex=complex_)
    variables = init(layer, inputs)
    kernel = np.asarray(variables["params"]["kernel"])
    factors = kernel[0] + 1j * kernel[1] if complex_ else kernel
    stacks = -(-features // inputs)
    assert factors.shape[2] == stacks
    rows = np.concatenate([explicit_product(factors[:, :, i]) for i in range(stacks)]).real[:features]
    x = np.random.default_rng(0).standard_normal((2, 3, inputs)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), x @ rows.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(jax.jit(layer.to_dense)(variables)["kernel"], rows.T, rtol=1e-3, atol=1e-5)


def test_real_layers_start_orthogonal_and_complex_ones_as_the_fourier_transform():
    kernel = np.asarray(jax.jit(nn.Butterfly(32).to_dense)(init(nn.Butterfly(32), 32))["kernel"])
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(32), atol=1e-5)
    assert np.count_nonzero(np.abs(kernel) > 1e-4) > 900  # dense, though every factor has 2 entries a row
    layer = nn.Butterfly(32, complex=True)
    kernel = jax.jit(layer.to_dense)(init(layer, 32))["kernel"]
    np.testing.assert_allclose(kernel, scipy.linalg.dft(32).real / 4, rtol=1e-3, atol=1e-4)
    assert float(jnp.mean(jnp.sum(kernel**2, 0))) == pytest.approx(1.0, rel=0.1)


# --- StNN --------------------------------------------------------------------------------------------


def hankel_of(kernel, n):
    """The stacked Hankel matrices of diagonals c: h is the inverse transform of c."""
    c = np.asarray(kernel[0]) + 1j * np.asarray(kernel[1])
    entries = (
        np.fft.irfft(c, 2 * n, norm="ortho") if c.shape[-1] == n + 1 else np.fft.ifft(c, norm="ortho").real
    )
    return np.concatenate([scipy.linalg.hankel(h[:n], h[n - 1 : 2 * n - 1]) for h in entries])


@pytest.mark.parametrize(
    "inputs, features, train_factors", [(6, 8, False), (8, 20, False), (8, 20, True), (16, 5, True)]
)
def test_stnn_starts_as_scipys_hankel(inputs, features, train_factors):
    layer = nn.StNN(features, train_factors=train_factors)
    variables = init(layer, inputs)
    params = variables["params"]
    expected = hankel_of(params["kernel"], inputs)[:features]
    assert np.std(expected) == pytest.approx(inputs**-0.5, rel=0.35)
    x = np.random.default_rng(0).standard_normal((3, inputs)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), x @ expected.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(jax.jit(layer.to_dense)(variables)["kernel"], expected.T, rtol=1e-3, atol=1e-5)
    assert ("butterfly_kernel" in params) == train_factors


def test_stnn_stays_hankel_unless_its_factors_are_trained():
    def antidiagonals(kernel):
        flipped = np.asarray(kernel)[:, ::-1]
        return max(np.ptp(np.diagonal(flipped, offset)) for offset in range(-7, 8))

    x = jax.random.normal(jax.random.key(0), (16, 8))
    for train_factors in (False, True):
        layer = nn.StNN(8, train_factors=train_factors)
        variables = init(layer, 8)

        def loss(params, layer=layer):
            return jnp.mean(jnp.square(layer.apply({"params": params}, x) - x[:, ::-1] ** 2))

        grads = jax.jit(jax.grad(loss))(variables["params"])
        assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        spread = antidiagonals(jax.jit(layer.to_dense)({"params": params})["kernel"])
        assert (spread > 1e-3) if train_factors else (spread < 1e-5)


def test_gradients_are_those_of_the_dense_matrix():
    x = jax.random.normal(jax.random.key(1), (5, 8))
    for layer in (nn.Butterfly(12, complex=True), nn.StNN(12), nn.StNN(12, train_factors=True)):
        variables = init(layer, 8)

        def fast(params, layer=layer):
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

        def dense(params, layer=layer):
            kernel = layer.to_dense({"params": params})["kernel"]
            return jnp.sum(jnp.sin(x @ kernel + params["bias"]))

        ours, expected = (jax.jit(jax.grad(f))(variables["params"]) for f in (fast, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, expected)


def test_parameters_macs_and_dtype():
    x = jax.ShapeDtypeStruct((3, 64), jnp.float32)
    cases = [
        (nn.Butterfly(64, use_bias=False), {"kernel": 2 * 64 * 6}, {"kernel": 2 * 64 * 6}),
        (nn.Butterfly(128, use_bias=False, complex=True), {"kernel": 3072}, {"kernel": 4 * 1536}),
        # A transform of length 128 costs 1120 multiply-adds: one there, one back for each of two stacks.
        (nn.StNN(128, use_bias=False), {"kernel": 2 * 2 * 65}, {"kernel": 3 * 1120 + 3 * 130}),
        (
            nn.StNN(64, use_bias=False, train_factors=True),
            {"kernel": 256, "butterfly_kernel": 2 * 2 * 7 * 2 * 128},
            {"kernel": 4 * 128, "butterfly_kernel": 2 * 4 * 7 * 2 * 128},
        ),
    ]
    for layer, sizes, macs in cases:
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert {name: leaf.size for name, leaf in variables["params"].items()} == sizes
        assert flops.layer_macs(layer, variables, x) == macs
    for layer in (nn.StNN(8, dtype=jnp.bfloat16), nn.Butterfly(8, dtype=jnp.bfloat16, complex=True)):
        assert layer.apply(init(layer, 8), jnp.ones((2, 8))).dtype == jnp.bfloat16
