"""GQSA: its score against numpy, what the two stages may and may not change, and the packed result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import formats
from sparsejax.compress import statistics
from sparsejax.compress.gqsa import gqsa, group_pruning, pack, saliency
from sparsejax.compress.gqsa_stages import bqpo, e2e_oqp
from sparsejax.compress.quantise import dense, round_to_nearest
from sparsejax.formats import GroupQuantisedArray, is_packed
from sparsejax.masks import flatten
from sparsejax.models import Transformer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 50, 16)) @ RNG.normal(size=(16, 16))
STATS = statistics.of(("gram", "square"), jnp.asarray(X, jnp.float32))
KERNEL = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)


def test_saliency_is_that_of_optimal_brain_surgeon():
    h = 2 * np.asarray(STATS["gram"], float)
    h += 0.01 * np.diagonal(h).mean() * np.eye(16)
    expected = np.asarray(KERNEL, float) ** 2 / np.diagonal(np.linalg.inv(h))[:, None]
    np.testing.assert_allclose(saliency(KERNEL, STATS["gram"]), expected, rtol=1e-4)
    diagonal = jnp.diag(STATS["square"])  # then it is the square of Wanda's score, up to a factor
    wanda = (np.abs(KERNEL) * np.sqrt(STATS["square"])[:, None]) ** 2
    np.testing.assert_allclose(saliency(KERNEL, diagonal, 0.0), 2 * wanda, rtol=1e-4)


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_the_lowest_groups_are_dropped(scope):
    kernel, mask = group_pruning(scope=scope).prune(KERNEL, STATS, 0.5, "block:4x1")
    keep = np.asarray(mask).reshape(4, 4, 6)
    assert np.all(keep.all(1) == keep.any(1))
    means = np.asarray(saliency(KERNEL, STATS["gram"])).reshape(4, 4, 6).mean(1)
    if scope == "layer":
        assert keep.all(1).sum() == 12
        assert means[keep.all(1)].min() > means[~keep.all(1)].max()
    else:
        np.testing.assert_array_equal(keep.all(1).sum(0), 2)
    np.testing.assert_array_equal(kernel, np.where(mask, KERNEL, 0))
    full, mask = group_pruning().prune(KERNEL, STATS, 0.0, "block:4x1")
    assert bool(mask.all()) and full is KERNEL


def tiny():
    """A block of two layers, its parameters, masks of groups, and batches of inputs with the dense outputs."""
    params = {
        "up": {"kernel": KERNEL, "bias": jnp.ones(6)},
        "down": {"kernel": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)},
    }
    masks = {
        "up/kernel": group_pruning().prune(KERNEL, STATS, 0.25, "block:2x1")[1],
        "down/kernel": jnp.ones((6, 3), bool).at[:2, 1].set(False),
    }
    batches = [(jnp.asarray(x, jnp.float32), apply(params, jnp.asarray(x, jnp.float32))) for x in X]
    return params, masks, batches


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


@pytest.mark.slow
def test_stage_1_begins_with_rounding_and_ends_no_worse():
    params, masks, batches = tiny()
    start = bqpo(apply, params, masks, batches, bits=3, group=2, epochs=0)
    for name, mask in masks.items():
        expected = dense(round_to_nearest(flatten(params)[name], mask, bits=3, group=2))
        np.testing.assert_allclose(flatten(start.params)[name], expected, atol=1e-6)
    rates = dict(weight_rate=1e-2, scale_rate=1e-2)
    found = bqpo(apply, params, masks, batches, bits=3, group=2, epochs=8, **rates)
    assert found.losses[0] == pytest.approx(start.losses[0]) and len(found.losses) == 9
    reached = np.mean([np.mean((apply(found.params, x) - y) ** 2) for x, y in batches])
    assert reached == pytest.approx(min(found.losses), rel=1e-4)
    assert reached < 0.7 * found.losses[0]
    np.testing.assert_array_equal(found.params["up"]["bias"], params["up"]["bias"])
    for name, layer in found.layers.items():
        kernel = np.asarray(flatten(found.params)[name])
        np.testing.assert_array_equal(layer.mask, masks[name])
        assert np.all(kernel[~np.asarray(masks[name])] == 0)
        np.testing.assert_array_equal(kernel, dense(layer))
        assert np.all(np.asarray(layer.grid.scale) > 0) and layer.codes.max() <= 7
    steep = bqpo(apply, params, masks, batches, bits=3, group=2, epochs=2, weight_rate=50.0, scale_rate=1.0)
    assert min(steep.losses) == steep.losses[0]  # it diverges, and the start is what is kept
    for old, new in zip(jax.tree.leaves(steep.params), jax.tree.leaves(start.params), strict=True):
        np.testing.assert_array_equal(old, new)


def loss(params, batch):
    return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)


def test_stage_2_leaves_codes_and_masks():
    params, masks, batches = tiny()
    start = bqpo(apply, params, masks, batches, bits=3, group=2, epochs=0)
    found = e2e_oqp(loss, start.params, start.layers, batches, epochs=8, scale_rate=1e-2, zero_rate=1e-2)
    assert min(found.losses) < 0.9 * found.losses[0]
    for name, layer in found.layers.items():
        np.testing.assert_array_equal(layer.codes, start.layers[name].codes)
        np.testing.assert_array_equal(layer.mask, start.layers[name].mask)
        assert np.any(layer.grid.scale != start.layers[name].grid.scale)
        np.testing.assert_array_equal(flatten(found.params)[name], dense(layer))
    np.testing.assert_array_equal(found.params["up"]["bias"], params["up"]["bias"])
    packed = pack(found.params, found.layers)
    for name, leaf in (("up", packed["up"]), ("down", packed["down"])):
        np.testing.assert_array_equal(leaf["kernel"].to_dense(), found.params[name]["kernel"])


MODEL = Transformer(classes=11, depth=2, width=16, heads=2, mlp_ratio=2, max_length=8)


@pytest.mark.slow
def test_a_model_dense_and_packed(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 11, (6, 8))
    params = jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]
    method = gqsa(batch=4, block_epochs=2, weight_rate=1e-3, epochs=2, tune_rate=1e-3)
    result = method.run(MODEL, params, tokens, 0.5, "block:8x1", progress=False)
    report = result.report
    assert report["sparsity"] == 0.5 and len(report["layers"]) == 12
    assert set(report["blocks"]) == {"block_0", "block_1"}
    assert {len(losses) for losses in (*report["blocks"].values(), report["losses"])} == {3}
    for name, mask in flatten(result.masks).items():
        leaf = flatten(result.params)[name]
        if np.ndim(mask):
            assert np.all(np.asarray(leaf)[~np.asarray(mask)] == 0)
            assert mask.mean() == 0.5
        else:
            np.testing.assert_array_equal(leaf, flatten(params)[name])
    packed = gqsa(batch=4, block_epochs=2, weight_rate=1e-3, epochs=2, tune_rate=1e-3, packed=True).run(
        MODEL, params, tokens, 0.5, "block:8x1", progress=False
    )
    kernel = packed.params["block_0"]["attention"]["query"]["kernel"]
    assert isinstance(kernel, GroupQuantisedArray)
    formats.save(tmp_path / "model.safetensors", packed.params)
    loaded = formats.load(tmp_path / "model.safetensors")
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(loaded, is_leaf=is_packed), strict=True):
        np.testing.assert_array_equal(a, b.to_dense() if is_packed(b) else b)
    run = jax.jit(lambda params: MODEL.apply({"params": params}, tokens))
    np.testing.assert_allclose(run(loaded), run(result.params), atol=1e-4)


@jax.jit
def outputs_of(params, hidden):
    """Of one block of `MODEL`."""
    return MODEL.block(0).apply({"params": params}, hidden)


@pytest.mark.slow
def test_stage_1_of_a_block_sees_the_compressed_blocks_before():
    """Both losses of untrained blocks by hand: inputs and targets of the second come behind the compressed first."""
    tokens = np.random.default_rng(0).integers(0, 11, (6, 8))
    params = jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]
    result = gqsa(batch=6, block_epochs=0, epochs=0).run(
        MODEL, params, tokens, 0.5, "block:8x1", progress=False
    )
    hidden = MODEL.apply({"params": params}, tokens, method="start")
    for name in ("block_0", "block_1"):
        new = outputs_of(result.params[name], hidden)
        expected = np.mean((outputs_of(params[name], hidden) - new) ** 2)
        np.testing.assert_allclose(result.report["blocks"][name], [expected], rtol=1e-4)
        hidden = new


@pytest.mark.slow
def test_bfloat16_packed_is_what_was_trained():
    """Grouped keys and a tied head, too; packed or not, weights and losses are the same bits."""
    model = Transformer(
        11, depth=1, width=16, heads=4, kv_heads=2, hidden=16, max_length=8, tied=True, bias=()
    )
    tokens = np.random.default_rng(0).integers(0, 11, (4, 8))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16), shapes)
    settings = dict(batch=4, block_epochs=1, weight_rate=1e-2, tune_rate=1e-2, distil={"k": 3})
    plain, packed = (
        gqsa(**settings, packed=packed).run(model, params, tokens, 0.5, "block:4x1", progress=False)
        for packed in (False, True)
    )
    assert plain.report == packed.report and np.all(np.isfinite(plain.report["losses"]))
    leaves = jax.tree.leaves(packed.params, is_leaf=is_packed)
    for old, a, b in zip(*map(jax.tree.leaves, (params, plain.params)), leaves, strict=True):
        assert a.dtype == b.dtype == old.dtype
        np.testing.assert_array_equal(a, b.to_dense() if is_packed(b) else b)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens))
    found, expected = run(packed.params), run(plain.params)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected)), rtol=0.05, atol=0.5)


def test_what_cannot_be_is_said_before_any_work():
    model = MODEL.clone(layers=({}, {"hidden": 24}))
    tokens = np.zeros((2, 8), int)

    def run(model, sparsity=0.5, pattern=None, **settings):
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        params = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), shapes)  # any work would end in an error
        return gqsa(**settings).run(model, params, tokens, sparsity, pattern, progress=False)

    for pattern in (None, "unstructured", "block:16x1"):
        with pytest.raises(
            ValueError, match="groups of 16 inputs do not divide the 24 inputs of block_1/mlp/down"
        ):
            run(model, pattern=pattern)
    with pytest.raises(ValueError, match="gqsa packs groups of even size, got groups of 1 inputs"):
        run(model, pattern="block:1x1", packed=True)
    with pytest.raises(ValueError, match="gqsa cannot do experts, and block_0/mlp/up/kernel has 2"):
        run(MODEL.clone(experts=2))
    for pattern in ("2:4", "block:4x4"):
        with pytest.raises(
            ValueError, match=r"gqsa cannot do the pattern .* \(it can do: block:Gx1 such as block:16x1"
        ):
            run(MODEL, pattern=pattern)
    with pytest.raises(ValueError, match="k=12 of topkld exceeds the 11 classes"):
        run(MODEL, distil={"k": 12})
    with pytest.raises(
        ValueError, match="^block_0/attention/key/kernel: the Gram matrix of the inputs is not finite"
    ):
        run(MODEL)


@pytest.mark.slow
def test_many_bits_and_no_sparsity_are_the_model_itself():
    tokens = np.random.default_rng(0).integers(0, 11, (6, 8))
    params = jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]
    result = gqsa(bits=16, batch=4, block_epochs=0, epochs=0).run(MODEL, params, tokens, 0.0, progress=False)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="gqsa packs codes of at most 4 bits, got bits=8"):
        gqsa(bits=8, packed=True)
    with pytest.raises(ValueError, match="unknown scope 'rows'; did you mean 'row'"):
        gqsa(scope="rows")
    with pytest.raises(ValueError, match="pattern block:Gx1 must divide the 16 inputs, got 5"):
        group_pruning().prune(KERNEL, STATS, 0.5, "block:5x1")
    for pattern in ("block:4x4", "2:4"):
        with pytest.raises(
            ValueError, match=rf"group_pruning cannot do the pattern {pattern} \(it can do: block:Gx1"
        ):
            group_pruning().prune(KERNEL, STATS, 0.5, pattern)
    for settings, message in (
        ({"bits": 17}, "bits must be an integer from 1 to 16, got 17"),
        ({"epochs": -1}, "epochs of gqsa must be at least 0, got -1"),
        ({"distil": {"k": 0}}, "k of topkld must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gqsa(**settings)
    params, masks, batches = tiny()
    with pytest.raises(ValueError, match="up/kernels is not among the parameters"):
        bqpo(apply, params, {"up/kernels": masks["up/kernel"]}, batches)
    with pytest.raises(ValueError, match="gqsa cannot be trained without a batch"):
        bqpo(apply, params, masks, [], group=2)
    with pytest.raises(ValueError, match="epochs of gqsa must be at least 0, got -1"):
        bqpo(apply, params, masks, batches, group=2, epochs=-1)
