"""Layers with packed parameters against the same layers with dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax import models, nn
from sparsejax.formats import is_packed
from sparsejax.masks import dense_masks, map_with_name
from sparsejax.patterns import parse

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8, 16)), jnp.float32)
LAYERS = {
    "Dense": (nn.Dense(32), IMAGES),
    "Dense, no bias": (nn.Dense(32, use_bias=False), IMAGES[0, 0]),
    "Dense of a vector": (nn.Dense(32), IMAGES[0, 0, 0]),
    "Conv 1x1": (nn.Conv(32, (1, 1)), IMAGES),
    "Conv 1x1, strides": (nn.Conv(32, (1, 1), strides=(2, 3)), IMAGES),
    "Conv 1x1, one stride, VALID": (nn.Conv(32, (1, 1), strides=2, padding="VALID"), IMAGES),
    "Conv 1x1, padded": (nn.Conv(32, (1, 1), padding=1), IMAGES),
    "Conv 1x1, dilated input": (nn.Conv(32, (1, 1), padding=0, input_dilation=2), IMAGES),
    "Conv 1x1, groups": (nn.Conv(32, (1, 1), feature_group_count=2), IMAGES),
    "Conv 1x1, two batch axes": (nn.Conv(32, (1, 1)), IMAGES[None]),
    "Conv 1x1 of a sequence": (nn.Conv(32, 1), IMAGES[0]),
    "Conv 3x3": (nn.Conv(32, (3, 3), strides=2), IMAGES),
    "ConvTranspose": (nn.ConvTranspose(32, (3, 3)), IMAGES),
    "DenseGeneral": (nn.DenseGeneral((4, 8), axis=(-2, -1)), IMAGES),
    "Embed": (nn.Embed(8, 32), jnp.array([[0, 4, 2], [1, 1, 3]])),
}
MULTIPLIES = (*list(LAYERS)[:6], "Conv 1x1, two batch axes", "Conv 1x1 of a sequence")
PATTERNS = {"2:4": "2:4", "block:8x8": "block:8x8", "unstructured": "csr", "bitmap": "bitmap"}


def setup(name, pattern):
    """The layer, its input, its masked parameters and the packed ones."""
    layer, x = LAYERS[name]
    params = layer.init(jax.random.key(0), x)["params"]
    if "bias" in params:
        params["bias"] = jax.random.normal(jax.random.key(1), params["bias"].shape)
    names = ("kernel", "embedding")
    masks = map_with_name(
        lambda path, leaf: (
            parse("unstructured" if pattern == "bitmap" else pattern).mask(jnp.abs(leaf), 0.5)
            if path in names
            else jnp.asarray(True)
        ),
        params,
    )
    packed, _ = sparsejax.pack(params, masks, {next(n for n in names if n in params): PATTERNS[pattern]})
    return layer, x, sparsejax.apply_masks(params, masks), packed


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_equals_dense(name, pattern, monkeypatch):
    if pattern == "block:8x8" and name == "DenseGeneral":  # its blocks would straddle heads
        pattern = "2:4"
    layer, x, dense, packed = setup(name, pattern)
    calls = []
    product = sparsejax.matmul
    monkeypatch.setattr(
        "sparsejax.nn.packed.matmul", lambda x, w: calls.append(type(w).__name__) or product(x, w)
    )
    found = jax.jit(lambda packed, x: layer.apply({"params": packed}, x))(packed, x)
    expected = layer.apply({"params": dense}, x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert len(calls) == (name in MULTIPLIES)


@pytest.mark.parametrize("name", ["Dense", "Conv 1x1"])
def test_precision_is_kept(name):
    layer, x, dense, packed = setup(name, "bitmap")
    exact = layer.clone(precision="highest")
    for params in (packed, dense):
        assert "HIGHEST" in str(jax.make_jaxpr(lambda x: exact.apply({"params": params}, x))(x))  # noqa: B023


@pytest.mark.parametrize("name", ["Dense", "Conv 1x1"])
def test_dtypes_and_masks_beside_packed_kernels(name):
    layer, x, dense, packed = setup(name, "2:4")
    half = layer.clone(dtype=jnp.bfloat16)
    found, expected = (half.apply({"params": params}, x) for params in (packed, dense))
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=0.05, atol=0.1)
    masks = dense_masks(dense)
    for leaf in ("kernel", "bias"):
        fewer = {**masks, leaf: jnp.asarray(np.random.default_rng(1).random(dense[leaf].shape) < 0.5)}
        found, expected = (layer.apply({"params": params, "masks": fewer}, x) for params in (packed, dense))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_gradients_of_the_kept_weights_and_of_the_input():
    layer, x, dense, packed = setup("Dense", "unstructured")

    def loss(data, x):
        params = {**packed, "kernel": packed["kernel"].with_data(data)}
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    found = jax.grad(loss, (0, 1))(packed["kernel"].data, x)
    expected = jax.grad(
        lambda kernel, x: jnp.sum(jnp.sin(layer.apply({"params": {**dense, "kernel": kernel}}, x))), (0, 1)
    )
    kernel, inputs = expected(dense["kernel"], x)
    kept = np.asarray(packed["kernel"].mask())
    np.testing.assert_allclose(found[0], kernel.T[kept.T], rtol=1e-4, atol=1e-4)  # by output
    np.testing.assert_allclose(found[1], inputs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "keywords"),
    [
        ("mlp", (28, 28), {}),
        ("cnn", (28, 28, 1), {}),
        ("vit", (28, 28, 1), {"width": 32, "depth": 1, "heads": 2, "patch": 7}),
    ],
)
def test_whole_models(name, shape, keywords):
    model = models.build(name=name, classes=10, **keywords)
    x = jax.random.normal(jax.random.key(0), (4, *shape))
    variables = model.init(jax.random.key(1), x)
    masks = map_with_name(
        lambda path, leaf: (
            parse("unstructured").mask(jnp.abs(leaf), 0.9) if path.endswith("kernel") else jnp.asarray(True)
        ),
        variables["params"],
    )
    packed, report = sparsejax.pack(variables["params"], masks)
    assert sum(record.format != "dense" for record in report) >= 3
    dense = {**variables, "params": sparsejax.apply_masks(variables["params"], masks)}
    found = jax.jit(lambda packed, x: model.apply({**variables, "params": packed}, x))(packed, x)
    np.testing.assert_allclose(found, model.apply(dense, x), rtol=1e-4, atol=1e-4)
    assert any(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed)))


def test_a_kernel_for_another_input_is_refused():
    layer, x, _, packed = setup("Dense", "2:4")
    with pytest.raises(
        ValueError, match=r"the packed kernel has shape \(16, 32\), but the layer's inputs need \(8, 32\)"
    ):
        layer.apply({"params": packed}, x[..., :8])
