"""Selection against a stable numpy sort, for every dtype, with ties, infinities and NaN, and under sharding."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.selection import global_top_k_masks, top_k_mask


def sorted_top_k(scores, k):
    """The definition: a stable sort by descending score, NaN last."""
    flat = np.asarray(scores, np.float64).ravel()
    flat = np.where(np.isnan(flat), -np.inf, flat)
    mask = np.zeros(flat.size, bool)
    mask[np.lexsort((np.arange(flat.size), np.isnan(np.asarray(scores, np.float64).ravel()), -flat))[:k]] = (
        True
    )
    return mask.reshape(np.shape(scores))


GENERATORS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "ties": lambda rng, shape: rng.integers(-2, 3, size=shape),
    "equal": lambda rng, shape: np.full(shape, -1.5),
    "special": lambda rng, shape: rng.choice([-np.inf, np.inf, 0.0, -0.0, 1e-40, 3.0], size=shape),
}


FLOATS, INTEGERS = (jnp.float32, jnp.bfloat16, jnp.float16), (jnp.int32, jnp.uint8)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in GENERATORS for dtype in FLOATS]
    + [(kind, dtype) for kind in ("ties", "equal") for dtype in INTEGERS],
)
@pytest.mark.parametrize("shape", [(5,), (7, 9), (40, 300), (3, 3, 4, 16), (1, 1)])
def test_equals_a_stable_sort(shape, kind, dtype):
    values = GENERATORS[kind](np.random.default_rng(0), shape)
    scores = jnp.asarray(np.abs(values) if dtype == jnp.uint8 else values).astype(dtype)
    for k in (0, 1, scores.size // 3, scores.size - 1, scores.size):
        # XLA on CPUs treats denormals as zero, and so does its own sort
        expected = sorted_top_k(np.where(np.abs(np.asarray(scores, np.float32)) < 1e-37, 0, scores), k)
        np.testing.assert_array_equal(top_k_mask(scores, k), expected)


@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 9), 0), ((7, 9), 1), ((64, 50), 0), ((5, 40, 3), 1), ((6, 33), -1)]
)
def test_rows_are_selected_independently(shape, axis):
    scores = np.random.default_rng(1).integers(-3, 4, size=shape).astype(np.float32)
    for k in (0, 1, 3, shape[axis]):
        expected = np.apply_along_axis(lambda row, k=k: sorted_top_k(row, k), axis, scores)
        np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k, axis), expected)


def test_rows_may_have_their_own_k():
    scores = jnp.asarray(np.random.default_rng(2).normal(size=(4, 50)))
    counts = jnp.asarray([[0], [3], [50], [17]])
    np.testing.assert_array_equal(top_k_mask(scores, counts, axis=1).sum(1, keepdims=True), counts)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(0, 45),
    st.integers(0, 2**40 - 1),
    st.integers(0, 2**40 - 1),
)
def test_candidates_and_keep(values, k, candidate_bits, keep_bits):
    scores = jnp.asarray(values, jnp.float32)
    flags = np.arange(scores.size)
    candidates, keep = [(bits >> flags & 1).astype(bool) for bits in (candidate_bits, keep_bits)]
    mask = np.asarray(jax.jit(top_k_mask)(scores, k, candidates=candidates, keep=keep))
    assert mask.sum() == min(k, scores.size)
    if keep.sum() <= k:
        assert mask[keep].all()
        if keep.sum() + (candidates & ~keep).sum() >= k:
            assert not mask[~candidates & ~keep].any()


def test_k_may_be_traced_and_is_clipped():
    scores = jnp.arange(10.0)
    select = jax.jit(top_k_mask)
    assert [int(select(scores, k).sum()) for k in (-3, 0, 4, 10, 99)] == [0, 0, 4, 10, 10]
    rows = [int(top_k_mask(scores[:, None], k, axis=0).sum()) for k in (-3, 0, 4, 10, 2**32 - 1)]
    assert rows == [0, 0, 4, 10, 10]
    chex.assert_trees_all_equal(select(scores, 4), top_k_mask(scores, 4))


def test_global_selection_is_one_sort_over_the_tree():
    rng = np.random.default_rng(3)
    tree = {
        "b": rng.integers(0, 9, (6, 7)),
        "a": rng.integers(0, 9, 11),
        "c": {"d": rng.integers(0, 9, (2, 3, 5))},
    }
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    leaves = jax.tree.leaves(tree)
    joined = np.concatenate([np.ravel(leaf) for leaf in leaves])
    for k in (0, 1, 30, 60, joined.size):
        masks = global_top_k_masks(tree, k)
        chex.assert_trees_all_equal_structs(masks, tree)
        flat = np.concatenate([np.ravel(mask) for mask in jax.tree.leaves(masks)])
        np.testing.assert_array_equal(flat, sorted_top_k(joined, k))


def test_nan_is_an_error_outside_jit_and_last_inside():
    scores = jnp.asarray([1.0, jnp.nan, -jnp.inf, 2.0])
    with pytest.raises(ValueError, match=re.escape("scores of shape (4,) contains NaN")):
        top_k_mask(scores, 2)
    with pytest.raises(ValueError, match=re.escape("layer/kernel of shape (4,) contains NaN")):
        global_top_k_masks({"layer": {"kernel": scores}}, 2)
    np.testing.assert_array_equal(jax.jit(top_k_mask)(scores, 3), [True, False, True, True])


def test_more_scores_than_positions_are_refused():
    shapes = [jax.ShapeDtypeStruct((2**31, 1), jnp.float32)] * 2
    with pytest.raises(ValueError, match="cannot select among 4294967296 scores"):
        jax.eval_shape(lambda tree: global_top_k_masks(tree, 5), shapes)


def test_float64_scores_use_all_their_bits():
    with jax.enable_x64(True):
        scores = jnp.asarray(1.0 + np.arange(100)[::-1] * 2.0**-52, jnp.float64)
        np.testing.assert_array_equal(top_k_mask(scores, 7), np.arange(100) < 7)


def test_selection_never_sorts():
    text = jax.jit(top_k_mask).lower(jnp.zeros((64, 64)), 5).as_text()
    assert "stablehlo.sort" not in text and "top_k" not in text.replace("top_k_mask", "")


def test_vmap_equals_a_loop():
    scores = jax.random.normal(jax.random.key(0), (5, 3, 20)).round(1)
    looped = jnp.stack([top_k_mask(row, 13) for row in scores])
    np.testing.assert_array_equal(jax.vmap(lambda row: top_k_mask(row, 13))(scores), looped)
