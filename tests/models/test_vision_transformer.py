"""The vision transformer and its blocks: published counts, numpy formulas, symmetries, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest

from sparsejax.masks import flatten
from sparsejax.models import blocks, build
from sparsejax.models.vision_transformer import patches


def tokens(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def start(model, x):
    """Variables whose every parameter is random, biases and scales included."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def affine(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def numpy_attention(params, x, heads, causal):
    """One head, one query at a time."""
    query, key, value = (affine(params[name], x) for name in ("query", "key", "value"))
    length, width = query.shape
    size, out = width // heads, np.zeros((length, width))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(length):
            seen = slice(0, i + 1) if causal else slice(None)
            logits = key[seen, part] @ query[i, part] / np.sqrt(size)
            weights = np.exp(logits - logits.max())
            out[i, part] = weights / weights.sum() @ value[seen, part]
    return affine(params["out"], out)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(causal):
    x = tokens(2, 5, 6)
    model = blocks.Attention(width=8, heads=2, causal=causal)
    variables = start(model, x)
    expected = [numpy_attention(variables["params"], part.astype(np.float64), 2, causal) for part in x]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_block_is_pre_norm_and_residual():
    x = tokens(1, 3, 8)
    model = blocks.Block(heads=4, hidden_width=5)
    variables = start(model, x)
    params = variables["params"]

    def norm(name, x):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * np.asarray(params[name]["scale"]) + np.asarray(params[name]["bias"])

    y = x[0] + numpy_attention(params["attention"], norm("norm_0", x[0]).astype(np.float64), 4, False)
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(affine(params["mlp"]["up"], norm("norm_1", y)))))
    expected = y + affine(params["mlp"]["down"], hidden.astype(np.float64))
    np.testing.assert_allclose(model.apply(variables, x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (-1, True), (2, False)])
def test_windows_that_make_no_sense(window, causal):
    with pytest.raises(ValueError, match=f"window={window} of .* must be at least 1, and the layer causal"):
        blocks.Attention(width=8, heads=2, causal=causal, window=window)


def test_a_mask_beside_a_cache_is_refused():
    cache = {name: jnp.zeros((1, 4, 2, 4)) for name in ("key", "value")}
    model = blocks.Attention(width=8, heads=2, causal=True)
    with pytest.raises(ValueError, match="attention with a cache .* takes no mask"):
        model.init(jax.random.key(0), tokens(1, 3, 8), mask=jnp.ones((1, 3), bool), cache=cache)


def test_a_vit_without_classes_gives_its_pooled_tokens_and_knows_the_size_of_its_images():
    x = tokens(2, 8, 8, 3)
    model = build("vit", 4, depth=1, width=8, heads=2, pool="token")
    variables = start(model, x)
    body = model.clone(classes=0)
    assert body.parts() == model.parts()[:-1]
    variables_of_body = {"params": {name: variables["params"][name] for name in body.parts()}}
    state = body.apply(variables_of_body, x)
    assert state.shape == (2, 8)
    expected = model.apply(variables, x)
    np.testing.assert_allclose(affine(variables["params"]["head"], state), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="images of 10 tokens do not fit the 5 positions of a vit"):
        model.apply(variables, tokens(2, 12, 12, 3))


def test_a_causal_block_does_not_look_ahead():
    x = tokens(1, 6, 8)
    model = blocks.Block(heads=2, hidden_width=8, causal=True)
    variables = start(model, x)
    changed = x.copy()
    changed[:, 3:] += 1.0
    before, after = model.apply(variables, x), model.apply(variables, changed)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.abs(before - after)[:, 3:].max(-1) > 1e-3)


def test_patches_are_cut_row_by_row():
    image = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    found = patches(image, 2)
    assert found.shape == (1, 6, 8)
    np.testing.assert_array_equal(found[0, 1], image[0, 0:2, 2:4].ravel())
    np.testing.assert_array_equal(found[0, 3], image[0, 2:4, 0:2].ravel())


