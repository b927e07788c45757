"""Wanda and magnitude: numpy sorts, orthonormal inputs, rescaling, and exact counts."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import compress
from sparsejax.compress import statistics
from sparsejax.compress.base import dropped, layer_budget

RNG = np.random.default_rng(0)
W = RNG.normal(size=(32, 24)).astype(np.float32)
X = (RNG.normal(size=(3, 16, 32)) * np.exp(RNG.normal(size=32))).astype(np.float32)


def stats(x):
    return statistics.of(("square",), jnp.asarray(x, jnp.float32))


def rows_by_sort(scores, sparsity):
    """For every output the floor(sparsity * in) lowest scores dropped by a stable sort."""
    order = np.argsort(scores, axis=0, kind="stable")[: int(sparsity * len(scores))]
    mask = np.ones(scores.shape, bool)
    np.put_along_axis(mask, order, False, 0)
    return mask


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_wanda_is_a_sort_of_magnitudes_times_norms(sparsity):
    kernel, mask = compress.wanda().prune(jnp.asarray(W), stats(X), sparsity, "unstructured")
    norms = np.sqrt((X.astype(np.float64) ** 2).sum((0, 1)))
    expected = rows_by_sort(np.abs(W) * norms[:, None], sparsity)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(kernel, np.where(expected, W, 0))
    assert (expected != rows_by_sort(np.abs(W), sparsity)).any()


def test_wanda_with_orthonormal_inputs_is_magnitude_in_rows():
    x, _ = np.linalg.qr(RNG.normal(size=(48, 32)))
    one = compress.wanda().prune(jnp.asarray(W), stats(x[None]), 0.5, "unstructured")
    other = compress.magnitude(scope="row").prune(jnp.asarray(W), {}, 0.5, "unstructured")
    np.testing.assert_array_equal(one[1], other[1])


def test_moving_a_scale_from_weights_to_inputs_leaves_the_mask_of_wanda():
    scale = 2.0 ** RNG.integers(-4, 5, size=32).astype(np.float32)
    one = compress.wanda().prune(jnp.asarray(W), stats(X), 0.5, "unstructured")
    other = compress.wanda().prune(jnp.asarray(W / scale[:, None]), stats(X * scale), 0.5, "unstructured")
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("method", "needs_scores"), [(compress.wanda(), True), (compress.magnitude(), False)]
)
def test_nm_keeps_the_best_of_every_group_of_inputs(method, needs_scores):
    scores = np.abs(W) * (np.sqrt((X**2).mean((0, 1)))[:, None] if needs_scores else 1)
    groups = scores.reshape(8, 4, 24)
    expected = (np.argsort(np.argsort(-groups, 1, kind="stable"), 1) < 2).reshape(32, 24)
    np.testing.assert_array_equal(method.prune(jnp.asarray(W), stats(X), None, "2:4")[1], expected)


def test_magnitude_drops_the_smallest_of_the_layer_whatever_its_scale():
    _, mask = compress.magnitude().prune(jnp.asarray(W), {}, 0.3, "unstructured")
    np.testing.assert_array_equal(mask, np.abs(W) > np.sort(np.abs(W), axis=None)[int(0.3 * W.size) - 1])
    np.testing.assert_array_equal(
        compress.magnitude().prune(jnp.asarray(8 * W), {}, 0.3, "unstructured")[1], mask
    )


def test_ties_do_not_change_the_count():
    tied = jnp.asarray(np.sign(W))
    for method, count in ((compress.magnitude(), 768 - 230), (compress.wanda(), 24 * (32 - 9))):
        mask = method.prune(tied, stats(np.ones_like(X)), 0.3, "unstructured")[1]
        assert int(np.sum(mask)) == count


def test_counts_of_decimal_sparsities_do_not_lose_one_to_rounding():
    assert 0.29 * 100 < 29 and dropped(0.29, 100) == 29
    assert (1 - 0.9) * 10 < 1 and dropped(1 - 0.9, 10) == 1
    assert dropped(0.3, 32) == 9
    assert dropped(0.7, 4096 * 4096) == int(4096 * 4096 * 7 // 10)


def test_nm_budgets():
    assert layer_budget("x", None, "2:4") == (0.5, compress.base.parse("2:4"))
    assert layer_budget("x", 0.25, "2:4") == (0.25, compress.base.parse("3:4"))
    with pytest.raises(ValueError, match="x cannot do the pattern NM"):
        layer_budget("x", None, compress.base.NM(2, 4, axis=-1))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_outputs_are_masked_in_chunks(monkeypatch, pattern):
    whole = compress.wanda().prune(jnp.asarray(W), stats(X), 0.5, pattern)
    monkeypatch.setattr(sys.modules["sparsejax.compress.wanda"], "_OUTPUTS", 7)
    for one, other in zip(whole, compress.wanda().prune(jnp.asarray(W), stats(X), 0.5, pattern), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unknown_scope():
    with pytest.raises(ValueError, match="unknown scope 'column'"):
        compress.wanda(scope="column").prune(jnp.asarray(W), stats(X), 0.5, "unstructured")


def test_nan_weights_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        compress.wanda().prune(jnp.asarray(W).at[0, 0].set(jnp.nan), stats(X), 0.5, "unstructured")
