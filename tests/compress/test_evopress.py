"""EvoPress against exhaustive search, brute-force divergences, and layers that are pruned one level at a time."""

import itertools
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress import levels as levels_lib
from sparsejax.compress.calibration import prune_layers
from sparsejax.compress.evopress import evopress
from sparsejax.compress.levels import Loss, build, find_units, stitch, stitch_masks
from sparsejax.compress.magnitude import magnitude
from sparsejax.compress.quantise import rtn
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.compress.wanda import wanda
from sparsejax.masks import flatten, map_with_name
from sparsejax.models import MLP, Transformer

TOKENS = np.random.default_rng(0).integers(0, 13, (12, 8))
SHORT = {"stages": ((3, 16), (1, 64)), "generations": 3, "offspring": 6}


def model_of(**keywords):
    """A small decoder whose kernels are large enough for pruning to matter."""
    model = Transformer(13, depth=2, width=16, heads=2, mlp_ratio=2, max_length=8).clone(**keywords)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1])["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)


def log_p(model, params, tokens=TOKENS):
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens))(params)
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def divergence(p, q):
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def dense():
    return model_of()


@pytest.fixture(scope="module")
def other(dense):
    """Another model of the same shape."""
    return jax.tree.map(lambda x: x * 0.8, dense[1])


def both(dense, other, **keywords):
    """Losses of the dense model itself and of the other one."""
    assemble = jax.tree_util.Partial(
        lambda a, b, g: jax.tree.map(lambda x, y: jnp.where(g, y, x), a, b), dense[1], other
    )
    loss = Loss(*dense, TOKENS, assemble, batch=5, **keywords)
    return np.array(loss(np.array([0, 1]), np.arange(len(TOKENS))))


def test_the_divergence_over_the_whole_vocabulary(dense, other):
    expected = divergence(log_p(*dense), log_p(dense[0], other))
    np.testing.assert_allclose(both(dense, other), [0, expected], rtol=1e-4, atol=1e-6)
    assert expected > 0.01


def test_the_divergence_of_the_top_tokens_and_all_others_together(dense, other):
    p, q = log_p(*dense), log_p(dense[0], other)
    order = np.argsort(-p, axis=-1, kind="stable")
    p, q = (np.take_along_axis(np.exp(x), order, -1) for x in (p, q))
    p, q = (np.concatenate([x[..., :4], x[..., 4:].sum(-1, keepdims=True)], -1) for x in (p, q))
    found = both(dense, other, top=4)
    np.testing.assert_allclose(found, [0, divergence(np.log(p), np.log(q))], rtol=1e-4, atol=1e-6)
    assert found[1] < both(dense, other)[1]


def test_the_loss_is_the_cross_entropy_of_the_next_token(dense, other):
    picked = [
        np.take_along_axis(log_p(dense[0], x)[:, :-1], TOKENS[:, 1:, None], -1) for x in (dense[1], other)
    ]
    np.testing.assert_allclose(both(dense, other, kind="loss"), [-x.mean() for x in picked], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 3])
def test_every_level_is_the_layer_pruned_on_its_own(experts):
    """Stitched at mixed levels: the kernels of `prune_layers` with that allocation, and its masks."""
    model, params = model_of(depth=1, experts=experts)
    method, shares = wanda(scope="layer"), [0.25, 0.5, 0.75]
    database = build(model, params, TOKENS, lambda shape: [(method, s) for s in shares], base=1)
    leaves = list(dict.fromkeys(unit.leaf for unit in database.units))
    choice = {leaf: i % 3 for i, leaf in enumerate(leaves)}
    index = [choice[unit.leaf] for unit in database.units]
    allocation = {leaf: shares[level] for leaf, level in choice.items()}
    expected = prune_layers(method, model, params, TOKENS, 0.5, allocation=allocation, propagate="dense")
    stitched = jax.jit(lambda stacks, index: stitch(params, stacks, database.units, index))
    chex.assert_trees_all_equal(stitched(database.stacks, jnp.array(index)), expected.params)
    chex.assert_trees_all_equal(stitch_masks(params, database, index), expected.masks)
    assert len(database.units) == 4 + 2 * max(1, experts)


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, magnitude(scope="layer")])
def test_the_total_is_exact_at_every_generation(dense, method):
    model, params = dense
    found = evopress(method, levels=2, **SHORT).run(model, params, TOKENS, 0.55)
    units, shapes = find_units(model, params, TOKENS)
    sizes = np.array([np.prod(shapes[unit.stack][1:]) for unit in units])
    zeros = sum(int((~mask).sum()) for mask in flatten(found.masks).values())
    assert zeros == np.floor(0.55 * sizes).sum()
    assert found.report["sparsity"] == zeros / sizes.sum()
    assert all(sum(record["genome"]) == 0 for record in found.report["history"])
    step = int(0.45 / 4 * sizes.min())
    for name, level in found.report["units"].items():
        mask, kernel = flatten(found.masks)[name], flatten(found.params)[name]
        assert (~mask).sum() == np.floor(0.55 * mask.size) + level * step
        assert not kernel[~mask].any()
    start, best = found.report["fitness"]["start"], found.report["fitness"]["found"]
    assert divergence(
        log_p(model, params, TOKENS[:8]), log_p(model, found.params, TOKENS[:8])
    ) == pytest.approx(best, rel=1e-3)
    assert any(found.report["units"].values()) and best < start


