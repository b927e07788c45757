"""Allocations against the papers' closed forms, brute force, and the budget they must spend."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sparsejax import allocation
from sparsejax.allocation import allocate

LENET = {"Dense_0/kernel": (784, 300), "Dense_1/kernel": (300, 100), "Dense_2/kernel": (100, 10)}
CONVNET = {
    "Block_0/Conv_0/kernel": (3, 3, 16, 32),
    "Block_10/Conv_0/kernel": (3, 3, 32, 64),
    "Block_9/Conv_0/kernel": (3, 3, 32, 32),
    "Conv_0/kernel": (3, 3, 3, 16),
    "Dense_0/kernel": (64, 10),
}
ON_SHAPES = ["uniform", "uniform_plus", "erdos_renyi", "erk", "erk_plus"]


def shapes(table):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in table.items()}


def values(table, seed=0):
    random = np.random.default_rng(seed)
    return {name: np.abs(random.normal(size=shape)).astype(np.float32) for name, shape in table.items()}


def kept(leaves, sparsities):
    return sum((1.0 - sparsities[name]) * math.prod(leaf.shape) for name, leaf in leaves.items())


@pytest.mark.parametrize(
    "sparsity, expected",
    [
        (0.9, [0.920432, 0.769811, 0.0]),
        (0.5, [0.565901, 0.0, 0.0]),
        (0.95, [0.961516, 0.888666, 0.081493]),
    ],
)
def test_erk_of_lenet(sparsity, expected):
    np.testing.assert_allclose(list(allocation.erk(shapes(LENET), sparsity).values()), expected, atol=5e-7)


def test_erk_power_zero_is_uniform_and_er_ignores_the_window():
    leaves = shapes(CONVNET)
    for value in allocation.erk(leaves, 0.8, power=0.0).values():
        assert value == pytest.approx(0.8)
    flat = shapes({name: shape[-2:] for name, shape in CONVNET.items()})
    ratio = {
        n: (1 - s) * math.prod(flat[n].shape) / sum(flat[n].shape)
        for n, s in allocation.erdos_renyi(leaves, 0.97).items()
        if s > 0
    }
    assert len(ratio) >= 4
    np.testing.assert_allclose(list(ratio.values()), next(iter(ratio.values())))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0.0, 0.999),
    name=st.sampled_from(ON_SHAPES),
)
@example(sizes=[[1, 1, 1, 1]], sparsity=0.5, name="uniform_plus")
def test_budget_is_spent(sizes, sparsity, name):
    leaves = shapes({f"Layer_{i}/kernel": tuple(shape) for i, shape in enumerate(sizes)})
    try:
        sparsities = allocation.allocate(leaves, sparsity, name)
    except ValueError as error:  # only the two rules with exceptions may be unable to meet a budget
        assert name in ("uniform_plus", "erk_plus") and "at density" in str(error) or "dense" in str(error)
        assume(False)
    total = sum(math.prod(shape) for shape in sizes)
    assert all(0.0 <= value < 1.0 for value in sparsities.values())
    slack = 0.5 * (name in ("erk_plus", "uniform_plus") and len(sizes) == 1)  # the one leaf is an exception
    assert kept(leaves, sparsities) == pytest.approx((1 - sparsity) * total, rel=1e-9, abs=slack)
    counts = allocation.counts(leaves, sparsities, sparsity)
    assert sum(counts.values()) == round((1 - sparsity) * total)
    assert all(0 <= counts[n] <= math.prod(leaf.shape) for n, leaf in leaves.items())
    if sum(counts.values()) >= len(sizes):
        assert all(count > 0 for count in counts.values())


@settings(deadline=None, max_examples=40)
@given(
    table=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5
    ),
    sparsity=st.floats(0.0, 0.99),
)
def test_coarse_units_reach_the_budget_within_half_a_unit(table, sparsity):
    """Leaves of `units` blocks of rows x columns weights each."""
    leaves = shapes({f"{i}": (units * rows, columns) for i, (units, rows, columns) in enumerate(table)})
    units = {f"{i}": row[0] for i, row in enumerate(table)}
    size = {f"{i}": row[1] * row[2] for i, row in enumerate(table)}
    counts = allocation.counts(leaves, allocation.uniform(leaves, sparsity), sparsity, units)
    reached = sum(counts[name] * size[name] for name in counts)
    asked = (1 - sparsity) * sum(units[name] * size[name] for name in units)
    assert all(0 <= counts[name] <= units[name] for name in counts)
    if sum(size.values()) <= asked:  # the floor of one unit per leaf fits
        assert abs(reached - asked) <= max(size.values()) / 2 + 0.5


def test_counts_are_exact_for_huge_leaves():
    leaves = shapes({"a": (2**31 + 11, 1), "b": (2**31 - 1, 2), "c": (3, 5)})
    total = 2**31 + 11 + 2 * (2**31 - 1) + 15
    for sparsity in (0.0, 0.1, 0.9, 0.99999):
        for name in ("uniform", "erk"):
            counts = allocation.counts(leaves, allocation.allocate(leaves, sparsity, name), sparsity)
            assert sum(counts.values()) == round((1 - sparsity) * total)
            assert all(type(count) is int for count in counts.values())


def test_counts_keep_one_unit_per_leaf_if_the_budget_allows():
    leaves = shapes({"big": (1000, 10), "tiny": (2, 3), "small": (2, 4)})
    counts = allocation.counts(leaves, allocation.uniform(leaves, 0.99), 0.99)
    assert counts == {"big": 98, "tiny": 1, "small": 1}
    assert sum(allocation.counts(leaves, allocation.uniform(leaves, 0.9998), 0.9998).values()) == 2


def test_explicit_leaves_round_on_their_own():
    leaves = shapes(LENET)
    sparsities = allocation.allocate(leaves, None, {"Dense_2/*": 0.0, "*kernel": 0.95})
    assert allocation.counts(leaves, sparsities, None) == {
        "Dense_0/kernel": 11760,
        "Dense_1/kernel": 1500,
        "Dense_2/kernel": 1000,
    }


def test_uniform_plus_finds_the_first_convolution_and_the_classifier():
    leaves = shapes(CONVNET)
    sparsities = allocation.uniform_plus(leaves, 0.95)
    assert sparsities["Conv_0/kernel"] == 0.0
    assert sparsities["Dense_0/kernel"] == pytest.approx(0.8)
    rest = {sparsities[name] for name in leaves if name.startswith("Block")}
    assert len(rest) == 1 and 0.95 < rest.pop() < 1.0
    # a generous budget leaves the classifier at the common rate
    sparsities = allocation.uniform_plus(leaves, 0.5)
    assert sparsities["Dense_0/kernel"] == sparsities["Block_9/Conv_0/kernel"] > 0.5


def test_first_and_last_follow_names_then_nesting_then_natural_order():
    deep = shapes(
        {
            "Conv_10/kernel": (3, 3, 8, 8),
            "Conv_9/kernel": (3, 3, 3, 8),
            "Dense_0/kernel": (8, 8),
            "Dense_10/kernel": (8, 4),
            "Dense_9/kernel": (8, 8),
        }
    )
    # power 0: nothing but the classifier is dense
    dense = [name for name, value in allocation.erk_plus(deep, 0.6, power=0.0).items() if value == 0.0]
    assert dense == ["Dense_10/kernel"]
    assert allocation.uniform_plus(deep, 0.6)["Conv_9/kernel"] == 0.0
    named = shapes({"head/kernel": (64, 10), "layer_0/kernel": (784, 64), "layer_1/kernel": (64, 64)})
    assert allocation.erk_plus(named, 0.9, power=0.0)["head/kernel"] == 0.0
    assert allocation.erk_plus(named, 0.9, power=0.0, last="layer_1/*")["layer_1/kernel"] == 0.0


def brute_force_lamp(weight):
    squares = weight.astype(np.float64).ravel() ** 2
    scores = np.zeros_like(squares)
    for i, square in enumerate(squares):
        above = [s for j, s in enumerate(squares) if s > square or (s == square and j <= i)]
        scores[i] = square / sum(above) if square else 0.0
    return scores.reshape(weight.shape)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-4, 4), min_size=4, max_size=24), st.floats(1e-3, 1e3))
def test_lamp_scores_against_brute_force(integers, factor):
    """Small integers: many ties and zeros."""
    weight = np.asarray(integers[: len(integers) // 2 * 2], np.float32).reshape(2, -1)
    scores = jax.jit(allocation.lamp_scores)({"a": weight, "b": weight * np.float32(factor)})
    np.testing.assert_allclose(scores["a"], brute_force_lamp(weight), rtol=1e-5)
    np.testing.assert_allclose(scores["b"], scores["a"], rtol=1e-4)
    assert scores["a"].shape == weight.shape
    assert np.any(weight) == (np.max(scores["a"]) == 1.0)
    order = np.argsort(-np.abs(weight).ravel(), kind="stable")
    assert np.all(np.diff(np.ravel(scores["a"])[order]) <= 0)


def test_lamp_is_invariant_to_the_scale_of_a_layer_and_global_is_not():
    weights = values(LENET)
    scaled = weights | {"Dense_1/kernel": weights["Dense_1/kernel"] * np.float32(2.0**-7)}
    assert allocation.lamp(weights, 0.95) == allocation.lamp(scaled, 0.95)
    assert allocation.global_(weights, 0.95) != allocation.global_(scaled, 0.95)
    assert allocation.global_(scaled, 0.95)["Dense_1/kernel"] == 1.0


def test_lamp_never_empties_a_leaf_and_spends_the_budget():
    weights = values(LENET)
    weights["Dense_2/kernel"] = weights["Dense_2/kernel"] * np.float32(1e-6)
    total = sum(leaf.size for leaf in weights.values())
    for budget in (3, 10, 1000):
        sparsities = allocation.lamp(weights, 1 - budget / total)
        counts = allocation.counts(weights, sparsities, 1 - budget / total)
        assert sum(counts.values()) == budget and min(counts.values()) >= 1


def test_global_density_is_that_of_the_numpy_threshold():
    weights = values(LENET)
    flat = np.sort(np.concatenate([leaf.ravel() for leaf in weights.values()]))[::-1]
    threshold = flat[round(0.1 * flat.size) - 1]
    for name, value in allocation.global_(weights, 0.9).items():
        assert value == pytest.approx(1 - np.mean(weights[name] >= threshold), abs=1e-12)


@pytest.mark.parametrize("name", sorted(allocation.ALLOCATIONS))
def test_every_allocation_at_sparsity_zero_is_dense(name):
    leaves = values(CONVNET)
    assert allocation.allocate(leaves, 0.0, name) == dict.fromkeys(leaves, 0.0)
    assert allocation.counts(leaves, allocation.allocate(leaves, 0.0, name), 0.0) == {
        name: leaf.size for name, leaf in leaves.items()
    }


@pytest.mark.parametrize("name", sorted(allocation.ALLOCATIONS))
def test_every_allocation_meets_the_contract(name):
    leaves = values(CONVNET)
    sparsities = allocation.allocate(leaves, 0.9, name)
    assert list(sparsities) == list(leaves) and all(type(value) is float for value in sparsities.values())
    total = sum(leaf.size for leaf in leaves.values())
    assert sum(allocation.counts(leaves, sparsities, 0.9).values()) == round((1 - 0.9) * total)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: allocate(x, 1.2, "erk"), r"sparsity must be in \[0, 1\), got 1.2"),
        (lambda x: allocate(x, 1.0, "uniform"), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda x: allocate(x, float("nan"), "lamp"), r"sparsity must be in \[0, 1\), got nan"),
        (lambda x: allocate(x, None, "erk"), r"sparsity must be in \[0, 1\), got None"),
        (lambda x: allocate(x, 0.5, "erc"), r"unknown allocation 'erc'; did you mean 'erk'\? \(known"),
        (lambda x: allocate(x, 0.5, "lamp"), r"'lamp' depends on the values .* Dense_0/kernel must be"),
        (lambda x: allocate(x, 0.5, "global"), r"'global' depends on the values of the scores"),
        (lambda x: allocate(x, 0.999, "erk_plus"), r"'erk_plus' keeps Dense_2/kernel dense, .*0.999"),
        (lambda x: allocate(x, 0.9995, "uniform_plus"), r"Dense_2/kernel at density 0.2, .*=0.9995"),
        (lambda x: allocation.uniform_plus(x, 0.5, first="conv*"), r"first='conv\*' matches no sparsified"),
        (lambda x: allocate(x, 0.5, {"Dense_0/*": 0.5}), "no allocation pattern matches 'Dense_1/kernel'"),
        (lambda x: allocate(x, 0.5, {"*": 0.5, "Conv*": 0.1}), r"pattern 'Conv\*' matches no sparsified"),
        (lambda x: allocate(x, 0.5, {"*": 1.5}), r"sparsity of '\*' must be in \[0, 1\), got 1.5"),
        (lambda x: allocate(x, 0.5, lambda leaves, s: {}), "must return a sparsity in .* for each of"),
        (lambda x: allocation.counts(x, dict.fromkeys(x, 0.5), 0.9), "keeps 133100 of 266200 .*=0.9 keeps"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(shapes(LENET))


def test_values_inside_jit_are_refused():
    with pytest.raises(ValueError, match="must be a concrete array"):
        jax.jit(lambda x: allocation.allocate({"w": x}, 0.5, "global"))(jnp.ones((4, 4)))
