"""The decoder against plain numpy for every family, against the model as it was before, and block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest
from flax import linen
from flax.linen.initializers import normal

from sparsejax import nn
from sparsejax.flops import layer_macs
from sparsejax.masks import apply_masks, flatten
from sparsejax.models import build

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7))
BASE = {"depth": 2, "width": 8, "heads": 4, "hidden": 12, "max_length": 9}
LLAMA = {
    "norm": "rms",
    "epsilon": 1e-5,
    "positions": "rotary",
    "rotary_theta": 100.0,
    "activation": "silu",
    "gated": True,
    "bias": (),
    "kv_heads": 2,
}
FAMILIES = {
    "gpt2": {"epsilon": 1e-5, "tied": True},
    "opt": {"epsilon": 1e-5, "tied": True, "activation": "relu", "position_offset": 2},
    "llama": LLAMA,
    "mistral": {**LLAMA, "window": 3},
    "mixtral": {**LLAMA, "experts": 5, "experts_per_token": 2},
    "qwen2": {**LLAMA, "bias": ("query", "key", "value")},
    "qwen3": {**LLAMA, "qk_norm": True, "head_width": 6},
}


def start(tokens=TOKENS, **kw):
    """A model and parameters that are all random, biases and scales included."""
    model = build("transformer", 11, **{**BASE, **kw})
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def run(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS)


def reference(family, params, tokens=TOKENS):
    kw = {**BASE, **FAMILIES[family]}
    if family in ("gpt2", "opt"):
        activation = numpy_models.gelu_tanh if family == "gpt2" else lambda x: np.maximum(x, 0)
        offset = kw.get("position_offset", 0)
        return numpy_models.gpt2(
            params, tokens, heads=4, epsilon=1e-5, activation=activation, position_offset=offset
        )
    return numpy_models.llama(
        params,
        tokens,
        heads=4,
        kv_heads=2,
        theta=100.0,
        epsilon=1e-5,
        window=kw.get("window"),
        qk_norm=kw.get("qk_norm", False),
        experts_per_token=2 if kw.get("experts") else None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_its_equations(family):
    model, params = start(**FAMILIES[family])
    out = run(model, params)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference(family, params), rtol=2e-4, atol=2e-4)


def test_names_and_shapes_of_the_parameters():
    shapes = {name: leaf.shape for name, leaf in flatten(start(**FAMILIES["qwen3"])[1]).items()}
    in_block = {
        "norm_0/scale": (8,),
        "norm_1/scale": (8,),
        "attention/query/kernel": (8, 24),
        "attention/key/kernel": (8, 12),
        "attention/value/kernel": (8, 12),
        "attention/out/kernel": (24, 8),
        "attention/query_norm/scale": (6,),
        "attention/key_norm/scale": (6,),
        "mlp/up/kernel": (8, 12),
        "mlp/gate/kernel": (8, 12),
        "mlp/down/kernel": (12, 8),
    }
    expected = {f"block_{i}/{name}": shape for i in range(2) for name, shape in in_block.items()}
    ends = {"embed/embedding": (11, 8), "norm/scale": (8,), "head/kernel": (8, 11)}
    assert shapes == expected | ends
    mixed = flatten(start(**FAMILIES["mixtral"])[1])
    assert mixed["block_1/mlp/router/kernel"].shape == (8, 5)
    assert mixed["block_1/mlp/gate/kernel"].shape == (5, 8, 12)
    assert mixed["block_1/mlp/down/kernel"].shape == (5, 12, 8)
    opt = flatten(start(**FAMILIES["opt"])[1])
    assert opt["positions/embedding"].shape == (11, 8) and not any("head" in name for name in opt)


class Before(linen.Module):
    """The decoder of the committed tables, written out."""

    width: int = 32
    heads: int = 4
    dtype: str | None = None

    @linen.compact
    def __call__(self, tokens):
        def dense(features, name, x, **kwargs):
            return nn.Dense(features, dtype=self.dtype, name=name, **kwargs)(x)

        positions = nn.Embed(16, self.width, embedding_init=normal(0.02), name="positions")
        x = nn.Embed(50, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="embed")(tokens)
        x = x + positions(jnp.arange(tokens.shape[1])).astype(x.dtype)
        for i in range(2):
            x = BlockBefore(self.heads, self.dtype, name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return dense(50, "head", x, use_bias=False).astype(jnp.float32)


class BlockBefore(linen.Module):
    heads: int
    dtype: str | None

    @linen.compact
    def __call__(self, x):
        x = x + AttentionBefore(self.heads, self.dtype, name="attention")(
            nn.LayerNorm(dtype=self.dtype, name="norm_0")(x)
        )
        return x + MlpBefore(self.dtype, name="mlp")(nn.LayerNorm(dtype=self.dtype, name="norm_1")(x))


class AttentionBefore(linen.Module):
    heads: int
    dtype: str | None

    @linen.compact
    def __call__(self, x):
        width = x.shape[-1]
        q, k, v = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return nn.Dense(width, dtype=self.dtype, name="out")(y.reshape(x.shape))


class MlpBefore(linen.Module):
    dtype: str | None

    @linen.compact
    def __call__(self, x):
        hidden = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="up")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(linen.gelu(hidden))


@pytest.mark.parametrize("dtype", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_defaults_are_the_model_of_the_committed_tables_bit_for_bit(dtype):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    model = build("transformer", 50, depth=2, width=32, heads=4, max_length=16, dtype=dtype)
    old, new = (m.init(jax.random.key(0), tokens)["params"] for m in (Before(dtype=dtype), model))
    jax.tree.map(np.testing.assert_array_equal, old, new)

    def loss(model):
        @jax.jit
        def value(params):
            logits = model.apply({"params": params}, tokens)
            return jnp.mean(logits**2), logits

        return jax.value_and_grad(value, has_aux=True)

    jax.tree.map(np.testing.assert_array_equal, loss(Before(dtype=dtype))(old), loss(model)(old))
    logits = np.asarray(loss(model)(old)[0][1])
    if dtype is None:  # recorded when the model had no other attributes
        np.testing.assert_allclose(logits[0, -1, :3], [1.3225709, 1.3045633, 0.9006962], rtol=2e-5)
        np.testing.assert_allclose(np.abs(logits).sum(dtype=np.float64), 949.7970224, rtol=1e-5)


STREAMS = ({"stream": [8, 6, 5]}, {"stream": [5, 4, 7], "hidden": 3})


@pytest.mark.parametrize(
    "kw",
    [FAMILIES["opt"], FAMILIES["qwen3"], {**LLAMA, "head_width": 2, "layers": STREAMS, "norm_width": 8}],
    ids=["opt", "qwen3", "stream"],
)
def test_block_by_block_is_the_whole_bit_for_bit(kw):
    model, params = start(**kw)
    assert set(model.parts()) == set(params) and len(model.parts()) == len(params)
    assert hash(model) == hash(start(**kw)[0])
    first = [name for name in ("embed", "positions") if name in params]
    last = ["norm", "embed" if model.tied else "head"]
    assert list(model.parts()) == first + ["block_0", "block_1"] + [x for x in last if x != "embed"]

    def some(names):
        return {"params": {name: params[name] for name in names}}

    x = model.apply(some(first), TOKENS, method="start")
    context = model.context(TOKENS)
    assert jax.tree.all(jax.tree.map(np.array_equal, context, model.context(TOKENS.shape[1])))
    for i in range(2):
        x = model.block(i).apply({"params": params[f"block_{i}"]}, x, **context)
    out = model.apply(some(last), x, method="finish")
    np.testing.assert_array_equal(out, model.apply({"params": params}, TOKENS))


def test_layers_replace_the_sizes_of_their_block():
    layers = [{"heads": 2, "kv_heads": 1, "bias": ["out", "down"]}, {"hidden": 5, "experts": 3}]
    model, params = start(**{**LLAMA, "layers": layers})
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    assert shapes["block_0/attention/query/kernel"] == (8, 4) and shapes["block_0/attention/key/kernel"] == (
        8,
        2,
    )
    assert shapes["block_0/attention/out/bias"] == (8,) and shapes["block_0/mlp/down/bias"] == (8,)
    assert "block_0/mlp/up/bias" not in shapes
    assert shapes["block_1/attention/query/kernel"] == (8, 8)
    assert shapes["block_1/mlp/up/kernel"] == (3, 8, 5)
    assert jax.eval_shape(lambda params: run(model, params), params).shape == (2, 7, 11)


def test_removed_heads_and_channels_are_those_that_were_zero():
    model, params = start(**LLAMA)
    small, _ = start(**LLAMA, layers=[{"heads": 2, "kv_heads": 1}, {"hidden": 9}])
    zeroed, cut = (jax.tree.map(lambda x: x, params) for _ in range(2))
    attention = params["block_0"]["attention"]  # the second key-value head serves the queries 2 and 3
    zeroed["block_0"]["attention"]["out"]["kernel"] = attention["out"]["kernel"].at[4:].set(0)
    cut["block_0"]["attention"] = {
        "query": {"kernel": attention["query"]["kernel"][:, :4]},
        "key": {"kernel": attention["key"]["kernel"][:, :2]},
        "value": {"kernel": attention["value"]["kernel"][:, :2]},
        "out": {"kernel": attention["out"]["kernel"][:4]},
    }
    mlp = params["block_1"]["mlp"]
    zeroed["block_1"]["mlp"]["down"]["kernel"] = mlp["down"]["kernel"].at[9:].set(0)
    cut["block_1"]["mlp"] = {
        "up": {"kernel": mlp["up"]["kernel"][:, :9]},
        "gate": {"kernel": mlp["gate"]["kernel"][:, :9]},
        "down": {"kernel": mlp["down"]["kernel"][:9]},
    }
    expected = run(model, zeroed)
    np.testing.assert_allclose(run(small, cut), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - run(model, params)).max() > 1e-2


def test_without_heads_and_hidden_width_a_block_is_its_residual():
    model, params = start(**LLAMA, layers=[{"heads": 0, "hidden": 0}, {"heads": 0}])
    assert "block_0" not in params and set(params["block_1"]) == {"norm_1", "mlp"}
    assert model.parts() == ("embed", "block_0", "block_1", "norm", "head")
    whole, full = start(**LLAMA)
    for path in (
        ("block_0", "attention", "out"),
        ("block_0", "mlp", "down"),
        ("block_1", "attention", "out"),
    ):
        leaf = full[path[0]][path[1]][path[2]]
        leaf["kernel"] = jnp.zeros_like(leaf["kernel"])
    kept = {name: full[name] for name in ("embed", "norm", "head")}
    kept["block_1"] = {name: full["block_1"][name] for name in ("norm_1", "mlp")}
    np.testing.assert_allclose(run(model, kept), run(whole, full), atol=1e-5)


def test_a_stream_in_rotated_coordinates_is_the_same_function():
    """x Q instead of x, by an orthogonal Q of each site, changes nothing if every matrix undoes it."""
    model, params = start(**LLAMA)
    for name in ("norm_0", "norm_1"):  # a norm that scales does not commute with a rotation
        for i in range(2):
            params[f"block_{i}"][name]["scale"] = jnp.ones(8)
    params["norm"]["scale"] = jnp.ones(8)
    rng = np.random.default_rng(3)
    q = [jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0], jnp.float32) for _ in range(5)]
    turned = jax.tree.map(lambda x: x, params)
    turned["embed"]["embedding"] = params["embed"]["embedding"] @ q[0]
    for i in range(2):
        before, middle, after = q[2 * i : 2 * i + 3]
        block, old = turned[f"block_{i}"], params[f"block_{i}"]
        for name in ("query", "key", "value"):
            block["attention"][name]["kernel"] = before.T @ old["attention"][name]["kernel"]
        block["attention"]["out"]["kernel"] = old["attention"]["out"]["kernel"] @ middle
        for name in ("up", "gate"):
            block["mlp"][name]["kernel"] = middle.T @ old["mlp"][name]["kernel"]
        block["mlp"]["down"]["kernel"] = old["mlp"]["down"]["kernel"] @ after
        block |= {"shortcut_0": before.T @ middle, "shortcut_1": middle.T @ after}
    turned["head"]["kernel"] = q[4].T @ params["head"]["kernel"]
    sliced, _ = start(**LLAMA, layers=[{"stream": (8, 8, 8)}] * 2)
    np.testing.assert_allclose(run(sliced, turned), run(model, params), atol=5e-5)


def test_fewer_coordinates_keep_the_divisor_of_their_norms():
    """With zeros in the last coordinates of the stream, cutting them off changes nothing."""
    layers = [{"stream": (5, 5, 5)}] * 2
    narrow, params = start(**{**LLAMA, "width": 5, "head_width": 2, "layers": layers, "norm_width": 8})
    for i in range(2):
        params[f"block_{i}"] |= {"shortcut_0": jnp.eye(5), "shortcut_1": jnp.eye(5)}
    wide, _ = start(**LLAMA)

    def pad(path, leaf):
        name = jax.tree_util.keystr(path)
        streams = [axis for axis, size in enumerate(leaf.shape) if size == 5]
        if "shortcut" in name:
            return None
        return jnp.pad(leaf, [(0, 3 if axis in streams else 0) for axis in range(leaf.ndim)])

    full = jax.tree_util.tree_map_with_path(pad, params)
    for i in range(2):
        del full[f"block_{i}"]["shortcut_0"], full[f"block_{i}"]["shortcut_1"]
    expected = run(wide, full)
    np.testing.assert_allclose(run(narrow, params), expected, rtol=1e-4, atol=1e-5)
    actual, _ = start(**{**LLAMA, "width": 5, "head_width": 2, "layers": layers})
    assert np.abs(run(actual, params) - expected).max() > 1e-2


def test_every_weight_can_be_masked():
    model, params = start(**FAMILIES["mixtral"])
    rng = np.random.default_rng(2)
    masks = jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape) < 0.5 if p.ndim > 1 else True), params)
    out = jax.jit(model.apply)({"params": params, "masks": masks}, TOKENS)
    np.testing.assert_allclose(out, run(model, apply_masks(params, masks)), rtol=1e-5, atol=1e-5)
    assert np.abs(out - run(model, params)).max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_bfloat16_is_close(family):
    model, params = start(**FAMILIES[family])
    coarse = model.clone(dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = reference(family, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    out = run(coarse, rounded)
    x = jax.eval_shape(lambda p: coarse.apply({"params": p}, TOKENS, method="start"), rounded)
    hidden = jax.eval_shape(
        lambda p, x: coarse.block(0).apply({"params": p}, x, **coarse.context(7)), rounded["block_0"], x
    )
    assert x.dtype == hidden.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).mean() < 0.05 * np.abs(exact).mean()


def test_the_cost_of_experts_is_that_of_the_chosen_ones():
    model, params = start(**FAMILIES["mixtral"])
    macs = layer_macs(model, {"params": params}, TOKENS)
    assert macs["block_0/mlp/up/kernel"] == 7 * 2 * 8 * 12
    assert (
        macs["block_0/mlp/down/kernel"] == 7 * 2 * 8 * 12 and macs["block_0/mlp/router/kernel"] == 7 * 8 * 5
    )


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"activation": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
        ({"norm": "batch"}, r"unknown norm 'batch'.*\(known: layer, rms\)"),
        ({"positions": "sine"}, r"unknown positions 'sine'.*\(known: learned, rotary\)"),
        ({"heads": 3}, "heads=3 of a transformer must divide its width=8"),
        ({"kv_heads": 3}, "kv_heads=3 in block_0 of a transformer must divide its heads=4"),
        (
            {"bias": ("querry",)},
            "unknown projection with a bias in block_0 .* 'querry'; did you mean 'query'",
        ),
        ({"window": 0}, "window=0 of a transformer must be at least 1"),
        ({"experts": 2, "experts_per_token": 0}, "experts_per_token=0 of a transformer must be at least 1"),
        ({"norm_width": 4}, "norm_width=4 of a transformer needs norm='rms', got 'layer'"),
        ({"tied": True, "head_bias": True}, "a tied transformer has no bias of the head .* head_bias=True"),
        ({"layers": [{}]}, "layers=1 mappings do not fit depth=2 of a transformer"),
        (
            {"layers": [{}, {"head": 2}]},
            r"unknown entry of layers\[1\] of a transformer: 'head'; did you mean 'heads'",
        ),
        ({"layers": [{"stream": (8, 4)}, {}]}, r"stream=\(8, 4\) in block_0 .* three positive widths, .* 8"),
        ({"layers": [{"stream": (8, 4, 4)}, {"stream": (8, 4, 4)}]}, "in block_1 .* the first of them 4"),
        ({"hidden": -1}, "hidden=-1 in block_0 of a transformer must not be negative"),
        (
            {"experts": 4, "linear": {"name": "monarch"}},
            "experts=4 in block_0 .* have dense kernels, not linear=",
        ),
        ({"positions": "rotary", "head_width": 3}, "heads of even width, got 3"),
        (
            {"positions": "rotary", "rotary_scaling": {"rope_type": "yarn"}},
            "unknown rope_type 'yarn'.*llama3",
        ),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        build("transformer", 11, **{**BASE, **keywords})
