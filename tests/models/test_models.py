"""Models: published parameter counts, shapes, statistics, masks, and the messages for bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import apply_masks, flatten
from sparsejax.models import MODELS, build

SMALL = {  # keywords that keep the compilation short, and an input
    "encoder": (
        {"width": 8, "depth": 1, "heads": 2, "mlp_ratio": 1, "max_length": 5, "pool": "mean"},
        (3, 5),
    ),
    "mlp": ({"hidden": (7,)}, (3, 4, 4, 1)),
    "cnn": ({"channels": (2, 3), "hidden": 5}, (3, 8, 8, 1)),
    "resnet": ({"depth": 8, "channels": 4}, (3, 8, 8, 3)),
    "transformer": ({"width": 8, "depth": 1, "heads": 2, "mlp_ratio": 1, "max_length": 5}, (3, 5)),
    "vit": ({"width": 8, "depth": 1, "heads": 2, "mlp_ratio": 1}, (3, 8, 8, 1)),
    "wide_resnet": ({"depth": 10, "width": 1}, (3, 8, 8, 3)),
}


def shapes(name, shape, classes=10, **kw):
    model = build(name, classes, **kw)
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    "name, kw, shape, expected",
    [
        ("mlp", {}, (1, 28, 28, 1), 266_610),  # 784*300 + 300 + 300*100 + 100 + 100*10 + 10
        ("cnn", {}, (1, 28, 28, 1), 9 * 16 + 16 + 9 * 16 * 32 + 32 + 6 * 6 * 32 * 128 + 128 + 1290),
        ("resnet", {}, (1, 32, 32, 3), 269_722),  # the paper's 0.27 M
        ("resnet", {"depth": 56}, (1, 32, 32, 3), 853_018),  # 0.85 M
        ("wide_resnet", {"depth": 28, "width": 10}, (1, 32, 32, 3), 36_479_194),  # 36.5 M
        ("wide_resnet", {"depth": 40, "width": 4}, (1, 32, 32, 3), 8_949_210),  # 8.9 M
    ],
)
def test_published_parameter_counts(name, kw, shape, expected):
    params = shapes(name, shape, **kw)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_names_are_pleasant_to_write_rules_for():
    assert list(flatten(shapes("mlp", (1, 64))["params"])) == [
        f"{layer}/{leaf}" for layer in ("dense_0", "dense_1", "head") for leaf in ("bias", "kernel")
    ]
    names = flatten(shapes("wide_resnet", (1, 32, 32, 3))["params"])
    assert {"conv_0/kernel", "block_0_0/conv_0/kernel", "block_2_2/conv_1/kernel", "head/kernel"} <= set(
        names
    )
    assert [name for name in names if "shortcut" in name] == [
        f"block_{i}_0/shortcut/kernel" for i in range(3)
    ]


def start(name, **kw):
    """A model, a batch of images for it, and its variables."""
    small, shape = SMALL[name]
    model = build(name, 6, **{**small, **kw})
    x = jax.random.normal(jax.random.key(1), shape)
    if name in ("encoder", "transformer"):
        x = jnp.argsort(x)  # tokens
    return model, x, jax.jit(model.init)(jax.random.key(0), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_outputs_masks_and_statistics(name):
    model, x, variables = start(name)
    rng = np.random.default_rng(2)
    masks = jax.tree.map(
        lambda p: jnp.asarray(rng.random(p.shape) < 0.5 if p.ndim > 1 else True), variables["params"]
    )

    @jax.jit
    def forward(variables):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    out, updated = forward({**variables, "masks": masks})
    expected, _ = forward({**variables, "params": apply_masks(variables["params"], masks)})
    assert out.shape == ((3, 5, 6) if name == "transformer" else (3, 6)) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, expected)
    assert not np.array_equal(out, forward(variables)[0])
    before, after = (jax.tree.leaves(tree.get("batch_stats", {})) for tree in (variables, updated))
    assert bool(before) == ("resnet" in name)
    assert all(np.any(old != new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["resnet", "wide_resnet"])
def test_running_statistics_make_examples_independent(name):
    model, x, variables = start(name)
    together = jax.jit(model.apply)(variables, x)
    other = jax.jit(model.apply)(variables, x.at[1:].set(7.0))
    np.testing.assert_allclose(together[:1], other[:1], atol=1e-5)
    assert np.abs(together[1:] - other[1:]).max() > 1e-3
    trained, _ = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    assert np.abs(trained - together).max() > 1e-3


def test_a_transformer_sees_only_what_came_before():
    model, tokens, variables = start("transformer")
    later = tokens.at[:, 3:].set((tokens[:, 3:] + 1) % 5)
    before, after = (jax.jit(model.apply)(variables, x) for x in (tokens, later))
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-3
    with pytest.raises(ValueError, match="sequences of 6 tokens exceed max_length=5"):
        model.apply(variables, jnp.zeros((1, 6), jnp.int32))


def test_mlp_is_its_formula():
    model = build("mlp", 2, hidden=[3])
    x = np.random.default_rng(0).standard_normal((5, 2, 2, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    params["dense_0"]["bias"] = jnp.array([0.1, -0.2, 0.3])
    hidden = np.maximum(x.reshape(5, 4) @ np.asarray(params["dense_0"]["kernel"]) + [0.1, -0.2, 0.3], 0)
    expected = hidden @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)


def test_initial_activations_keep_their_scale():
    x = jax.random.normal(jax.random.key(1), (256, 500))
    model = build("mlp", 400, hidden=(500,) * 6)
    out = model.apply(model.init(jax.random.key(0), x), x)
    # He: the second moment after a ReLU is that of the input; the head (variance 1 / fan-in) keeps it.
    assert 0.5 < float(jnp.std(out)) < 1.5


def test_resnet_block_with_zero_convolutions_is_its_shortcut():
    model, x, variables = start("resnet")
    params = variables["params"]
    for block in ("block_0_0", "block_1_0", "block_2_0"):
        params[block]["conv_1"]["kernel"] = jnp.zeros_like(params[block]["conv_1"]["kernel"])
    _, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))(variables, x)
    seen = state["intermediates"]
    first, last = seen["block_0_0"]["__call__"][0], seen["block_2_0"]["__call__"][0]
    # Two strides of 2, and 4 channels in the middle of 8, then of 16.
    expected = np.zeros((3, 2, 2, 16))
    expected[..., 6:10] = first[:, ::4, ::4]
    np.testing.assert_array_equal(last, expected)
    assert np.abs(expected).max() > 0


def test_bfloat16_computation_gives_float32_outputs():
    model, x, variables = start("cnn")
    coarse, _, _ = start("cnn", dtype="bfloat16")
    out, exact = coarse.apply(variables, x), model.apply(variables, x)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).max() < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "wideresnet"}, "unknown model 'wideresnet'; did you mean 'wide_resnet'"),
        ({"name": "vgg"}, ", ".join(sorted(MODELS))),
        ({"name": "mlp", "hiden": (3,)}, "unknown keyword of model 'mlp': 'hiden'; did you mean 'hidden'"),
        ({"name": "mlp", "parent": None}, r"\(known: dtype, hidden, linear\)"),
        ({"name": "resnet", "depth": 18}, "depth=18 of a resnet must be 6n"),
        ({"name": "wide_resnet", "depth": 20}, "depth=20 of a wide_resnet must be 6n"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(classes=10, **arguments)
