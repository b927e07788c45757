"""Targets: exact budgets for every allocation and pattern, and the counts on the way to them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from sparsejax import masks as masks_lib
from sparsejax import scores
from sparsejax.allocation import ALLOCATIONS
from sparsejax.target import Target

PARAMS = {
    "dense_0": {"kernel": jax.random.normal(jax.random.key(0), (48, 30)), "bias": jnp.zeros(30)},
    "dense_1": {"kernel": jax.random.normal(jax.random.key(1), (30, 20)), "bias": jnp.zeros(20)},
    "head": {"kernel": jax.random.normal(jax.random.key(2), (20, 10)), "bias": jnp.zeros(10)},
}
SIZE = 48 * 30 + 30 * 20 + 20 * 10


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9])
def test_every_allocation_spends_the_budget_to_the_weight(allocation, sparsity):
    target = Target(sparsity=sparsity, allocation=allocation)
    kept = round((1 - sparsity) * SIZE)
    for masks in (target.masks(scores.magnitude(PARAMS)), target.random_masks(jax.random.key(0), PARAMS)):
        assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim) == kept
        assert all(masks[name]["bias"].ndim == 0 for name in PARAMS)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 0.99), st.sampled_from(["uniform", "erk"]), st.sampled_from(["block:2x2", "channel"]))
def test_equal_units_reach_the_budget_to_within_half_the_largest(sparsity, allocation, pattern):
    masks = Target(sparsity=sparsity, allocation=allocation, pattern=pattern).masks(scores.magnitude(PARAMS))
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim)
    assert abs(kept - (1 - sparsity) * SIZE) <= (4 if pattern == "block:2x2" else 48) / 2 + 0.5


def test_global_is_one_partition_over_the_model():
    masks = Target(sparsity=0.7, allocation="global").masks(scores.magnitude(PARAMS))
    joined = np.concatenate([np.abs(leaf).ravel() for leaf in jax.tree.leaves(PARAMS) if leaf.ndim == 2])
    threshold = np.sort(joined)[-round(0.3 * SIZE)]
    for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(PARAMS), strict=True):
        if mask.ndim:
            np.testing.assert_array_equal(mask, np.abs(leaf) >= threshold)


@pytest.mark.parametrize("allocation", ["erk", "global", "lamp"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
def test_counts_on_the_way_run_from_all_to_the_final_ones(allocation, pattern):
    target, values = Target(sparsity=0.8, allocation=allocation, pattern=pattern), scores.magnitude(PARAMS)
    on_the_way = jax.jit(target.counts_on_the_way)
    units = {
        name: p.units(masks_lib.flatten(PARAMS)[name].shape) for name, p in target.patterns(PARAMS).items()
    }
    assert {name: int(n) for name, n in on_the_way(values, 1.0).items()} == units
    assert {name: int(n) for name, n in on_the_way(values, 0.0).items()} == target.counts(values)
    totals = [sum(int(n) for n in on_the_way(values, share).values()) for share in (0.0, 0.3, 0.6, 1.0)]
    assert totals == sorted(totals)


def test_nm_leaves_beside_others_keep_their_own_sparsity():
    target = Target(sparsity=0.9, allocation="uniform", pattern={"dense_0/*": "2:4", "*": "unstructured"})
    assert sparsejax.densities(target.masks(scores.magnitude(PARAMS))) == pytest.approx(
        {"dense_0/kernel": 0.5, "dense_1/kernel": 0.1, "head/kernel": 0.1}
    )


def test_counts_of_shapes_are_exact_beyond_float32():
    """2^31 + 2^12 weights in two leaves: float32 could not tell 10 % of them from their neighbours."""
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)},
              "b": {"kernel": jax.ShapeDtypeStruct((2**6, 2**6), jnp.float32)}}  # fmt: skip
    counts = Target(sparsity=0.9, allocation="uniform").counts(shapes)
    assert sum(counts.values()) == round(0.1 * (2**31 + 2**12))


def test_random_masks_do_not_depend_on_other_leaves():
    alone = Target(sparsity=0.5, allocation="uniform").random_masks(
        jax.random.key(0), {"head": PARAMS["head"]}
    )
    together = Target(sparsity=0.5, allocation="uniform").random_masks(jax.random.key(0), PARAMS)
    np.testing.assert_array_equal(alone["head"]["kernel"], together["head"]["kernel"])


def test_random_small_units_are_not_disfavoured():
    """The edge blocks of a 4 x 6 leaf in 4x4 blocks hold half as many weights and are drawn as often."""
    params, target = (
        {"kernel": jnp.ones((4, 6))},
        Target(sparsity=0.5, pattern="block:4x4", allocation="uniform"),
    )
    drawn = sum(int(target.random_masks(jax.random.key(i), params)["kernel"][0, 5]) for i in range(200))
    assert 60 < drawn < 140


def test_an_explicit_allocation_replaces_the_sparsity():
    target = Target(sparsity=0.0, allocation={"*": 0.5})
    assert target.sparsity is None and sparsejax.sparsity(target.masks(scores.magnitude(PARAMS))) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target(sparsity=0.5, pattern={"typo/*": "2:4", "*": "unstructured"}).patterns(PARAMS),
         "pattern rule 'typo/*' matches no sparsified parameter (known: dense_0/kernel"),
        (lambda: jax.jit(Target(sparsity=0.5, allocation="global").counts)(PARAMS),
         "allocation 'global' depends on the values of the scores: call it outside jax.jit"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_nan_scores_name_the_leaf():
    values = {"head": {"kernel": jnp.asarray([[1.0, jnp.nan], [2.0, 3.0]])}}
    with pytest.raises(ValueError, match=re.escape("head/kernel")):
        Target(sparsity=0.5, allocation="uniform").masks(values)
