"""Groups and removal: against tables written by hand, forward passes, and counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax import flops, models, structure
from sparsejax.masks import apply_masks
from sparsejax.structure import Groups, Layer, Slices

MODELS = {
    "mlp": ({"hidden": (5, 4)}, (3, 4, 4, 1)),
    "cnn": ({"channels": (4, 6), "hidden": 5}, (3, 12, 12, 1)),
    "resnet": ({"depth": 8, "channels": 4}, (3, 8, 8, 3)),
    "wide_resnet": ({"depth": 10, "width": 2}, (3, 4, 4, 3)),
}


def randomised(variables, seed=0):
    """Weights, biases, scales and statistics as after training: none of them 0 or 1, variances positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, leaf.size // leaf.shape[-1]))
        return jnp.asarray(np.abs(values) + 0.1 if path[-1].key == "var" else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def start(model, x):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return randomised(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))


@functools.lru_cache
def ready(name):
    """A model, its variables, inputs and groups."""
    kw, shape = MODELS[name]
    model, x = models.build(name, 6, **kw), jax.random.normal(jax.random.key(1), shape)
    variables = start(model, x)
    return model, variables, x, structure.channels(model, variables, x[:1])


def table(groups):
    """{kernel: (own leaves, {fed leaf: axis}, statistics)}."""
    return {
        layer.name: (set(layer.own), {path: s.axis for path, s in layer.fed.items()}, set(layer.statistics))
        for layer in groups.layers
    }


def kernel_and_bias(name):
    return {f"{name}/kernel", f"{name}/bias"}


def normed(kernel, norm):
    """The own leaves and the statistics of a convolution whose outputs a batch norm follows."""
    own = {f"{kernel}/kernel", f"{norm}/scale", f"{norm}/bias"}
    return own, {f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var"}


def test_mlp_groups():
    assert table(ready("mlp")[3]) == {
        "dense_0/kernel": (kernel_and_bias("dense_0"), {"dense_1/kernel": 0}, set()),
        "dense_1/kernel": (kernel_and_bias("dense_1"), {"head/kernel": 0}, set()),
    }


def test_cnn_groups_cross_the_flattening():
    groups = ready("cnn")[3]
    assert table(groups) == {
        "conv_0/kernel": (kernel_and_bias("conv_0"), {"conv_1/kernel": 2}, set()),
        "conv_1/kernel": (kernel_and_bias("conv_1"), {"dense_0/kernel": 0}, set()),
        "dense_0/kernel": (kernel_and_bias("dense_0"), {"head/kernel": 0}, set()),
    }
    # 2x2 positions, channels fastest: channel c owns the rows c, c + 6, c + 12, c + 18
    rows = groups.layers[1].fed["dense_0/kernel"].channels
    np.testing.assert_array_equal(rows, np.tile(np.arange(6), 4))


def test_resnet_groups_are_inside_the_blocks():
    expected = {}
    for stage in range(3):
        block = f"block_{stage}_0"
        own, statistics = normed(f"{block}/conv_0", f"{block}/norm_0")
        expected[f"{block}/conv_0/kernel"] = (own, {f"{block}/conv_1/kernel": 2}, statistics)
    assert table(ready("resnet")[3]) == expected


def test_wide_resnet_groups_include_the_stem():
    """The first block reads the stem through its norm and its shortcut only; later streams are sums."""
    own, statistics = normed("conv_0", "block_0_0/norm_0")
    fed = {"block_0_0/conv_0/kernel": 2, "block_0_0/shortcut/kernel": 2}
    expected = {"conv_0/kernel": (own, fed, statistics)}
    for stage in range(3):
        block = f"block_{stage}_0"
        own, statistics = normed(f"{block}/conv_0", f"{block}/norm_1")
        expected[f"{block}/conv_0/kernel"] = (own, {f"{block}/conv_1/kernel": 2}, statistics)
    assert table(ready("wide_resnet")[3]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_zero_group_does_not_care_what_it_feeds(name):
    """The definition, by forward passes: with its own weights zero, the inputs that it feeds are irrelevant."""
    model, variables, x, groups = ready(name)
    kept = np.random.default_rng(3).random(groups.count) < 0.6
    params, flags = variables["params"], jnp.asarray(~kept)
    zero = groups.select(flags, jax.tree.map(jnp.zeros_like, params), params)
    masked = apply_masks(params, groups.masks(params, jnp.asarray(kept)))
    apply = jax.jit(lambda params: model.apply({**variables, "params": params}, x))
    np.testing.assert_array_equal(apply(zero), apply(masked))
    assert not np.allclose(apply(zero), apply(params))
    differs = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (zero, masked)), strict=True)]
    assert any(differs)


