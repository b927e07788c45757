"""STUN against brute force: the pairs of a router's choices, complete linkage, exact totals, duplicated experts."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.magnitude import magnitude
from sparsejax.compress.stun import (
    cluster,
    coactivations,
    distances,
    exact_shares,
    find_clusters,
    merge,
    stun,
)
from sparsejax.masks import flatten
from sparsejax.models import Transformer
from sparsejax.models.layers import layer_sizes

TOKENS = np.random.default_rng(0).integers(0, 11, (6, 5))


@pytest.fixture(scope="module")
def dense():
    model = Transformer(11, depth=2, width=8, heads=2, hidden=12, max_length=5, experts=6, bias=())
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1])["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), jnp.float32), shapes)


def symmetric(rng, n):
    space = rng.normal(size=(n, n))
    space += space.T
    np.fill_diagonal(space, np.inf)
    return space


@pytest.mark.slow
def test_coactivation_counts_the_tokens_that_two_experts_share(dense):
    """The hidden states of a block by hand, every token's two best experts by a loop."""
    model, params = dense
    hidden = model.apply({"params": params}, TOKENS, method="start")
    found = coactivations(model, params, TOKENS, batch=4)
    for i in range(2):
        part = params[f"block_{i}"]
        middle = model.clone(depth=1, layers=({"hidden": 0},)).block(0).apply({"params": part}, hidden)
        centred = middle - middle.mean(-1, keepdims=True)
        normal = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * part["norm_1"]["scale"]
        normal = normal + part["norm_1"].get("bias", 0)
        logits = np.asarray(normal @ part["mlp"]["router"]["kernel"]).reshape(-1, 6)
        expected = np.zeros((6, 6), int)
        for row in logits:
            e, f = np.argsort(row)[-2:]
            expected[e, f] += 1
            expected[f, e] += 1
        np.testing.assert_array_equal(found[i], expected)
        hidden = model.block(i).apply({"params": part}, hidden)
    assert set(found) == {0, 1}


def test_distances():
    router, counts = np.array([[0.0, 3.0, 0.0], [0.0, 4.0, 1.0]]), np.array([[0, 6, 0], [6, 0, 3], [0, 3, 0]])
    inf = np.inf
    shared = np.array([[inf, -2, 0], [-2, inf, -1], [0, -1, inf]])  # the mean over pairs is 3
    apart = np.array([[inf, 5, 1], [5, inf, 18**0.5], [1, 18**0.5, inf]])
    np.testing.assert_allclose(distances(router, counts), shared)
    np.testing.assert_allclose(distances(router, None, 0.0, 1.0), apart)
    np.testing.assert_allclose(distances(router, counts, 2.0, 0.5), 2 * shared + 0.5 * apart)
    assert not distances(router, 0 * counts)[0, 1:].any()


@pytest.mark.parametrize("seed", range(6))
def test_every_cluster_is_complete_and_no_two_could_merge(seed):
    rng = np.random.default_rng(seed)
    spaces = [symmetric(rng, n) for n in (7, 5)]
    tau = rng.normal()
    found = cluster(spaces, tau)
    for space, groups in zip(spaces, found, strict=True):
        assert sorted(itertools.chain(*groups)) == list(range(len(space)))
        assert all(space[e, f] < tau for group in groups for e, f in itertools.combinations(group, 2))
        for one, other in itertools.combinations(groups, 2):
            assert max(space[e, f] for e in one for f in other) >= tau


def naive_cluster(spaces, tau):
    """The rule taken literally: again and again the nearest pair of all that are not yet used up."""
    spaces, owner = [s.copy() for s in spaces], [list(range(len(s))) for s in spaces]
    original = [s.copy() for s in spaces]
    while True:
        value, layer = min((s.min(), i) for i, s in enumerate(spaces))
        if value >= tau:
            return [sorted(sorted(e for e, o in enumerate(own) if o == c) for c in set(own)) for own in owner]
        e, f = np.unravel_index(np.argmin(spaces[layer]), spaces[layer].shape)
        spaces[layer][e, f] = spaces[layer][f, e] = np.inf
        own, other = ([i for i, o in enumerate(owner[layer]) if o == owner[layer][x]] for x in (e, f))
        if owner[layer][e] != owner[layer][f] and original[layer][np.ix_(own, other)].max() < tau:
            for i in other:
                owner[layer][i] = owner[layer][e]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_grow_from_the_nearest_pairs(seed):
    rng = np.random.default_rng(seed)
    spaces = [symmetric(rng, n) for n in (6, 8)]
    for tau in (-1.0, 0.0, 1.5, np.inf):
        assert cluster(spaces, tau) == naive_cluster(spaces, tau)


