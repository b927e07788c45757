"""A shrunk model against the same model with zeros (or closed experts) in place of what was removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.shrink import linear_weights, shrink, sizes_of
from sparsejax.models import Transformer

TOKENS = np.random.default_rng(9).integers(0, 31, (2, 11))
GPT = dict(classes=31, depth=2, width=16, heads=4, max_length=16)
LLAMA = dict(
    **GPT, norm="rms", positions="rotary", activation="silu", gated=True, bias=(), kv_heads=2, hidden=24
)


def noisy(model, seed=0):
    """Random parameters in which nothing is zero or one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


def zeroed(params, path, rows):
    """The parameters with zeros in some rows of a kernel."""
    *parents, last = path.split("/")
    node = params = jax.tree.map(lambda leaf: leaf, params)
    for name in parents:
        node = node[name]
    node[last] = {**node[last], "kernel": node[last]["kernel"].copy()}
    node[last]["kernel"][..., rows, :] = 0
    return params


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS)


def close(a, b, params_a, params_b):
    np.testing.assert_allclose(logits(b, params_b), logits(a, params_a), rtol=1e-5, atol=1e-5)


def rows(heads, width=4):
    return np.ravel([np.arange(head * width, (head + 1) * width) for head in heads])


@pytest.mark.parametrize(
    ("keywords", "kept"),
    [
        (GPT, [3, 1]),
        (LLAMA, [2, 3]),
        (LLAMA, [3, 0]),
        pytest.param(LLAMA | {"qk_norm": True}, [0, 1], marks=pytest.mark.slow),
    ],
)
def test_heads(keywords, kept):
    model = Transformer(**keywords)
    params = noisy(model)
    small, less = shrink(model, params, heads={1: kept})
    gone = rows(sorted(set(range(4)) - set(kept)))
    close(model, small, zeroed(params, "block_1/attention/out", gone), less)
    assert less["block_1"]["attention"]["query"]["kernel"].shape == (16, 8)
    assert sizes_of(small, 1)["heads"] == 2 and sizes_of(small, 0)["heads"] == 4
    kv_heads = 2 if keywords is GPT or kept == [3, 0] else 1
    assert less["block_1"]["attention"]["value"]["kernel"].shape == (16, 4 * kv_heads)


@pytest.mark.parametrize(
    "keywords",
    [GPT, LLAMA, pytest.param(LLAMA | {"experts": 3, "bias": ("up", "down")}, marks=pytest.mark.slow)],
)
def test_channels(keywords):
    model = Transformer(**keywords)
    params = noisy(model)
    hidden, kept = sizes_of(model, 0)["hidden"], [5, 2, 3, 11]
    small, less = shrink(model, params, channels={0: kept, 1: range(hidden)})
    gone = np.setdiff1d(np.arange(hidden), kept)
    close(model, small, zeroed(params, "block_0/mlp/down", gone), less)
    assert less["block_0"]["mlp"]["up"]["kernel"].shape[-1] == 4
    matrices = keywords.get("experts", 1) * (3 if keywords.get("gated") else 2)
    assert linear_weights(params, 2) - linear_weights(less, 2) == (hidden - 4) * 16 * matrices


@pytest.mark.parametrize("bias", [pytest.param((), marks=pytest.mark.slow), ("out", "down")])
@pytest.mark.parametrize(("heads", "channels"), [([0], [1]), ([1], [0]), ([0, 1], [0, 1])])
def test_sub_blocks_that_go_leave_their_bias(bias, heads, channels):
    model = Transformer(**LLAMA | {"bias": bias})
    params = noisy(model)
    masked = params
    for i in heads:
        masked = zeroed(masked, f"block_{i}/attention/out", list(range(16)))
    for i in channels:
        masked = zeroed(masked, f"block_{i}/mlp/down", list(range(24)))
    small, less = shrink(model, params, heads=dict.fromkeys(heads, ()), channels=dict.fromkeys(channels, ()))
    close(model, small, masked, less)
    assert not any("attention" in less[f"block_{i}"] for i in heads)
    assert not any("norm_1" in less[f"block_{i}"] for i in channels)


@pytest.mark.slow
def test_biases_move_to_learned_positions_and_to_experts():
    model = Transformer(**GPT | {"tied": True})
    params = noisy(model)
    small, less = shrink(model, params, heads={0: ()})
    close(model, small, zeroed(params, "block_0/attention/out", list(range(16))), less)
    model = Transformer(**LLAMA | {"experts": 3, "bias": ("out",)})
    params = noisy(model)
    small, less = shrink(model, params, heads={1: ()})
    close(model, small, zeroed(params, "block_1/attention/out", list(range(16))), less)
    assert less["block_0"]["mlp"]["down"]["bias"].shape == (3, 16)


