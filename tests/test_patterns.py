"""Patterns against brute force, and one contract for all of them."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import patterns
from sparsejax.patterns import NM, Block, Channel, Group, Unstructured

SHAPE = (12, 8)
LABELS = np.repeat(np.arange(6), [1, 3, 2, 2, 3, 1])[:, None]
CASES = {
    "unstructured": (Unstructured(), 0.7),
    "2:4": (NM(2, 4), 0.5),
    "1:4 along outputs": (NM(1, 4, axis=-1), 0.75),
    "block 4x4": (Block((4, 4)), 0.5),
    "block 5x3": (Block((5, 3)), 0.5),
    "channel": (Channel(), 0.5),
    "input channel": (Channel(-2), 0.75),
    "group": (Group(LABELS), 0.5),
}


@pytest.mark.parametrize("name", CASES)
class TestContract:
    def scores(self):
        return jax.random.uniform(jax.random.key(1), SHAPE, minval=0.1)

    def test_counts_units_exactly_also_with_ties(self, name):
        pattern, sparsity = CASES[name]
        for scores in (self.scores(), jnp.ones(SHAPE)):
            mask = pattern.mask(scores, sparsity)
            assert mask.shape == SHAPE and mask.dtype == bool
            kept = int(pattern.reduce(mask).sum())
            assert kept == round((1 - sparsity) * pattern.units(SHAPE))

    def test_reduce_inverts_expand(self, name):
        pattern, sparsity = CASES[name]
        mask = pattern.mask(self.scores(), sparsity)
        np.testing.assert_array_equal(pattern.expand(pattern.reduce(mask), SHAPE), mask)

    def test_unit_sizes_add_up(self, name):
        pattern, _ = CASES[name]
        grid = pattern.pool(self.scores()).shape
        assert np.broadcast_to(pattern.unit_sizes(SHAPE), grid).sum() == np.prod(SHAPE)
        assert np.prod(grid) == pattern.units(SHAPE)

    def test_jit_equals_no_jit(self, name):
        pattern, sparsity = CASES[name]
        jitted = jax.jit(lambda scores: pattern.mask(scores, sparsity))
        np.testing.assert_array_equal(jitted(self.scores()), pattern.mask(self.scores(), sparsity))

    def test_keep_wins_over_scores(self, name):
        pattern, sparsity = CASES[name]
        keep = pattern.reduce(pattern.mask(-self.scores(), sparsity))
        again = pattern.select(pattern.pool(self.scores()), int(keep.sum()), keep=keep)
        np.testing.assert_array_equal(again, keep)


@pytest.mark.parametrize("name", [name for name in CASES if ":" not in name])
def test_kept_units_beat_dropped_ones(name):
    pattern, sparsity = CASES[name]
    scores = jax.random.uniform(jax.random.key(1), SHAPE)
    pooled = np.asarray(pattern.pool(scores))
    kept = np.asarray(pattern.reduce(pattern.mask(scores, sparsity)))
    assert pooled[kept].min() >= pooled[~kept].max()


def test_nm_is_the_best_of_all_candidates():
    scores = np.random.default_rng(0).normal(size=(8, 3)) ** 2
    mask = np.asarray(NM(2, 4).mask(jnp.asarray(scores), 0.5))
    for group, column in itertools.product((slice(0, 4), slice(4, 8)), range(3)):
        best = max(
            itertools.combinations(range(4), 2), key=lambda pair: scores[group, column][list(pair)].sum()
        )
        assert tuple(np.flatnonzero(mask[group, column])) == best


def test_nm_groups_run_along_the_contracted_axis():
    mask = NM(1, 2).mask(jnp.asarray([[4.0, 1.0], [3.0, 2.0]]))
    np.testing.assert_array_equal(mask, [[True, False], [False, True]])


def test_nm_on_the_way_keeps_every_group_and_the_exact_count():
    scores = jax.random.normal(jax.random.key(0), (16, 5))
    final = NM(2, 4).select(scores)
    for k in (40, 41, 60, 80):
        mask = jax.jit(NM(2, 4).select)(scores, k)
        assert int(mask.sum()) == k and bool(jnp.all(mask | ~final))


@pytest.mark.parametrize("shape", [(5, 8), (7, 8), (6, 8), (3, 3, 5, 6)])
def test_blocks_that_do_not_divide_keep_the_shape(shape):
    mask = Block((4, 4)).mask(jax.random.normal(jax.random.key(0), shape) ** 2, 0.5)
    assert mask.shape == shape
    padded = np.zeros((*shape[:-2], 8, 8), bool)
    padded[..., : shape[-2], : shape[-1]] = mask
    blocks = padded.reshape(*shape[:-2], 2, 4, 2, 4).any(axis=(-3, -1))
    np.testing.assert_array_equal(
        np.repeat(np.repeat(blocks, 4, -2), 4, -1)[..., : shape[-2], : shape[-1]], mask
    )


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["sum", "mean", "max"]),
)
def test_block_pooling_is_the_numpy_one(rows, columns, high, wide, pooling):
    scores = np.random.default_rng(rows * 10 + columns).uniform(size=(rows, columns)).astype(np.float32)
    pooled = Block((high, wide), pooling).pool(jnp.asarray(scores))
    expected = [
        [getattr(np, pooling)(scores[i : i + high, j : j + wide]) for j in range(0, columns, wide)]
        for i in range(0, rows, high)
    ]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5)


def test_parse():
    assert patterns.parse("2:4") == NM(2, 4)
    assert patterns.parse("block:4x8") == Block((4, 8))
    assert patterns.parse("channel:-2") == Channel(-2)
    assert patterns.parse(NM(1, 4)) == NM(1, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.parse("2;4"), "unknown pattern '2;4' (known: unstructured, N:M such as 2:4"),
        (lambda: NM(5, 4), "N:M needs 0 < N <= M, got 5:4"),
        (
            lambda: NM(2, 4).mask(jnp.ones((6, 8))),
            "2:4 needs axis -2 of scores to be divisible by 4, but its shape is (6, 8)",
        ),
        (lambda: NM(2, 4).mask(jnp.ones((8, 8)), 0.9), "2:4 has sparsity 0.5, got 0.9"),
        (lambda: Block((0, 4)), "a block needs positive side lengths, got (0, 4)"),
        (lambda: Block((4, 4), "median"), "unknown pooling 'median'; did you mean 'mean'?"),
        (
            lambda: Block((2, 2, 2)).mask(jnp.ones((4, 4)), 0.5),
            "block (2, 2, 2) has more axes than scores of shape (4, 4)",
        ),
        (lambda: Channel(2).mask(jnp.ones((4, 4)), 0.5), "channel axis 2 is outside scores of shape (4, 4)"),
        (lambda: Group([0, 2]), "group labels must be the integers 0 ... groups-1, all in use, got [0 2]"),
        (
            lambda: Group([0, 1, 2]).mask(jnp.ones((4, 4)), 0.5),
            "group labels of shape (3,) do not broadcast to scores",
        ),
        (lambda: Unstructured().mask(jnp.ones((4, 4)), 1.0), "sparsity must be in [0, 1), got 1.0"),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