@pytest.mark.parametrize("ties", [False, True])
def test_the_search_of_tau_meets_every_target(ties):
    rng = np.random.default_rng(1)
    spaces = [np.round(symmetric(rng, 6), 0 if ties else 9) for _ in range(3)]
    for target in range(6, 19):
        found = find_clusters(spaces, target, least=2)
        assert sum(map(len, found)) == target
        assert all(len(groups) >= 2 for groups in found)
    assert found == [[[e] for e in range(6)]] * 3
    with pytest.raises(ValueError, match="5 experts cannot be kept: 3 layers need 2 each, 6 in all"):
        find_clusters(spaces, 5, least=2)


@pytest.mark.parametrize("seed", range(20))
def test_tau_is_the_smallest_that_leaves_few_enough(seed):
    rng = np.random.default_rng(seed)
    spaces = [np.round(symmetric(rng, 6), 1) for _ in range(2)]
    distances = np.unique(np.concatenate([space[np.triu_indices(6, 1)] for space in spaces]))
    for target in range(2, 13):
        fits = [tau for tau in (*distances, np.inf) if sum(map(len, cluster(spaces, tau))) <= target]
        assert find_clusters(spaces, target) == cluster(spaces, fits[0], target)


def duplicated(params, source, copy):
    """Expert `copy` of the first block as a copy of `source`, with its router column."""
    mlp = {
        name: {"kernel": layer["kernel"].at[copy].set(layer["kernel"][source])}
        for name, layer in params["block_0"]["mlp"].items()
        if name != "router"
    }
    router = params["block_0"]["mlp"]["router"]["kernel"]
    mlp["router"] = {"kernel": router.at[:, copy].set(router[:, source])}
    return {**params, "block_0": {**params["block_0"], "mlp": mlp}}


@pytest.mark.slow
@pytest.mark.parametrize("average", [0, 9])
def test_a_duplicated_expert_goes_without_a_trace(dense, average):
    """Its router column is at distance 0. With one expert per token, the twin that is left takes its tokens."""
    model, params = dense[0].clone(experts_per_token=1), duplicated(dense[1], 4, 1)
    found = stun(coactivation=0.0, router=1.0, experts=1 / 12, average=average)
    spaces = [distances(params[f"block_{i}"]["mlp"]["router"]["kernel"], None, 0.0, 1.0) for i in range(2)]
    clusters = find_clusters(spaces, 11)
    assert clusters[0] == [[0], [1, 4], [2], [3], [5]] and len(clusters[1]) == 6
    small, small_params, about = merge(model, params, dict(enumerate(clusters)), average)
    np.testing.assert_allclose(
        small.apply({"params": small_params}, TOKENS), model.apply({"params": params}, TOKENS), atol=1e-5
    )
    assert layer_sizes(small, 0)["experts"] == 5 and layer_sizes(small, 1)["experts"] == 6
    assert small_params["block_0"]["mlp"]["up"]["kernel"].shape == (5, 8, 12)
    assert about["block_0"]["kept"] == [0, 1, 2, 3, 5] and about["block_0"]["averaged"] == bool(average)
    result = found.run(model, params, TOKENS, 0.5)
    assert result.report["experts"] == about and result.model == small


def test_the_expert_nearest_to_the_mean_or_the_mean_stays(dense):
    model, params = dense
    groups = {0: [[0, 2, 3], [1], [4, 5]], 1: [[e] for e in range(6)]}
    mlp = {name: np.asarray(layer["kernel"], np.float64) for name, layer in params["block_0"]["mlp"].items()}
    flat = np.concatenate([mlp[name].reshape(6, -1) for name in ("up", "down")], 1)
    nearest = [group[np.argmin(((flat[group] - flat[group].mean(0)) ** 2).sum(1))] for group in groups[0]]
    small, kept, about = merge(model, params, groups, average=2)
    assert about["block_0"] == {"clusters": groups[0], "kept": sorted(nearest), "averaged": False}
    for name, axis in (("up", 0), ("down", 0), ("router", 1)):
        expected = mlp[name].take(sorted(nearest), axis)
        np.testing.assert_allclose(kept["block_0"]["mlp"][name]["kernel"], expected, rtol=1e-6)
    small, mean, about = merge(model, params, groups, average=3)
    for name, axis in (("up", 0), ("down", 0), ("router", 1)):
        expected = np.stack([mlp[name].take(group, axis).mean(axis) for group in groups[0]], axis)
        np.testing.assert_allclose(mean["block_0"]["mlp"][name]["kernel"], expected, rtol=1e-5, atol=1e-7)
    assert layer_sizes(small, 0)["experts"] == 3 and about["block_1"]["averaged"] is False
    chex.assert_trees_all_equal(mean["block_1"], params["block_1"])


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.4, 0.513])
@pytest.mark.parametrize("allocation", ["uniform", lambda model, params, tokens, s: spread(params, s)])
def test_the_total_counts_removed_experts(dense, sparsity, allocation):
    model, params = dense
    found = stun(experts=0.3, allocation=allocation).run(model, params, TOKENS, sparsity)
    before = sum(x.size for name, x in kernels(params))
    left = sum(int((x != 0).sum()) for _, x in kernels(found.params))
    assert left == before - int(sparsity * before)
    assert found.report["sparsity"] == 1 - left / before
    assert sum(len(block["kept"]) for block in found.report["experts"].values()) == 12 - 3
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.shape, found.masks["block_0"]["mlp"]["up"]),
        {"kernel": found.params["block_0"]["mlp"]["up"]["kernel"].shape},
    )
    assert found.model.apply({"params": found.params}, TOKENS).shape == (*TOKENS.shape, 11)