def test_published_parameter_counts():
    # ViT-S/16 and ViT-B/16 at 224 pixels with a class token, as the model cards give them.
    for width, heads, expected in ((384, 6, 22_050_664), (768, 12, 86_567_656)):
        model = build("vit", 1000, patch=16, width=width, depth=12, heads=heads, pool="token")
        shapes = jax.eval_shape(
            model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


def test_kernels_have_the_names_that_rules_rely_on():
    model = build("vit", 10, width=8, depth=1, heads=2)
    names = flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"])
    layers = [f"attention/{part}" for part in ("key", "out", "query", "value")] + ["mlp/down", "mlp/up"]
    assert [name for name in names if name.startswith("block_0") and name.endswith("kernel")] == [
        f"block_0/{layer}/kernel" for layer in layers
    ]
    assert {"embed/kernel", "head/kernel", "positions"} <= set(names)


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_without_positions_the_order_of_the_patches_does_not_matter(pool):
    model = build("vit", 3, width=8, depth=2, heads=2, pool=pool, patch=2)
    x = tokens(2, 4, 4, 1)
    params = start(model, x)["params"]
    swapped = np.concatenate([x[:, 2:], x[:, :2]], axis=1)  # swaps the two rows of patches
    moved = model.apply({"params": params}, swapped) - model.apply({"params": params}, x)
    assert np.abs(moved).max() > 1e-3
    params["positions"] = jnp.zeros_like(params["positions"])
    np.testing.assert_allclose(
        model.apply({"params": params}, swapped), model.apply({"params": params}, x), atol=1e-4
    )


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_block_by_block_is_the_whole_bit_for_bit(pool):
    model = build("vit", 3, width=8, depth=2, heads=2, pool=pool)
    x = tokens(2, 8, 8, 1)
    params = start(model, x)["params"]
    parts = model.parts()
    assert set(parts) == set(params) and len(parts) == len(params)
    split = parts.index("block_0"), parts.index("block_1") + 1
    first, last = ({name: params[name] for name in names} for names in (parts[: split[0]], parts[split[1] :]))
    hidden = model.apply({"params": first}, x, method="start")
    for i in range(2):
        hidden = model.block(i).apply({"params": params[f"block_{i}"]}, hidden, **model.context(hidden))
    out = model.apply({"params": last}, hidden, method="finish")
    np.testing.assert_array_equal(out, model.apply({"params": params}, x))


def test_with_the_settings_of_the_paper_it_is_its_formula():
    model = build(
        "vit",
        3,
        patch=2,
        width=8,
        depth=1,
        heads=2,
        hidden=5,
        pool="token",
        epsilon=0.1,
        activation="gelu",
        bias=("out", "up", "down"),
    )
    x = tokens(1, 4, 4, 3)
    variables = start(model, x)
    p = numpy_models.double(variables["params"])
    # a convolution with the patch as its kernel and its stride is a product with flattened patches
    kernel = p["embed"]["kernel"].reshape(2, 2, 3, 8)
    cells = [np.einsum("hwc,hwcf->f", x[0, i : i + 2, j : j + 2], kernel) for i in (0, 2) for j in (0, 2)]
    z = np.concatenate([p["token"][0], np.stack(cells) + p["embed"]["bias"]]) + p["positions"][0]
    block = p["block_0"]
    assert "bias" not in block["attention"]["query"] and "bias" in block["mlp"]["up"]
    z = z + numpy_models.attention(
        block["attention"], numpy_models.layer_norm(block["norm_0"], z, 0.1), 2, causal=False
    )
    hidden = numpy_models.affine(block["mlp"]["up"], numpy_models.layer_norm(block["norm_1"], z, 0.1))
    z = z + numpy_models.affine(block["mlp"]["down"], numpy_models.gelu(hidden))
    expected = numpy_models.affine(p["head"], numpy_models.layer_norm(p["norm"], z, 0.1)[0])
    np.testing.assert_allclose(model.apply(variables, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_defaults_give_the_recorded_outputs():
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
    recorded = {
        "mean": [0.8021972, 0.0599313, -0.3931334, -0.2387803, 0.2605793],
        "token": [0.5557230, 1.3589174, 1.7791753, -0.2009684, 1.2188448],
    }
    for pool, expected in recorded.items():
        model = build("vit", 5, depth=2, width=32, heads=4, pool=pool)
        out = model.apply(model.init(jax.random.key(0), x), x)
        np.testing.assert_allclose(out[0], expected, rtol=2e-5, atol=2e-6)


def test_block_outputs_are_sown_on_request():
    model = build("vit", 3, width=8, depth=3, heads=2)
    x = tokens(2, 8, 8, 1)
    variables = start(model, x)
    plain = model.apply(variables, x)
    out, sown = model.apply(variables, x, mutable=["features"])
    np.testing.assert_array_equal(plain, out)
    assert list(variables) == ["params"]
    assert [part.shape for part in sown["features"]["block"]] == [(2, 4, 8)] * 3


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"pool": "max"}, r"unknown pool 'max'.*\(known: mean, token\)"),
        ({"activation": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
        ({"layers": ({},)}, "layers=1 mappings do not fit depth=4 of a vit"),
        ({"width": 10}, "heads=4 of a vit must divide its width=10"),
        ({"patch": 3}, "patch=3 of a vit must divide the images' 8x8 pixels"),
        ({"linear": {"name": "dens"}}, "unknown linear layer 'dens'; did you mean 'dense'"),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        build("vit", 3, **keywords).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_attention_names_a_width_that_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="heads=3 of an attention layer must divide its width=8"):
        blocks.Attention(width=8, heads=3)