def keep(groups, *counts):
    """bool (G,): so many groups of every layer, not the first ones."""
    rng = np.random.default_rng(5)
    return np.concatenate(
        [rng.permutation(layer.size) < n for layer, n in zip(groups.layers, counts, strict=True)]
    )


def removed(name, *counts):
    model, variables, x, groups = ready(name)
    masks = groups.masks(variables["params"], jnp.asarray(keep(groups, *counts)))
    smaller, fewer = structure.remove(model, variables, masks, groups)
    masked = {**variables, "params": apply_masks(variables["params"], masks)}
    expected, found = model.apply(masked, x), smaller.apply(fewer, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(smaller.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, dict(shapes))
    return smaller, fewer, x


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_smaller_mlp():
    smaller, fewer, x = removed("mlp", 3, 2)
    assert smaller.hidden == (3, 2)
    assert size(fewer) == 16 * 3 + 3 + 3 * 2 + 2 + 2 * 6 + 6
    assert flops.layer_macs(smaller, fewer, x) == {
        "dense_0/kernel": 48,
        "dense_1/kernel": 6,
        "head/kernel": 12,
    }


def test_smaller_cnn():
    smaller, fewer, x = removed("cnn", 3, 4, 2)
    assert (smaller.channels, smaller.hidden) == ((3, 4), 2)
    assert size(fewer) == 9 * 3 + 3 + 9 * 3 * 4 + 4 + 4 * 4 * 2 + 2 + 2 * 6 + 6
    assert flops.layer_macs(smaller, fewer, x) == {
        "conv_0/kernel": 25 * 9 * 3,
        "conv_1/kernel": 4 * 9 * 3 * 4,
        "dense_0/kernel": 16 * 2,
        "head/kernel": 12,
    }


@pytest.mark.slow
def test_smaller_resnet():
    """12 of the 28 inner channels stay; the streams keep 4, 8 and 16."""
    model, variables, x, _ = ready("resnet")
    smaller, fewer, _ = removed("resnet", 3, 4, 5)
    assert smaller.inner == (3, 4, 5)
    gone = [(1, 4, 4), (4, 4, 8), (11, 8, 16)]  # inner channels, inputs and outputs of the block
    assert size(variables["params"]) - size(fewer["params"]) == sum(
        n * (9 * a + 9 * b + 2) for n, a, b in gone
    )
    assert size(variables["batch_stats"]) - size(fewer["batch_stats"]) == 2 * (1 + 4 + 11)
    before, after = (flops.layer_macs(m, v, x) for m, v in ((model, variables), (smaller, fewer)))
    positions = (64, 16, 4)
    assert sum(before.values()) - sum(after.values()) == sum(
        p * n * (9 * a + 9 * b) for p, (n, a, b) in zip(positions, gone, strict=True)
    )


@pytest.mark.slow
def test_smaller_wide_resnet():
    smaller, fewer, x = removed("wide_resnet", 20, 30, 40, 10)
    assert (smaller.stem, smaller.inner) == (10, (20, 30, 40))
    params = fewer["params"]
    assert params["conv_0"]["kernel"].shape == (3, 3, 3, 10)
    assert params["block_0_0"]["shortcut"]["kernel"].shape == (1, 1, 10, 32)
    assert params["block_2_0"]["conv_1"]["kernel"].shape == (3, 3, 40, 128)
    assert flops.layer_macs(smaller, fewer, x)["block_0_0/conv_0/kernel"] == 16 * 9 * 10 * 20


def test_a_layer_without_channels_keeps_a_silent_one():
    smaller, fewer, _ = removed("mlp", 0, 2)
    assert smaller.hidden == (1, 2)
    assert not np.any(fewer["params"]["dense_0"]["kernel"])


def test_zeros_in_the_weights_do_without_masks():
    model, variables, _, groups = ready("mlp")
    masks = groups.masks(variables["params"], jnp.asarray(keep(groups, 3, 2)))
    masked = {"params": apply_masks(variables["params"], masks)}
    assert structure.remove(model, masked, None, groups)[0] == model.clone(hidden=(3, 2))


# --- other models ------------------------------------------------------------------------------------


class Net(linen.Module):
    """`first`, then `middle` on its 6 outputs, then `last`."""

    middle: object

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3, name="last")(self.middle(linen.Dense(6, name="first")(x)))