def kernels(params):
    leaves = flatten({name: part for name, part in params.items() if name.startswith("block_")}).items()
    return [(name, x) for name, x in leaves if name.endswith("kernel") and "router" not in name]


def spread(params, sparsity):
    """Layers whose sparsities differ, as an allocation gives them."""
    names = [name for name, _ in kernels(params)]
    return {name: sparsity + 0.1 * (i % 3 - 1) for i, name in enumerate(names)}


def test_exact_shares_of_layers():
    sizes = {"a": (7, 9), "experts": (5, 4, 3), "b": (2, 2)}
    for zeros in (0, 1, 2, 40, 77, 119):
        found = exact_shares(sizes, zeros)
        drops = {name: round(found[name] * np.prod(shape[-2:])) for name, shape in sizes.items()}
        assert drops["a"] + 5 * drops["experts"] + drops["b"] == zeros
        assert all(
            np.isclose(found[name] * np.prod(shape[-2:]), drops[name]) for name, shape in sizes.items()
        )
    asked = exact_shares(sizes, 60, {"a": 0.2, "experts": 0.6, "b": 0.2})
    assert asked["experts"] - asked["a"] == pytest.approx(0.4, abs=0.1)
    with pytest.raises(ValueError, match="127 of 127 weights cannot be dropped: 7 are left over"):
        exact_shares(sizes, 127)


def test_an_nm_pattern_on_the_experts_that_stay(dense):
    found = stun(magnitude(), experts=0.25).run(*dense, TOKENS, None, "2:4")
    for name, kernel in kernels(found.params):
        groups = np.asarray(kernel != 0).reshape(*kernel.shape[:-2], -1, 4, kernel.shape[-1])
        assert (groups.sum(-2) == 2).all(), name
    sizes = [sum(x.size for _, x in kernels(params)) for params in (dense[1], found.params)]
    assert found.report["sparsity"] == pytest.approx(1 - sizes[1] / sizes[0] / 2)


def test_identity(dense):
    model, params = dense
    found = stun().run(model, params, TOKENS, 0.0)
    assert found.model == model and found.report["sparsity"] == 0
    chex.assert_trees_all_equal(found.params, params)
    small, same, _ = merge(model, params, {i: [[e] for e in range(6)] for i in range(2)})
    assert small == model
    chex.assert_trees_all_equal(same, params)


@pytest.mark.slow
def test_bfloat16_with_grouped_keys_and_a_tied_head_is_deterministic(dense):
    model = dense[0].clone(depth=1, kv_heads=1, tied=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16), shapes)
    once, again = (stun().run(model, params, TOKENS, 0.5) for _ in range(2))
    chex.assert_trees_all_equal(once.params, again.params)
    assert {x.dtype for x in jax.tree.leaves(once.params)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_tree_all_finite(once.params)
    assert layer_sizes(once.model, 0)["experts"] == 5


@pytest.mark.parametrize(
    ("keywords", "sparsity", "pattern", "message"),
    [
        ({"experts": 1.0}, 0.5, None, r"experts must be a share in \[0, 1\), got 1.0"),
        ({"coactivation": 0.0}, 0.5, None, "one of them positive"),
        ({"router": -1.0}, 0.5, None, "must not be negative"),
        ({}, 0.5, "2:4", "with the pattern 2:4 stun needs sparsity None, got 0.5"),
        ({}, 0.5, "block:2x2", "stun cannot do the pattern block:2x2"),
        ({"experts": 0.9}, 0.95, None, "2 experts cannot be kept: 2 layers need 2 each, 4 in all"),
        ({"experts": 0.5}, 0.1, None, "remove fewer experts"),
        (
            {"single": True},
            0.5,
            None,
            "no two experts share a token with experts_per_token=1, .* coactivation=0.0",
        ),
    ],
)
def test_bad_input(dense, keywords, sparsity, pattern, message):
    keywords = dict(keywords)
    if keywords.pop("single", False):
        dense = (dense[0].clone(experts_per_token=1), dense[1])
    with pytest.raises(ValueError, match=message):
        stun(**keywords).run(*dense, TOKENS, sparsity, pattern)


def test_a_model_without_experts(dense):
    with pytest.raises(ValueError, match="stun needs a Transformer with experts, got Transformer without"):
        stun().run(Transformer(11), {}, TOKENS, 0.5)
