"""The block-by-block runner against the same steps by hand, its resumption, allocation and messages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax import compress, formats
from sparsejax.allocation import erdos_renyi
from sparsejax.compress import CompressionWarning, Layerwise, prune_layers
from sparsejax.compress.base import select
from sparsejax.models.encoder import Encoder
from sparsejax.models.transformer import Transformer
from sparsejax.models.vision_transformer import VisionTransformer
from sparsejax.patterns import NM, Unstructured

MODEL = Transformer(classes=32, depth=2, width=16, heads=4, hidden=32, max_length=24)
EXPERTS = Transformer(classes=32, depth=1, width=16, heads=4, hidden=32, max_length=24, experts=3, gated=True)
TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (6, 20), 0, 32))
PATHS = tuple(
    [f"attention/{name}/kernel" for name in ("query", "key", "value", "out")]
    + ["mlp/up/kernel", "mlp/down/kernel"]
)


def initial(model):
    """Parameters whose norms scale channels differently, so that statistics matter."""
    params = jax.jit(model.init)(jax.random.key(1), TOKENS)["params"]
    scale = np.exp(np.random.default_rng(0).normal(size=16)).astype(np.float32)
    for i in range(model.depth):
        for name in ("norm_0", "norm_1"):
            params[f"block_{i}"][name]["scale"] = jnp.asarray(scale)
    return params


PARAMS = initial(MODEL)


def run(method=None, model=MODEL, params=PARAMS, tokens=TOKENS, sparsity=0.5, pattern="unstructured", **more):
    return prune_layers(
        method or compress.wanda(), model, params, tokens, sparsity, pattern, **{"batch": 3, **more}
    )


@pytest.fixture(scope="module")
def pruned():
    return run()


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def intermediates(model, params):
    """What every module of the model gives."""
    apply = jax.jit(
        lambda p: model.apply({"params": p}, TOKENS, capture_intermediates=True, mutable=["intermediates"])
    )
    return apply(params)[1]["intermediates"]


def inputs_of(params, i):
    """What the linear layers of block i read (but `out`), float64 rows, from the outputs of its other modules."""
    block = intermediates(MODEL, params)[f"block_{i}"]
    attended, up = block["norm_0"]["__call__"][0], block["mlp"]["up"]["__call__"][0]
    found = dict.fromkeys(PATHS[:3], attended)
    found |= {"mlp/up/kernel": block["norm_1"]["__call__"][0], "mlp/down/kernel": linen.gelu(up)}
    return {path: np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for path, x in found.items()}


def leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def wanda_by_hand(kernel, x):
    scores = np.abs(np.asarray(kernel)) * np.sqrt((x**2).mean(0))[:, None]
    mask = np.ones(kernel.shape, bool)
    np.put_along_axis(mask, np.argsort(scores, 0, kind="stable")[: len(mask) // 2], False, 0)
    return mask


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_masks_come_from_the_inputs_behind_pruned_or_dense_blocks(pruned, propagate):
    result = pruned if propagate == "pruned" else run(propagate="dense")
    before = {**PARAMS, "block_0": result.params["block_0"]} if propagate == "pruned" else PARAMS
    for i, params in ((0, PARAMS), (1, before)):
        for path, x in inputs_of(params, i).items():
            kernel, name = leaf(PARAMS, f"block_{i}/{path}"), f"block_{i}/{path}"
            expected = wanda_by_hand(kernel, x)
            np.testing.assert_array_equal(leaf(result.masks, name), expected, err_msg=name)
            np.testing.assert_array_equal(leaf(result.params, name), np.where(expected, kernel, 0))


def test_only_the_kernels_of_blocks_change(pruned):
    assert jax.tree.structure(pruned.masks) == jax.tree.structure(PARAMS)
    for path, mask in jax.tree_util.tree_leaves_with_path(pruned.masks):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (mask.ndim == 2) == (name.startswith("block_") and name.endswith("kernel")), name
        if mask.ndim == 0:
            np.testing.assert_array_equal(leaf(pruned.params, name), leaf(PARAMS, name))


def test_the_report_is_json_and_its_errors_are_those_of_the_outputs(pruned):
    report = json.loads(json.dumps(pruned.report))
    assert report["sparsity"] == 0.5 and report["method"] == "wanda" and report["sequences"] == 6
    assert list(report["layers"]) == [f"block_{i}/{path}" for i in (0, 1) for path in PATHS]
    first = {path: x[:60] for path, x in inputs_of(PARAMS, 0).items()}  # batches have three sequences
    for path, x in first.items():
        old, new = (np.asarray(leaf(p, f"block_0/{path}"), np.float64) for p in (PARAMS, pruned.params))
        error = np.linalg.norm(x @ (old - new)) / np.linalg.norm(x @ old)
        assert report["layers"][f"block_0/{path}"]["error"] == pytest.approx(error, rel=1e-4)
        assert report["layers"][f"block_0/{path}"]["density"] == 0.5


class Lazy(dict):
    """Parameters by part, which count how often each is read."""

    def __init__(self, parts):
        super().__init__(parts)
        self.reads = []

    def __getitem__(self, part):
        self.reads.append(part)
        return jax.tree.map(np.asarray, super().__getitem__(part))


def test_parts_are_read_when_their_turn_comes_and_go_to_the_sink_in_order(pruned):
    params, sink = Lazy(PARAMS), {}
    result = run(params=params, sink=sink)
    assert list(sink) == list(MODEL.parts()) and result.params is sink and result.masks is None
    assert [part for part in params.reads if part.startswith("block_")] == ["block_0", "block_1"]
    same(dict(sink), pruned.params)
    assert result.report == pruned.report


class Interrupted(dict):
    """A sink at which the user presses Ctrl-C."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def __setitem__(self, part, tree):
        if part == self.part:
            raise KeyboardInterrupt
        super().__setitem__(part, tree)