def test_one_evaluation_is_compiled_for_all_genomes(dense):
    levels_lib._loss.clear_cache()
    evopress(magnitude(scope="layer"), levels=2, batch=5, **SHORT).run(*dense, TOKENS, 0.5)
    assert levels_lib._loss._cache_size() == 1


@partial(jax.jit, static_argnames="block")
def run_block(params, hidden, block):
    return block.apply({"params": params}, hidden)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 2])
def test_depth_search_finds_the_exhaustive_optimum(experts):
    """One attention and one network of three each: 9 models, each shrunk and run on its own."""
    model, params = model_of(
        depth=3, experts=experts, bias=("query", "key", "value", "out") + ("down",) * (not experts)
    )
    p = log_p(model, params)

    def removed(attention, network):
        """Block by block, each without what is removed; sub-blocks that are gone have no parameters."""
        layers = [
            {**({"heads": 0} if i == attention else {}), **({"hidden": 0} if i == network else {})}
            for i in range(3)
        ]
        other, hidden = (
            model.clone(layers=tuple(layers)),
            model.apply({"params": params}, TOKENS, method="start"),
        )
        for i in range(3):
            part = dict(params[f"block_{i}"])
            for name in ("attention", "norm_0") * (i == attention) + ("mlp", "norm_1") * (i == network):
                del part[name]
            hidden = run_block(part, hidden, other.block(i))
        return divergence(
            p, np.asarray(jax.nn.log_softmax(model.apply({"params": params}, hidden, method="finish")))
        )

    values = {pair: removed(*pair) for pair in itertools.product(range(3), repeat=2)}
    best = min(values, key=values.get)
    search = evopress(search="depth", stages=((2, 999), (1, 999)), generations=4, offspring=6, starts=3)
    found = search.run(model, params, TOKENS, 0.4)
    assert found.report["units"] == {
        f"block_{i}/{kind}": i == best[k] for k, kind in enumerate(("attention", "mlp")) for i in range(3)
    }
    assert found.report["fitness"]["found"] == pytest.approx(values[best], rel=1e-3)
    assert divergence(p, log_p(found.model, found.params)) == pytest.approx(values[best], rel=1e-3)
    assert (
        "attention" not in found.params[f"block_{best[0]}"] and "mlp" not in found.params[f"block_{best[1]}"]
    )
    assert found.masks is None and 0 < found.report["sparsity"] < 1


@pytest.mark.slow
def test_bits_change_place_among_layers_of_equal_size(dense):
    model, params = dense
    found = evopress(lambda bits: rtn(bits=bits, group=8), search="bits", bits=3, widths=(2, 5), **SHORT).run(
        model, params, TOKENS, None
    )
    by_size = {}
    for name, bits in found.report["units"].items():
        kernel = flatten(params)[name]
        by_size.setdefault(kernel.size, []).append(bits)
        expected, _ = rtn(bits=bits, group=8).prune(kernel, {}, 0.0, "unstructured")
        np.testing.assert_array_equal(flatten(found.params)[name], expected)
    assert sorted(map(len, by_size.values())) == [4, 8]
    assert all(np.mean(bits) == 3 for bits in by_size.values())
    assert set(found.report["units"].values()) != {3}


@pytest.mark.slow
def test_a_search_goes_on_from_its_folder(dense, tmp_path):
    def run(generations, folder=None):
        options = {**SHORT, "generations": generations, "levels": 2, "folder": folder}
        return evopress(magnitude(scope="layer"), **options).run(*dense, TOKENS, 0.5)

    whole = run(4)
    run(2, tmp_path)
    assert len(json.loads((tmp_path / "search.json").read_text())["history"]) == 2
    again = run(4, tmp_path)
    assert again.report == whole.report
    chex.assert_trees_all_equal(again.params, whole.params)
    model, params = dense
    for name, method, other, tokens in (
        ("data", magnitude(scope="layer"), model, TOKENS[::-1]),
        ("levels", wanda(scope="layer"), model, TOKENS),
        ("model", magnitude(scope="layer"), model.clone(epsilon=1e-5), TOKENS),
    ):
        with pytest.raises(ValueError, match=rf"belongs to another search \(different: {name}\)"):
            evopress(method, **SHORT, levels=2, folder=tmp_path).run(other, params, tokens, 0.5)


