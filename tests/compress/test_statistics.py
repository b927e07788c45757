"""Running statistics against numpy on all inputs at once, however they are split and merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress import statistics

X = (np.random.default_rng(0).normal(size=(6, 5, 4)) * [1, 2, 0.1, 3] + [0, 100, 1, -3]).astype(np.float32)


def expected(x, flags=None):
    """The definitions, in float64."""
    flags = np.ones(x.shape[:2], bool) if flags is None else flags
    rows = x[flags].astype(np.float64)
    parts = [part[flag].astype(np.float64) for part, flag in zip(x, flags, strict=True) if flag.any()]
    return {
        "count": len(rows),
        "sequences": len(parts),
        "length": len(rows) / len(parts),
        "mean": rows.mean(0),
        "square": (rows**2).mean(0),
        "variance": rows.var(0),
        "within": np.mean([part.var(0) for part in parts], axis=0),
        "gram": rows.T @ rows / len(rows),
    }


def check(found, x, flags=None):
    wanted = expected(x, flags)
    assert set(found) == set(wanted)
    for name, value in found.items():
        assert value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, wanted[name], rtol=2e-5, atol=1e-5, err_msg=name)


def test_of_one_batch():
    check(statistics.of(statistics.NAMES, jnp.asarray(X)), X)


@pytest.mark.parametrize("width", [1024, 1100])
def test_a_gram_matrix_of_several_strips(width):
    x = np.random.default_rng(1).normal(size=(2, 40, width)).astype(np.float32) + 0.5
    flags = np.arange(80).reshape(2, 40) % 3 > 0
    gram = statistics.of(("gram",), jnp.asarray(x), jnp.asarray(flags))["gram"]
    np.testing.assert_allclose(gram, expected(x, flags)["gram"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(2,), (1, 3, 5)])
def test_updates_equal_one_batch(cuts):
    stats = statistics.init(statistics.NAMES, 4)
    for part in np.split(X, cuts):
        stats = jax.jit(statistics.update)(stats, jnp.asarray(part))
    check(stats, X)


def test_merge_is_of_both_and_has_a_neutral_element():
    a, b = (statistics.of(statistics.NAMES, jnp.asarray(part)) for part in (X[:1], X[1:]))
    check(statistics.merge(a, b), X)
    check(statistics.merge(statistics.init(statistics.NAMES, 4), statistics.merge(b, a)), X)


def test_only_chosen_tokens_count():
    flags = np.random.default_rng(1).random((6, 5)) < 0.5
    flags[2] = False
    stats = statistics.init(statistics.NAMES, 4)
    for part, flag in zip(np.split(X, 2), np.split(flags, 2), strict=True):
        stats = statistics.update(stats, jnp.asarray(part), jnp.asarray(flag))
    check(stats, X, flags)


def test_small_variance_beside_a_large_mean_survives_many_batches():
    x = np.random.default_rng(2).normal(size=(64, 8, 1)).astype(np.float32) * 0.01 + 100
    stats = statistics.init(("variance",), 1)
    for part in np.split(x, 16):
        stats = statistics.update(stats, jnp.asarray(part))
    np.testing.assert_allclose(stats["variance"], x.astype(np.float64).var((0, 1)), rtol=1e-2)


def test_bfloat16_inputs_are_computed_in_float32():
    x = jnp.asarray(X).astype(jnp.bfloat16)
    check(statistics.of(statistics.NAMES, x), np.asarray(x, np.float32))


def test_only_what_is_needed_is_kept():
    assert set(statistics.init(("square",), 3)) == {"count", "sequences", "length", "square"}
    assert set(statistics.init(("variance",), 3)) == {"count", "sequences", "length", "mean", "variance"}


def test_isotropic():
    stats = statistics.isotropic(statistics.init(statistics.NAMES, 3))
    np.testing.assert_array_equal(stats["gram"], np.eye(3))
    np.testing.assert_array_equal(stats["mean"], np.zeros(3))
    np.testing.assert_array_equal(stats["square"], np.ones(3))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown statistic 'grams'; did you mean 'gram'"):
        statistics.init(("grams",), 3)
