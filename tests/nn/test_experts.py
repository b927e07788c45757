"""Linear layers of experts against a loop over rows, and the RMS norm against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import nn
from sparsejax.nn.experts import expert_matmul

DISTRIBUTIONS = {
    "few": [1, 0, 2],
    "one expert": [0, 40, 0],
    "first and last": [9, 0, 0, 8],
    "full groups": [16, 8, 24],
    "uneven": [1, 63, 0, 17, 300],
}


def loop(x, kernel, sizes):
    experts = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([row @ kernel[e] for row, e in zip(x, experts, strict=True)])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_row_meets_its_expert(name):
    sizes = np.asarray(DISTRIBUTIONS[name])
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((sizes.sum(), 3)), rng.standard_normal((len(sizes), 3, 2))
    args = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    found = jax.jit(expert_matmul)(*args, sizes)
    np.testing.assert_allclose(found, loop(x, kernel, sizes), rtol=1e-4, atol=1e-5)

    def loss(x, kernel):
        return jnp.sum(expert_matmul(x, kernel, sizes) ** 2)

    dx, dk = jax.jit(jax.grad(loss, (0, 1)))(*args)
    dy = 2 * loop(x, kernel, sizes)
    np.testing.assert_allclose(dx, loop(dy, kernel.swapaxes(1, 2), sizes), rtol=1e-3, atol=1e-4)
    ends = np.cumsum(sizes)
    expected = [x[end - size : end].T @ dy[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    np.testing.assert_allclose(dk, expected, rtol=1e-3, atol=1e-3)


def dense(x, kernel, sizes):
    """Every row by every expert, of which its own is taken: what JAX differentiates without our help."""
    owner = jnp.repeat(jnp.arange(len(kernel)), sizes, total_repeat_length=len(x))
    return jnp.einsum("ri,eif,re->rf", x, kernel, jax.nn.one_hot(owner, len(kernel)))


def test_derivatives_are_those_of_a_dense_product():
    sizes = jnp.array([3, 0, 21])
    random = np.random.default_rng(0)
    at, along = (
        tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((24, 3), (3, 3, 2)))
        for _ in range(2)
    )

    def second(product):
        slope = jax.grad(lambda args: jnp.sum(product(*args, sizes) ** 3))
        return jax.jvp(slope, (at,), (along,))  # the gradient, and the Hessian along a direction

    for found, expected in zip(
        *(jax.tree.leaves(jax.jit(second, static_argnums=0)(f)) for f in (expert_matmul, dense)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_no_rows_have_no_products_and_no_gradient():
    x, kernel, sizes = jnp.ones((0, 3)), jnp.ones((2, 3, 4)), jnp.zeros(2, int)
    assert expert_matmul(x, kernel, sizes).shape == (0, 4)
    dx, dk = jax.grad(lambda *args: expert_matmul(*args, sizes).sum(), (0, 1))(x, kernel)
    assert dx.shape == (0, 3) and not dk.any()


def test_the_gradient_adds_up_in_one_array():
    """No array of all kernels but the sum: not one for every group."""
    kernel = jnp.ones((64, 64, 64))
    sizes = jnp.full(64, 8)

    def slope(x, kernel):
        return jax.grad(lambda k: expert_matmul(x, k, sizes).sum())(kernel)

    memory = jax.jit(slope).lower(jnp.ones((512, 64)), kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * kernel.nbytes


def test_layer_has_biases_and_reads_masks():
    layer, sizes = nn.ExpertDense(2, experts=3), jnp.array([1, 0, 4])
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    params = layer.init(jax.random.key(0), x, sizes)["params"]
    assert params["kernel"].shape == (3, 3, 2) and params["bias"].shape == (3, 2)
    assert (
        0.3 < jnp.std(nn.ExpertDense(64, 2).init(jax.random.key(0), x, sizes[:2])["params"]["kernel"]) < 0.8
    )
    params["bias"] = jnp.arange(6.0).reshape(3, 2)
    expected = loop(x, np.asarray(params["kernel"]), [1, 0, 4]) + np.asarray(params["bias"])[[0, 2, 2, 2, 2]]
    np.testing.assert_allclose(layer.apply({"params": params}, x, sizes), expected, rtol=1e-5, atol=1e-5)
    masks = {"kernel": jnp.zeros((3, 3, 2), bool), "bias": jnp.array(True)}
    out = layer.apply({"params": params, "masks": masks}, x, sizes)
    np.testing.assert_array_equal(out, params["bias"][jnp.array([0, 2, 2, 2, 2])])


def test_rms_norm_is_its_formula():
    x = np.random.default_rng(0).standard_normal((2, 6)) * 100
    scale = jnp.arange(6.0)
    for width in (None, 9):
        expected = x / np.sqrt((x**2).sum(-1, keepdims=True) / (width or 6) + 0.5) * np.arange(6)
        layer = nn.RMSNorm(epsilon=0.5, width=width)
        assert layer.init(jax.random.key(0), x)["params"]["scale"].tolist() == [1] * 6
        out = layer.apply({"params": {"scale": scale}}, x.astype(np.float32))
        np.testing.assert_allclose(out, expected, rtol=1e-5)
    coarse = nn.RMSNorm().apply({"params": {"scale": jnp.ones(6)}}, jnp.asarray(x, jnp.bfloat16))
    assert coarse.dtype == jnp.bfloat16
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(
        coarse.astype(jnp.float32), exact / np.sqrt((exact**2).mean(-1, keepdims=True)), rtol=2**-8
    )
