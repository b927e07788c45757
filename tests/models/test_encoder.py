"""The encoder against plain numpy, its padding, its heads and sentence embeddings, and its messages."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest

from sparsejax.masks import flatten
from sparsejax.models import build, sentence_embeddings

TOKENS = np.random.default_rng(0).integers(3, 11, (2, 6))
TYPES = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
BASE = {"vocabulary": 11, "depth": 2, "width": 8, "heads": 2, "hidden": 12, "max_length": 7}


def start(classes=0, **kw):
    model = build("encoder", classes, **{**BASE, **kw})
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def run(model, params, tokens=TOKENS, **kw):
    return jax.jit(model.apply)({"params": params}, tokens, **kw)


def reference(params, places=None):
    places = np.tile(np.arange(6), (2, 1)) if places is None else places
    return numpy_models.bert(params, TOKENS, TYPES, MASK, places, heads=2, epsilon=1e-12)


def test_bert_is_its_equations():
    model, params = start()
    out = run(model, params, types=TYPES, mask=MASK)
    np.testing.assert_allclose(out, reference(params), rtol=2e-4, atol=2e-4)
    plain = run(model, params)
    default = run(model, params, types=np.zeros_like(TYPES), mask=np.ones_like(MASK))
    np.testing.assert_allclose(plain, default, atol=1e-6)
    assert np.abs(plain - out).max() > 0.02


@pytest.mark.parametrize("side", ["right", "left"])
def test_roberta_counts_positions_from_its_padding_token_on(side):
    model, params = start(pad=1, position_offset=2)
    assert params["positions"]["embedding"].shape == (9, 8)
    mask = MASK if side == "right" else MASK[:, ::-1]
    tokens = np.where(mask, TOKENS, 1)
    places = np.where(mask, 1 + np.cumsum(mask, axis=1), 1)  # the padding has the row of its own number
    expected = numpy_models.bert(params, tokens, TYPES, mask, places, heads=2, epsilon=1e-12)
    np.testing.assert_allclose(run(model, params, tokens, types=TYPES), expected, rtol=2e-4, atol=2e-4)
    hidden = mask.copy()
    hidden[0, 2] = 0  # a mask hides a token, but its place still counts
    expected = numpy_models.bert(params, tokens, TYPES, hidden, places, heads=2, epsilon=1e-12)
    found = run(model, params, tokens, types=TYPES, mask=hidden)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_padding_is_not_seen():
    model, params = start(4, pad=0, pool="mean", pooler=True)
    padded = np.where(MASK, TOKENS, 0)
    short = run(model, params, padded[1:, :4])
    np.testing.assert_allclose(run(model, params, padded)[1:], short, rtol=1e-4, atol=1e-5)
    assert np.abs(run(model, params)[1:] - short).max() > 1e-3


def test_sentence_embeddings_are_means_over_the_mask_of_unit_length():
    model, params = start()
    hidden = numpy_models.bert(
        params, TOKENS, 0 * TYPES, MASK, np.tile(np.arange(6), (2, 1)), heads=2, epsilon=1e-12
    )
    means = np.stack([hidden[0].mean(0), hidden[1, :4].mean(0)])
    raw = sentence_embeddings(model, params, TOKENS, MASK, normalise=False)
    np.testing.assert_allclose(raw, means, rtol=1e-3, atol=1e-4)
    unit = sentence_embeddings(model, params, TOKENS, MASK)
    np.testing.assert_allclose(
        unit, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-3, atol=1e-4
    )
    lazy = MappingProxyType(params)  # a mapping that is no pytree
    np.testing.assert_array_equal(sentence_embeddings(model, lazy, TOKENS, MASK, normalise=False), raw)
    first = sentence_embeddings(model, params, TOKENS, MASK, pool="first", normalise=False)
    np.testing.assert_allclose(first, hidden[:, 0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="unknown pool 'max'"):
        sentence_embeddings(model, params, TOKENS, pool="max")


def test_heads_are_their_formulas():
    model, params = start(4, pool="first", pooler=True)
    p = numpy_models.double(params)
    pooled = np.tanh(numpy_models.affine(p["pooler"], reference(params)[:, 0]))
    out = run(model, params, types=TYPES, mask=MASK)
    np.testing.assert_allclose(out, numpy_models.affine(p["head"], pooled), rtol=1e-3, atol=1e-3)

    model, params = start(11, tied=True)
    p = numpy_models.double(params)
    x = numpy_models.gelu(numpy_models.affine(p["transform"], reference(params)))
    x = numpy_models.layer_norm(p["transform_norm"], x, 1e-12)
    out = run(model, params, types=TYPES, mask=MASK)
    np.testing.assert_allclose(out, x @ p["embed"]["embedding"].T + p["head_bias"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "classes, kw",
    [(0, {}), (5, {"pool": "mean", "pooler": True, "pad": 1, "position_offset": 2}), (11, {"tied": True})],
)
def test_block_by_block_is_the_whole_bit_for_bit(classes, kw):
    model, params = start(classes, **kw)
    parts = model.parts()
    assert set(parts) == set(params) and len(parts) == len(params)
    tokens = np.where(MASK, TOKENS, 1)
    split = parts.index("block_0"), parts.index("block_1") + 1
    first, last = ({name: params[name] for name in names} for names in (parts[: split[0]], parts[split[1] :]))
    x = model.apply({"params": first}, tokens, method="start")
    context = model.context(tokens)
    for i in range(2):
        x = model.block(i).apply({"params": params[f"block_{i}"]}, x, **context)
    last |= {"embed": params["embed"]} if model.tied else {}
    out = model.apply({"params": last}, x, method="finish", **context)
    np.testing.assert_array_equal(out, model.apply({"params": params}, tokens))
    assert model.context(6) == {}


def test_layers_shrink_blocks():
    layers = [{"heads": 1, "bias": ("out",)}, {"hidden": 5}]
    shapes = {name: leaf.shape for name, leaf in flatten(start(layers=layers)[1]).items()}
    assert shapes["block_0/attention/query/kernel"] == (8, 4) and "block_0/attention/query/bias" not in shapes
    assert shapes["block_1/mlp/up/kernel"] == (8, 5)


def test_bfloat16_is_close():
    model, params = start(dtype="bfloat16")
    out, exact = run(model, params, types=TYPES, mask=MASK), reference(params)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"activation": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
        ({"pool": "max"}, r"unknown pool 'max'.*\(known: first, mean\)"),
        ({"pooler": True}, "an encoder with a pooler needs a pool, got None"),
        ({"heads": 3}, "heads=3 of an encoder must divide its width=8"),
        ({"vocabulary": None}, "an encoder with classes=0 needs its vocabulary, got None"),
        ({"tied": True}, "a tied encoder gives every token a logit .* vocabulary of 11, but has classes=0"),
        ({"layers": [{"experts": 2}, {}]}, r"unknown entry of layers\[0\] of an encoder: 'experts'"),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        start(**keywords)


def test_a_sequence_longer_than_the_positions():
    with pytest.raises(ValueError, match="sequences of 8 tokens exceed max_length=7"):
        start()[0].init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