@pytest.mark.parametrize("part", ["block_1", "norm"])
def test_an_interrupted_run_goes_on_with_the_same_bits(pruned, part, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(resume=tmp_path, sink=Interrupted(part))
    # the block at which it was interrupted had been finished; what a crash in the middle of a write leaves is ignored
    (tmp_path / "block_1.part").write_bytes(b"half")
    assert json.loads((tmp_path / "resume.json").read_text())["done"] == 2
    assert [path.name for path in tmp_path.glob("hidden*")] == ["hidden.2.safetensors"]
    result = run(resume=tmp_path)
    same(result.params, pruned.params)
    same(result.masks, pruned.masks)
    assert result.report == pruned.report


def test_an_interruption_inside_a_block_starts_that_block_again(pruned, tmp_path):
    calls, wanda = [], compress.wanda()

    def prune(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return wanda.prune(*args)

    method = wanda._replace(prune=prune)
    with pytest.raises(KeyboardInterrupt):
        run(method, resume=tmp_path)
    assert json.loads((tmp_path / "resume.json").read_text())["done"] == 1
    result = run(method, resume=tmp_path)
    assert len(calls) == 8 + 6
    same(result.params, pruned.params)
    assert result.report == pruned.report


def test_a_folder_of_another_call_is_refused(tmp_path):
    run(resume=tmp_path)
    with pytest.raises(
        ValueError, match=r"another method \(wanda there, magnitude here\); choose another folder"
    ):
        run(compress.magnitude(), resume=tmp_path)
    with pytest.raises(ValueError, match=r"another sparsity \(0.5 there, 0.6 here\)"):
        run(sparsity=0.6, resume=tmp_path)
    with pytest.raises(ValueError, match="another tokens; choose"):
        run(tokens=TOKENS[::-1], resume=tmp_path)


def test_allocation_by_rules():
    rules = {"*": 0.25, "*/mlp/*": 0.5, "block_1/mlp/up/kernel": 0.0}
    result = run(compress.magnitude(), allocation=rules, sparsity=None)
    for name, layer in result.report["layers"].items():
        expected = 0.0 if name == "block_1/mlp/up/kernel" else 0.5 if "mlp" in name else 0.25
        assert layer["sparsity"] == expected, name
    name = "block_1/mlp/up/kernel"
    np.testing.assert_array_equal(leaf(result.params, name), leaf(PARAMS, name))
    sizes = [(layer["sparsity"], layer["size"]) for layer in result.report["layers"].values()]
    total = sum(size for _, size in sizes)
    assert result.report["sparsity"] == pytest.approx(sum(s * size for s, size in sizes) / total)


def test_allocation_by_a_function_of_shapes():
    result = run(compress.magnitude(), allocation=erdos_renyi)
    assert result.report["sparsity"] == pytest.approx(0.5, abs=0.01)
    found = {layer["sparsity"] for layer in result.report["layers"].values()}
    assert len(found) == 2


def test_layers_may_have_another_n_of_the_same_m():
    result = run(compress.magnitude(), pattern="2:4", sparsity=None, allocation={"*/attention/*": 0.25})
    for name, layer in result.report["layers"].items():
        mask = np.asarray(leaf(result.masks, name))
        kept = 3 if "attention" in name else 2
        assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) == kept).all(), name
        assert layer["density"] == kept / 4