def names(middle, shape=(1, 4)):
    model = Net(middle)
    x = jnp.ones(shape)
    return table(structure.channels(model, start(model, x), x))


def gated(x):
    return linen.silu(x) * linen.Dense(6, name="gate")(jnp.ones_like(x))


def test_a_gate_goes_with_the_channel_it_multiplies():
    found = names(gated)
    assert found["first/kernel"] == (
        kernel_and_bias("first") | kernel_and_bias("gate"),
        {"last/kernel": 0},
        set(),
    )
    assert "gate/kernel" not in found


def test_a_depthwise_convolution_goes_with_its_channel():
    found = names(lambda x: linen.Conv(6, (3,), feature_group_count=6, name="depthwise")(x), (1, 5, 4))
    own = kernel_and_bias("first") | kernel_and_bias("depthwise")
    assert list(found.values()) == [(own, {"last/kernel": 0}, set())]


def test_concatenated_channels_feed_their_own_rows():
    model = Net(lambda x: jnp.concatenate([x, x[:, ::-1]], -1))
    x = jnp.ones((1, 4))
    (layer,) = structure.channels(model, start(model, x), x).layers
    np.testing.assert_array_equal(layer.fed["last/kernel"].channels, [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0])


@pytest.mark.parametrize(
    "middle",
    [
        linen.softplus,  # f(0) != 0: a zero channel still speaks
        lambda x: linen.LayerNorm()(x),  # its mean and variance mix the channels
        lambda x: x[:, :3] + x[:, 3:],  # two channels in one
        lambda x: x + jnp.repeat(linen.Dense(2, name="shift")(x), 3, -1),  # reads them, and goes round
    ],
    ids=["softplus", "layer_norm", "pairs", "residual"],
)
def test_what_cannot_be_removed_is_left_alone(middle):
    with pytest.raises(ValueError, match=r"Net has no kernel whose channels can be removed \(kernels: "):
        names(middle)


class SharedBias(linen.Module):
    """A dense layer whose outputs share biases in pairs, so that no channel can take its own along."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4, use_bias=False, name="first")(x)
        x = x + jnp.repeat(self.param("bias", linen.initializers.ones, (2,)), 2)
        return linen.Dense(3, name="last")(x)


def test_a_channel_that_shares_its_bias_is_not_silent():
    model, x = SharedBias(), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="SharedBias has no kernel"):
        structure.channels(model, start(model, x), x)


# --- bad input ---------------------------------------------------------------------------------------


def dense(name, size=4, **kw):
    return Layer(name, size, **{"own": {name: Slices(-1, np.arange(size))}, "fed": {}, **kw})


def test_groups_must_be_disjoint():
    with pytest.raises(ValueError, match=r"groups must not overlap, but b belongs to both a and b"):
        Groups([dense("a", own={"b": Slices(-1, np.arange(4))}), dense("b")])
    with pytest.raises(ValueError, match="groups need at least one layer"):
        Groups([])


def test_groups_must_fit_the_parameters():
    params = {"a": {"kernel": jnp.zeros((3, 4))}}
    with pytest.raises(ValueError, match=r"the groups of b/kernel name 'b/kernel', which is no parameter"):
        Groups([dense("b/kernel")]).check(params)
    with pytest.raises(ValueError, match=r"axis -1 of a/kernel into 5 indices, but its shape is \(3, 4\)"):
        Groups([dense("a/kernel", 5)]).check(params)
    Groups([dense("a/kernel")]).check(params)


def test_only_models_that_can_be_narrowed():
    _, variables, _, groups = ready("mlp")
    with pytest.raises(ValueError, match=r"Dense has no method narrowed\(widths\)"):
        structure.remove(linen.Dense(3), variables, None, groups)
    with pytest.raises(ValueError, match="unknown layer whose width can change: 'head'"):
        models.build("mlp", 6).narrowed({"head": 3})


@pytest.mark.parametrize(
    "name, kw, message",
    [
        (
            "resnet",
            {"depth": 8, "inner": (4, 8)},
            r"one positive width for each of the 3 blocks, got \(4, 8\)",
        ),
        ("wide_resnet", {"depth": 10, "inner": (4, 8, 0)}, r"got \(4, 8, 0\)"),
        ("wide_resnet", {"stem": 17}, r"stem=17 of a wide_resnet must be in \[1, 16\]"),
    ],
)
def test_widths_that_a_model_cannot_have(name, kw, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, 10, **kw)
