"""Costs against hand-written numbers, the formulas of the RigL paper, and XLA's own analysis."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen

from sparsejax import flops
from sparsejax.masks import dense_masks, densities
from sparsejax.models import build

LENET = {"dense_0/kernel": 235_200, "dense_1/kernel": 30_000, "head/kernel": 1_000}  # 784-300-100-10


def macs_of(model, *inputs, **kw):
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32) if isinstance(shape, tuple) else shape for shape in inputs
    ]
    variables = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **kw), *inputs)
    return flops.layer_macs(model, variables, *inputs, **kw)


def test_lenet_300_100_by_hand():
    assert macs_of(build("mlp", 10), (7, 28, 28, 1)) == LENET
    assert sum(LENET.values()) == 266_200
    assert flops.inference_flops(LENET) == 532_400
    half = {"dense_0/kernel": 0.1, "dense_1/kernel": 0.5}
    assert flops.inference_flops(LENET, half) == pytest.approx(2 * (23_520 + 15_000 + 1_000))


def test_convolutional_networks_by_hand():
    # 28 -> 13 -> 6 pixels without padding.
    assert macs_of(build("cnn", 10), (2, 28, 28, 1)) == {
        "conv_0/kernel": 13 * 13 * 9 * 16,
        "conv_1/kernel": 6 * 6 * 9 * 16 * 32,
        "dense_0/kernel": 6 * 6 * 32 * 128,
        "head/kernel": 1280,
    }
    # ResNet-20 on 32x32: the stem, 6 + 5 + 5 equal layers a stage (589 824 * 4 each), two strided, the head.
    expected = 1024 * 27 * 16 + 16 * 2_359_296 + 2 * 2_359_296 // 2 + 640
    assert sum(macs_of(build("resnet", 10), (2, 32, 32, 3)).values()) == expected


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (linen.Dense(5), (2, 7, 3), 7 * 3 * 5),
        (linen.DenseGeneral((4, 2), axis=(-2, -1)), (2, 6, 5, 3), 6 * 5 * 3 * 8),
        (linen.DenseGeneral(4, batch_dims=(0,), axis=-1), (2, 6, 3), 6 * 3 * 4),
        (linen.Conv(6, (3,), padding="VALID"), (2, 10, 4), 8 * 3 * 4 * 6),
        (linen.Conv(6, (3, 3), strides=2, feature_group_count=2), (2, 9, 9, 4), 25 * 9 * 2 * 6),
        (linen.ConvLocal(6, (3,), padding="VALID"), (2, 10, 4), 8 * 3 * 4 * 6),
        (linen.ConvTranspose(6, (2, 2), strides=(2, 2)), (2, 5, 5, 4), 25 * 4 * 4 * 6),
    ],
)
def test_layers_by_hand(layer, shape, expected):
    assert macs_of(layer, shape) == {"kernel": expected}


def test_attention_counts_its_four_projections():
    model = linen.MultiHeadDotProductAttention(num_heads=2)
    counted = macs_of(model, (3, 5, 8))
    assert counted == {f"{name}/kernel": 5 * 8 * 8 for name in ("key", "out", "query", "value")}


class Tied(linen.Module):
    """Embedding used for lookups and, if asked, for the output; a shared layer used twice; an unused one."""

    attend: bool = True

    def setup(self):
        self.embed, self.shared, self.unused = linen.Embed(11, 4), linen.Dense(4), linen.Dense(9)

    def __call__(self, tokens):
        x = self.shared(inputs=self.shared(self.embed(tokens)))
        if self.is_initializing():
            self.unused(x)
        return self.embed.attend(x) if self.attend else x


@pytest.mark.parametrize("attend, product", [(True, 6 * 4 * 11), (False, 0)])
def test_embeddings_and_shared_and_unused_layers(attend, product):
    tokens = jax.ShapeDtypeStruct((3, 6), jnp.int32)
    expected = {"embed/embedding": product, "shared/kernel": 2 * 6 * 16, "unused/kernel": 0}
    assert macs_of(Tied(attend), tokens) == expected


def test_backward_masks_do_not_matter():
    model, x = build("mlp", 3, hidden=(8,)), jnp.ones((1, 8))
    variables = model.init(jax.random.key(0), x)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), variables["params"])
    both = {"masks": masks, "backward_masks": masks}
    assert flops.layer_macs(model, {**variables, **both}, x) == {"dense_0/kernel": 64, "head/kernel": 24}


def test_masks_and_batch_statistics_do_not_matter():
    model = build("wide_resnet", 10, depth=10, width=1)
    x = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    masks = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), variables["params"])
    assert flops.layer_macs(model, {**variables, "masks": masks}, x, train=True) == macs_of(model, x.shape)


@pytest.mark.parametrize("name, shape", [("mlp", (8, 28, 28, 1)), ("cnn", (8, 28, 28, 1))])
def test_xla_agrees_on_dense_models(name, shape):
    model = build(name, 10)
    x = jnp.zeros(shape)
    variables = model.init(jax.random.key(0), x)
    cost = jax.jit(model.apply).lower(variables, x).compile().cost_analysis()["flops"]
    ours = shape[0] * flops.inference_flops(flops.layer_macs(model, variables, x))
    # XLA also counts biases and activations, well below 2% here.
    assert ours <= cost <= 1.02 * ours


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, expected",
    [
        ("dense", 300.0),
        ("fixed", 60.0),
        ("set_", 60.0),
        ("gradual", 60.0),
        ("one_shot", 60.0),
        ("snfs", 140.0),
        ("rigl", (60.0 * 9 + 140.0) / 10),
    ],
)
def test_training_flops_of_the_rigl_paper(method, expected):
    assert flops.training_flops(method, 100.0, 20.0, update_every=9) == pytest.approx(expected)
    assert flops.training_flops_ratio(method, 100.0, 20.0, update_every=9) == pytest.approx(expected / 300)


def test_training_flops_limits():
    for method in flops.TRAINING:
        products = 2 if method in ("ssvi", "turbo_vbi") else 1  # of means and of variances
        dense = flops.training_flops(method, 100.0, 100.0, update_every=7)
        assert dense == pytest.approx(300.0 * products), method
    often, rarely = (flops.training_flops("rigl", 100.0, 20.0, update_every=n) for n in (1, 10**9))
    assert often == pytest.approx((60 + 140) / 2) and rarely == pytest.approx(60.0)


# --- parameters and bytes ----------------------------------------------------------------------------


def small():
    params = {"head": {"kernel": jnp.ones((16, 8), jnp.float32), "bias": jnp.zeros(8, jnp.bfloat16)}}
    masks = dense_masks(params)
    masks["head"]["kernel"] = jnp.arange(128).reshape(16, 8) % 64 == 0
    return params, masks


def test_parameters_and_bytes_by_hand():
    params, masks = small()
    assert flops.parameters(params) == (136, 136)
    assert flops.parameters(params, masks) == (136, 10)
    assert flops.bytes_dense(params) == 128 * 4 + 16


def test_soft_masks_count_their_nonzeros():
    params = {"kernel": jnp.ones((2, 3))}
    masks = {"kernel": jnp.array([[0.0, 0.5, 1.0], [0.0, 0.0, 0.2]])}
    assert flops.parameters(params, masks) == (6, 3)
    macs = {"kernel": 60}
    assert flops.inference_flops(macs, densities(masks)) == pytest.approx(60.0)


def test_bad_input():
    class Custom(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x @ self.param("kernel", linen.initializers.ones, (3, 2))

    with pytest.raises(
        ValueError, match="cannot count the MACs of kernel: its layer Custom is none of Dense, "
    ):
        macs_of(Custom(), (2, 3))
    with pytest.raises(ValueError, match="unknown method 'rigle'; did you mean 'rigl'"):
        flops.training_flops("rigle", 1.0, 1.0)
    with pytest.raises(ValueError, match="update_every=0 must be at least 1"):
        flops.training_flops("rigl", 1.0, 1.0, update_every=0)
    with pytest.raises(
        ValueError, match="the densities are of conv/kernel but the model's kernels are dense_0"
    ):
        flops.inference_flops(LENET, {"conv/kernel": 0.5})