@pytest.mark.parametrize("method", [compress.wanda(), compress.sparsegpt()])
def test_bfloat16_is_computed_in_float32_and_returned(method):
    model = MODEL.clone(dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    kernels = []

    def prune(kernel, *rest):
        kernels.append(kernel)
        return method.prune(kernel, *rest)

    result = run(method._replace(prune=prune), model, params)
    assert {kernel.dtype for kernel in kernels} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(result.params)} == {jnp.dtype("bfloat16")}
    for name in result.report["layers"]:
        new, mask = np.asarray(leaf(result.params, name), np.float32), np.asarray(leaf(result.masks, name))
        assert np.isfinite(new).all() and not new[~mask].any() and mask.mean() == 0.5


def test_sparsity_zero_gives_the_same_model():
    for method in (compress.wanda(), compress.sparsegpt()):
        result = run(method, sparsity=0.0)
        same(result.params, PARAMS)
        assert result.report["sparsity"] == 0.0
        assert all(layer["error"] == 0 for layer in result.report["layers"].values())


def test_statistics_of_a_dense_pass():
    seen = list(
        compress.observe(MODEL, PARAMS, TOKENS, ("gram", "variance"), layers=("*up/kernel",), batch=4)
    )
    assert [block.name for block in seen] == ["block_0", "block_1"]
    np.testing.assert_array_equal(seen[0].outputs, seen[1].inputs)
    for i, block in enumerate(seen):
        assert list(block.stats) == ["mlp/up/kernel"]
        x = inputs_of(PARAMS, i)["mlp/up/kernel"]
        np.testing.assert_allclose(
            block.stats["mlp/up/kernel"]["gram"], x.T @ x / len(x), rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(block.stats["mlp/up/kernel"]["variance"], x.var(0), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_padding_does_not_count():
    model = Encoder(classes=0, vocabulary=32, depth=1, width=16, heads=4, hidden=32, max_length=24, pad=0)
    tokens = np.maximum(TOKENS, 1)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    padded = np.pad(tokens[:, :15], ((0, 0), (0, 5)))
    one, other = (next(compress.observe(model, params, t, ("square",))) for t in (tokens[:, :15], padded))
    assert list(one.layers) == list(PATHS)
    for path in PATHS:
        np.testing.assert_allclose(
            one.stats[path]["square"], other.stats[path]["square"], rtol=1e-4, err_msg=path
        )
        assert one.stats[path]["count"] == other.stats[path]["count"] == 6 * 15


@pytest.mark.slow
def test_vision_transformers():
    model = VisionTransformer(classes=3, patch=4, width=16, depth=2, heads=4, mlp_ratio=2)
    images = np.asarray(jax.random.normal(jax.random.key(0), (4, 8, 8, 1)))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    result = run(model=model, params=params, tokens=images)
    assert list(result.report["layers"]) == [f"block_{i}/{path}" for i in (0, 1) for path in PATHS]
    assert result.report["sparsity"] == 0.5
    same({k: v for k, v in result.params.items() if not k.startswith("block")},
         {k: v for k, v in params.items() if not k.startswith("block")})  # fmt: skip


# --- experts -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_experts_are_pruned_by_the_tokens_routed_to_them():
    params = initial(EXPERTS)
    result = run(model=EXPERTS, params=params)
    _, state = EXPERTS.apply(
        {"params": params}, TOKENS, capture_intermediates=True, mutable=["intermediates"]
    )
    block = state["intermediates"]["block_0"]
    x = np.asarray(block["norm_1"]["__call__"][0], np.float64).reshape(-1, 16)
    router = np.asarray(params["block_0"]["mlp"]["router"]["kernel"], np.float64)
    chosen = np.argsort(-(x @ router), axis=1)[:, :2]
    for expert in range(3):
        rows = x[(chosen == expert).any(1)]
        for name in ("up", "gate"):
            kernel = params["block_0"]["mlp"][name]["kernel"][expert]
            mask = result.masks["block_0"]["mlp"][name]["kernel"][expert]
            np.testing.assert_array_equal(mask, wanda_by_hand(kernel, rows))
    np.testing.assert_array_equal(
        result.params["block_0"]["mlp"]["router"]["kernel"], params["block_0"]["mlp"]["router"]["kernel"]
    )
    assert "block_0/mlp/router/kernel" not in result.report["layers"]


def test_an_expert_without_tokens_is_named_and_pruned_by_magnitude():
    params = initial(EXPERTS)
    params["block_0"]["norm_1"]["bias"] = jnp.ones(16)
    params["block_0"]["norm_1"]["scale"] = jnp.zeros(16)
    params["block_0"]["mlp"]["router"]["kernel"] = jnp.tile(jnp.asarray([1.0, 0.5, -1.0]), (16, 1))
    with pytest.warns(CompressionWarning) as seen:
        result = run(model=EXPERTS, params=params)
    assert [str(w.message).split(";")[0] for w in seen] == [
        f"block_0/mlp/{name}/kernel: expert 2 saw no calibration token" for name in ("up", "gate", "down")
    ]
    kernel = params["block_0"]["mlp"]["up"]["kernel"][2]
    np.testing.assert_array_equal(
        result.masks["block_0"]["mlp"]["up"]["kernel"][2], wanda_by_hand(kernel, np.ones((1, 16)))
    )
    assert "expert 2 saw no" in result.report["layers"]["block_0/mlp/up/kernel"]["notes"][0]


# --- bad input ---------------------------------------------------------------------------------------


def test_warnings_of_a_method_name_the_layer_and_are_reported():
    def prune(kernel, stats, sparsity, pattern):
        compress.base.warn("this is odd")
        return kernel, jnp.ones(kernel.shape, bool)

    with pytest.warns(CompressionWarning) as seen:
        result = run(Layerwise("odd", (), prune))
    assert [str(w.message) for w in seen] == [
        f"block_{i}/{path}: this is odd" for i in (0, 1) for path in PATHS
    ]
    assert result.report["layers"]["block_0/mlp/up/kernel"]["notes"] == ["this is odd"]


def refused(message, **more):
    def prune(*_):
        raise AssertionError("it must be refused before any work")

    with pytest.raises(ValueError, match=message):
        run(Layerwise("test", ("square",), prune, (Unstructured, NM)), **more)


def test_messages():
    refused(r"no tokens to read: their shape is \(0, 20\)", tokens=TOKENS[:0])
    refused(r"no tokens to read: their shape is \(6, 0\)", tokens=TOKENS[:, :0])
    refused("token 32 is outside of the vocabulary, 0 to 31", tokens=TOKENS + (TOKENS == TOKENS.max()))
    refused("token -1 is outside of the vocabulary", tokens=TOKENS - (TOKENS == TOKENS.min()))
    refused("40 tokens exceed max_length=24", tokens=np.zeros((2, 40), np.int32))
    refused(r"test cannot do the pattern block:4x4 \(it can do: unstructured, N:M", pattern="block:4x4")
    refused(r"sparsity must be in \[0, 1\), got 1.0", sparsity=1.0)
    refused(r"sparsity must be in \[0, 1\), got None", sparsity=None)
    refused("2:4 has sparsity 0.5, got 0.25", pattern="2:4", sparsity=0.25)
    refused("kernel: 2:4 keeps .* a multiple of 1/4, got 0.3", pattern="2:4", allocation={"*": 0.3})
    refused(
        "needs axis -2 of block_0/attention/query/kernel to be divisible by 32", pattern="1:32", sparsity=None
    )
    refused("unknown propagate 'sparse'", propagate="sparse")
    refused("unknown allocation 'erk'", allocation="erk")
    refused(r"allocation rule 'block_9/\*' matches no layer", allocation={"block_9/*": 0.5})
    refused("block_0/mlp/up/kernel: sparsity must be", allocation={"block_0/mlp/up/kernel": 1.5})
    refused("a sparsity for every layer", allocation=lambda shapes, sparsity: {})
    refused("batch must be at least 1, got 0", batch=0)


def test_inputs_that_are_not_finite_are_named():
    params = {**PARAMS, "embed": {"embedding": PARAMS["embed"]["embedding"].at[:, 0].set(jnp.inf)}}
    with pytest.raises(ValueError, match="the inputs of block_0/attention/query/kernel are not finite"):
        run(params=params)


def test_weights_that_are_not_finite_are_named():
    params = jax.tree.map(lambda x: x, PARAMS)
    params["block_1"]["mlp"]["up"]["kernel"] *= jnp.nan
    with pytest.raises(ValueError, match="the weights of block_1/mlp/up/kernel are not finite"):
        run(compress.sparsegpt(), params=params)

    def prune(kernel, *_):
        return kernel * jnp.inf, jnp.ones(kernel.shape, bool)

    message = "the compressed weights of block_0/attention/query/kernel are not finite as float32"
    with pytest.raises(ValueError, match=message):
        run(Layerwise("huge", (), prune))


def test_packed_kernels_are_refused():
    kernel = PARAMS["block_0"]["mlp"]["up"]["kernel"]
    mask = select(jnp.abs(kernel), 0.5, NM(2, 4))
    params = {**PARAMS, "block_0": jax.tree.map(lambda x: x, PARAMS["block_0"])}
    params["block_0"]["mlp"]["up"]["kernel"] = formats.pack(kernel, mask, "2:4")
    with pytest.raises(ValueError, match="block_0/mlp/up/kernel is packed"):
        run(params=params)