def test_levels_behind_the_uniform_level(dense):
    """With propagate="pruned" the inputs of the second block come from the first at the middle level."""
    model, params = dense
    method, options = wanda(scope="layer"), {"levels": 1, **SHORT, "generations": 0}
    found, plain = (
        evopress(method, propagate=how, **options).run(model, params, TOKENS, 0.5)
        for how in ("pruned", "dense")
    )
    expected = prune_layers(method, model, params, TOKENS, 0.5, propagate="pruned")
    chex.assert_trees_all_equal(found.params, expected.params)
    second = "block_1/mlp/down/kernel"
    assert np.any(flatten(plain.params)[second] != flatten(expected.params)[second])


@pytest.mark.slow
def test_kernels_of_other_dtypes_keep_them():
    model, params = model_of(depth=1, kv_heads=1, tied=True)
    params = map_with_name(lambda name, x: x if "out/kernel" in name else x.astype(jnp.bfloat16), params)
    options = {**SHORT, "generations": 0, "levels": 1}
    found = evopress(magnitude(scope="layer"), **options).run(model, params, TOKENS, 0.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.params, params)
    chex.assert_tree_all_finite(found.params)


def test_a_vocabulary_that_is_padded():
    """A head that excludes tokens has no part of the divergence."""
    model, params = model_of(head_bias=True)
    params["head"]["bias"] = params["head"]["bias"].at[9:].set(-jnp.inf)
    found = both((model, params), jax.tree.map(lambda x: x * 0.8, params))
    assert np.all(np.isfinite(found)) and found[1] > 0.01


@pytest.mark.parametrize("search", ["sparsity", "depth"])
def test_sparsity_zero_leaves_the_model_as_it_is(dense, search):
    found = evopress(search=search).run(*dense, TOKENS, 0.0)
    assert found.model == dense[0] and found.report["sparsity"] == 0
    chex.assert_trees_all_equal(found.params, dense[1])


@pytest.mark.parametrize(
    ("keywords", "sparsity", "pattern", "message"),
    [
        ({"search": "width"}, 0.5, None, "unknown search 'width'"),
        ({"fitness": "mse"}, 0.5, None, "unknown fitness 'mse'"),
        ({"search": "depth"}, 0.5, None, "the method of a search over depth must be None, got Layerwise"),
        (
            {"search": "bits"},
            0,
            None,
            "over bits must be a function of bits that gives a Layerwise, got Layerwise",
        ),
        ({"method": rtn}, 0.5, None, "over sparsity must be a Layerwise, got <function"),
        ({"offspring": 0}, 0.5, None, "offspring of evopress must be at least 1, got 0"),
        ({"levels": 0}, 0.5, None, "levels of evopress must be at least 1, got 0"),
        ({"method": None, "search": "bits", "bits": 7}, 0, None, "bits=7 must lie in widths=2 to 6"),
        ({"method": None, "search": "bits"}, 0.5, None, "its sparsity must be 0, got 0.5"),
        ({}, 0.5, "2:4", "evopress cannot do the pattern 2:4"),
        ({}, 1.0, None, "sparsity"),
        ({}, None, None, r"sparsity must be in \[0, 1\), got None"),
        ({"levels": 200}, 0.5, None, "move no weight of a layer of 256 weights"),
        ({"method": None, "search": "depth"}, 0.3, None, "drops no sub-block: there are 2 of a type"),
        ({"stages": ((2, 16),), "levels": 2}, 0.5, None, "must keep 1 survivor"),
        ({"method": wanda(), "levels": 3}, 0.5, None, "counts over a layer, such as sparsegpt"),
        ({"top": 0, "levels": 2}, 0.5, None, "top must be at least 1"),
    ],
)
def test_bad_input(dense, keywords, sparsity, pattern, message):
    with pytest.raises(ValueError, match=message):
        evopress(**{"method": magnitude(scope="layer"), **keywords}).run(*dense, TOKENS, sparsity, pattern)


def test_depth_needs_a_transformer():
    class Other(MLP):
        def parts(self):
            return ()

    with pytest.raises(ValueError, match="from a Transformer only, got Other"):
        evopress(search="depth").run(Other(3), {}, TOKENS, 0.5)


def test_depth_cannot_drop_experts_with_biases():
    model, params = model_of(experts=2)
    with pytest.raises(ValueError, match="block_0/mlp/down has a bias for each expert"):
        evopress(search="depth").run(model, params, TOKENS, 0.5)


@pytest.mark.slow
def test_it_beats_uniform_sparsity_on_sequences_it_has_not_seen():
    """One block whose layers do almost nothing beside one that matters: weights move from one to the other."""
    model, params = model_of()
    params = map_with_name(lambda name, x: x * (0.1 if name.startswith("block_0/") else 1.0), params)
    tokens = np.random.default_rng(1).integers(0, 13, (64, 8))
    found = evopress(sparsegpt(), stages=((4, 64), (1, 256)), generations=40, offspring=12).run(
        model, params, tokens[:48], 0.6
    )
    uniform = prune_layers(sparsegpt(), model, params, tokens[:48], 0.6)
    p = log_p(model, params, tokens[48:])
    ours, theirs = (divergence(p, log_p(model, x.params, tokens[48:])) for x in (found, uniform))
    assert ours < 0.8 * theirs