@pytest.mark.parametrize("kept", [[3, 1], [2]])
def test_experts(kept):
    model = Transformer(**LLAMA | {"experts": 4, "depth": 1})  # two per token: all that are left have a say
    params = noisy(model)
    small, less = shrink(model, params, experts={0: kept}, heads={0: ()})
    part = params["block_0"]
    x = np.random.default_rng(3).normal(size=(1, 7, 16)).astype(np.float32)
    inputs = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * part["norm_1"]["scale"]
    weights = np.exp(inputs @ part["mlp"]["router"]["kernel"][:, kept])
    weights /= weights.sum(-1, keepdims=True)
    expected = x
    for expert, weight in zip(kept, np.moveaxis(weights, -1, 0), strict=True):
        up, gate, down = (part["mlp"][name]["kernel"][expert] for name in ("up", "gate", "down"))
        gates = inputs @ gate
        expected = expected + weight[..., None] * (gates / (1 + np.exp(-gates)) * (inputs @ up) @ down)
    found = jax.jit(small.block(0).apply)({"params": less["block_0"]}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert less["block_0"]["mlp"]["up"]["kernel"].shape == (len(kept), 16, 24)


@pytest.mark.parametrize(
    "keywords",
    [LLAMA, pytest.param(LLAMA | {"tied": True, "qk_norm": True, "experts": 2}, marks=pytest.mark.slow)],
)
def test_residual_channels(keywords):
    model = Transformer(**keywords)
    params, kept = noisy(model), [0, 14, 3, 4, 9, 10]
    gone = np.setdiff1d(np.arange(16), kept)

    def silence(path, leaf):
        path = [key.key for key in path]
        writes = path[0] == "embed" or path[-2] in ("out", "down")
        return np.where(np.isin(np.arange(leaf.shape[-1]), gone), 0, leaf) if writes else leaf

    masked = jax.tree_util.tree_map_with_path(silence, params)
    small, less = shrink(model, params, width=kept)
    close(model, small, masked, less)
    assert less["embed"]["embedding"].shape == (31, 6)
    again, least = shrink(small, less, width=[1, 2], channels={0: [0]})
    assert logits(again, least).shape == (2, 11, 31) and again.norm_width == 16


def test_everything_kept_is_the_model_itself():
    model = Transformer(**LLAMA)
    params = noisy(model)
    small, same = shrink(model, params, heads={0: range(4)}, channels={1: range(24)})
    assert small == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_lazy_parts_and_dtypes():
    model = Transformer(**LLAMA | {"dtype": "bfloat16"})
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), noisy(model))
    _, less = shrink(model, params, heads={1: [0, 1]}, channels={0: [1]}, width=[1, 2, 3])
    assert {leaf.dtype for leaf in jax.tree.leaves(less)} == {jnp.dtype(jnp.bfloat16)}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(less))


@pytest.mark.parametrize(
    ("keywords", "removed", "message"),
    [
        ({}, {"heads": {2: [0]}}, "heads names block 2, but the blocks are 0 to 1"),
        (
            {},
            {"heads": {0: [4]}},
            r"each head that block 0 keeps must be named once and lie in 0 to 3, got \[4\]",
        ),
        (
            {},
            {"channels": {0: [1, 1]}},
            r"each channel that block 0 keeps must be named once .* got \[1, 1\]",
        ),
        (
            {},
            {"heads": {1: [0, 1, 2]}},
            r"equally many query heads, but KV heads \[0, 1\] would serve \[2, 1\]",
        ),
        ({}, {"experts": {0: [0]}}, "block 0 has no experts to remove"),
        ({"experts": 2}, {"experts": {0: []}}, "block 0 must keep at least one of its 2 experts"),
        ({"experts": 2, "bias": ("down",)}, {"channels": {0: []}}, "the experts of block 0 have biases"),
        ({"linear": {"name": "low_rank"}}, {}, "only dense layers can shrink, got a model with linear="),
        ({"norm": "layer"}, {"width": [0]}, "removed under norm='rms' only, got norm='layer'"),
        (
            {},
            {"width": []},
            r"each residual channel that is kept must be named once and lie in 0 to 15, got \[\]",
        ),
        (
            {"tied": True, "bias": ("out",)},
            {"heads": {0: ()}},
            "the bias of attention in block 0 has no place",
        ),
    ],
)
def test_bad_input(keywords, removed, message):
    model = Transformer(**LLAMA | keywords)
    params = {} if model.linear else noisy(model)
    with pytest.raises(ValueError, match=message):
        shrink(model, params, **removed)
