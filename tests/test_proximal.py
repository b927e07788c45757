"""The group sparse envelope and its prox against oracles that share no formula with them: scipy on the
definitions, enumeration, and a float64 solution by sorting all breakpoints."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax import patterns
from sparsejax.proximal import group_l2_prox, l0_projection, wgsef_factors, wgsef_prox, wgsef_value

V = jnp.asarray([3.0, -2.0, 1.0, 0.5])


def problem(rng, sizes=(1, 2, 3, 1)):
    """Labels of groups of these sizes; random weights, v, k and lam."""
    labels = np.repeat(np.arange(len(sizes)), rng.permutation(sizes))
    v = rng.standard_normal(labels.size).astype(np.float32)
    weights = 10 ** rng.uniform(-0.5, 0.5, len(sizes)).astype(np.float32)
    return labels, weights, v, int(rng.integers(1, len(sizes) + 1)), np.float32(10 ** rng.uniform(-1.5, 1.5))


def squares(x, labels):
    return np.bincount(labels, weights=np.float64(x) ** 2)


# --- independent definitions -------------------------------------------------------------------------


def conjugate(y, k, labels, weights):
    """sup_x <x, y> - gs_k(x), by enumeration of the supports."""
    gains = squares(y, labels) / weights
    return max(0.5 * gains[list(s)].sum() for s in itertools.combinations(range(gains.size), k))


def minimise_above_conjugate(objective, gradient, k, labels, weights, scale):
    """argmin_y of objective(y) + scale * conjugate(y), as a smooth problem with one bound per support."""
    supports = [np.isin(labels, s) for s in itertools.combinations(range(weights.size), k)]
    inverse = 1 / weights[labels]
    bounds = [
        {
            "type": "ineq",
            "fun": lambda z, s=s: z[-1] - 0.5 * (z[:-1] ** 2 * inverse * s).sum(),
            "jac": lambda z, s=s: np.append(-z[:-1] * inverse * s, 1.0),
        }
        for s in supports
    ]
    solution = scipy.optimize.minimize(
        lambda z: objective(z[:-1]) + scale * z[-1],
        np.zeros(labels.size + 1),
        jac=lambda z: np.append(gradient(z[:-1]), scale),
        constraints=bounds,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return solution.x[:-1]


def by_regimes(v, lam, k, weights):
    """The prox of single entries in float64: of all 3^m assignments to the regimes zero, soft threshold and
    ridge that are consistent, any (they agree)."""
    c = np.float64(lam) * weights
    b = np.sqrt(c) * np.abs(np.float64(v))
    if np.count_nonzero(v) <= k:
        return v / (1 + c)
    v, b, c, zeros = v[v != 0], b[v != 0], c[v != 0], v == 0
    for regime in itertools.product((0, 1, 2), repeat=v.size):
        inside, full = np.equal(regime, 1), np.equal(regime, 2)
        if inside.any():
            t = (k - full.sum() + c[inside].sum()) / b[inside].sum()
        elif full.sum() == k:
            t = max((1 + c[full]) / b[full])
        else:
            continue
        u = b * t - c
        low = np.where(full, 1, np.where(inside, 0, -np.inf))
        high = np.where(full, np.inf, np.where(inside, 1, 0))
        if ((u >= low) & (u <= high)).all():
            u = np.clip(u, 0, 1)
            found = np.zeros(zeros.size)
            found[~zeros] = v * u / (u + c)
            return found
    raise AssertionError("no consistent assignment")


def by_sorting(v, lam, k, weights):
    """The prox of single entries in float64 from the sorted breakpoints, for large inputs."""
    c = np.float64(lam) * weights
    b = np.sqrt(c) * np.abs(np.float64(v))
    breaks = np.sort(np.concatenate([c[b > 0] / b[b > 0], (1 + c[b > 0]) / b[b > 0]]))
    total = lambda t: np.clip(b * t - c, 0, 1).sum()
    low, high = 0, breaks.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(breaks[middle]) < k else (low, middle)
    ends = total(breaks[low]), total(breaks[high])
    t = breaks[low] + (k - ends[0]) * (breaks[high] - breaks[low]) / (ends[1] - ends[0])
    u = np.clip(b * t - c, 0, 1)
    return v * u / (u + c)


# --- the envelope ------------------------------------------------------------------------------------


def test_published_example():
    assert float(wgsef_value(V, 2)) == pytest.approx(10.5625, abs=1e-5)
    np.testing.assert_allclose(wgsef_prox(V, 1.0, 2), [1.5, -1, 0, 0], atol=1e-6)
    expected = [2.727273, -1.730769, 0.730769, 0.230769]
    np.testing.assert_allclose(wgsef_prox(V, 0.1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_value_is_the_biconjugate(seed):
    labels, weights, x, k, _ = problem(np.random.default_rng(seed))
    y = minimise_above_conjugate(lambda y: -x @ y, lambda y: -x, k, labels, weights, 1.0)
    expected = x @ y - conjugate(y, k, labels, weights)
    assert float(wgsef_value(x, k, groups=labels, weights=weights)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("seed", range(12))
def test_prox_by_moreau_from_the_conjugate(seed):
    """prox_{lam f}(v) = v - lam prox_{f*/lam}(v / lam), whose right side needs only the conjugate."""
    labels, weights, v, k, lam = problem(np.random.default_rng(seed))
    target = np.float64(v) / lam
    y = minimise_above_conjugate(
        lambda y: 0.5 * ((y - target) ** 2).sum(), lambda y: y - target, k, labels, weights, 1 / lam
    )
    np.testing.assert_allclose(
        wgsef_prox(v, lam, k, groups=labels, weights=weights), v - lam * y, atol=3e-4 * np.abs(v).max()
    )


def test_prox_by_enumeration_of_regimes():
    rng = np.random.default_rng(0)
    for _ in range(60):
        v = rng.standard_normal(5).astype(np.float32) * np.float32(10 ** rng.uniform(-2, 2))
        weights = (10 ** rng.uniform(-1, 1, 5)).astype(np.float32)
        k, lam = int(rng.integers(1, 6)), np.float32(10 ** rng.uniform(-3, 3))
        expected = by_regimes(v, lam, k, weights)
        found = wgsef_prox(v, lam, k, weights=weights)
        np.testing.assert_allclose(found, expected, atol=4e-7 * np.abs(v).max())


@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("k", [1, 700, 30_000])
def test_prox_of_many_groups(lam, k):
    rng = np.random.default_rng(k)
    v = rng.standard_normal(50_000).astype(np.float32)
    weights = np.exp(rng.standard_normal(v.size)).astype(np.float32)
    found = np.asarray(wgsef_prox(v, lam, k, weights=weights))
    np.testing.assert_allclose(found, by_sorting(v, np.float32(lam), k, weights), rtol=0, atol=1e-6 * v.max())


def test_nothing_near_the_prox_is_better():
    """The objective itself, with the envelope's own value, at 200 perturbed points."""
    rng = np.random.default_rng(3)
    labels, weights, v, k, lam = problem(rng, (3, 1, 2, 1, 1, 2))
    options = {"groups": labels, "weights": weights}

    def objective(x):
        return 0.5 * jnp.sum((x - v) ** 2) + lam * wgsef_value(x, k, **options)

    best = wgsef_prox(v, lam, k, **options)
    steps = rng.standard_normal((200, v.size)) * 10 ** rng.uniform(-3, 0, (200, 1))
    others = jax.vmap(objective)(best + jnp.asarray(steps, jnp.float32))
    assert float(others.min()) >= float(objective(best)) - 1e-6


def test_value_of_one_group_and_of_few_nonzero():
    x = jnp.asarray([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    rows = patterns.Channel(0)
    assert float(wgsef_value(x, 1, groups=rows)) == pytest.approx(12.5)
    y = jnp.asarray([1.0, -2.0, 3.0])
    assert float(wgsef_value(y, 1)) == pytest.approx(0.5 * 36)
    assert float(wgsef_value(y, 3, weights=jnp.asarray([2.0, 1.0, 1.0]))) == pytest.approx(0.5 * 15)
    assert float(wgsef_value(jnp.zeros(3), 1)) == 0.0


def test_limits_of_the_prox():
    weights = jnp.asarray([1.0, 4.0, 2.0, 1.0])
    np.testing.assert_allclose(wgsef_prox(V, 0.7, 4, weights=weights), V / (1 + 0.7 * weights), rtol=1e-6)
    np.testing.assert_array_equal(wgsef_prox(V, 0.0, 2), V)
    np.testing.assert_allclose(wgsef_prox(V, 1e-30, 1), V, rtol=1e-6)
    kept = np.abs(V) / np.sqrt(weights)
    kept = kept >= np.sort(kept)[-2]
    huge = wgsef_prox(V, 1e8, 2, weights=weights)
    np.testing.assert_allclose(huge, np.where(kept, V / (1 + 1e8 * weights), 0), rtol=1e-5)
    np.testing.assert_allclose(wgsef_prox(V * 1e-25, 0.1, 2), wgsef_prox(V, 0.1, 2) * 1e-25, rtol=1e-6)
    np.testing.assert_array_equal(wgsef_prox(jnp.zeros(5), 1.0, 2), np.zeros(5))


@pytest.mark.parametrize("lam", [1e-6, 1.0, 1e6])
def test_ties_share_alike(lam):
    """m equal groups: u = k / m for all of them, so that nothing depends on positions."""
    found = wgsef_prox(jnp.full(10, 2.0), lam, 3)
    np.testing.assert_allclose(found, np.full(10, 2 * 0.3 / (0.3 + lam)), rtol=1e-5)


def test_fewer_nonzero_groups_than_k():
    v = jnp.asarray([0.0, 5.0, 0.0, -1.0])
    np.testing.assert_allclose(wgsef_prox(v, 1.0, 3), v / 2)
    np.testing.assert_allclose(wgsef_prox(v, 1.0, 2), v / 2)
    np.testing.assert_allclose(
        wgsef_prox(v, 1.0, 1), by_regimes(np.asarray(v), 1.0, 1, np.ones(4)), rtol=1e-6
    )


def test_how_many_survive():
    """At lam = 10 exactly k = 2 of 6 Gaussian groups survive in 79 % of draws, at 0.1 in fewer than 0.1 %."""
    v = jax.random.normal(jax.random.key(0), (4000, 6))
    for lam, low, high in ((10.0, 0.76, 0.82), (0.1, 0.0, 0.003)):
        survivors = (jax.vmap(lambda row: wgsef_prox(row, lam, 2))(v) != 0).sum(1)  # noqa: B023
        assert survivors.min() >= 2
        assert low <= float((survivors == 2).mean()) <= high


finite = st.floats(-100, 100, width=32)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 7), elements=finite),
    st.floats(2**-10, 2**10, width=32),
    st.integers(1, 7),
    hnp.arrays(np.float32, 7, elements=st.floats(0.125, 8, width=32)),
)
@example(
    np.array([[np.finfo(np.float32).tiny] + [1] * 6, [1] * 7], np.float32), 1.0, 1, np.ones(7, np.float32)
)
def test_properties_of_the_prox(pair, lam, k, weights):
    found = np.asarray(jax.vmap(lambda v: wgsef_prox(v, lam, k, weights=weights))(pair))
    scale = max(np.abs(pair).max(), 1e-30)
    assert np.linalg.norm(found[0] - found[1]) <= np.linalg.norm(pair[0] - pair[1]) + 2e-6 * scale
    assert (np.abs(found) <= np.abs(pair)).all() and (found * pair >= 0).all()
    visible = np.abs(pair) > 1e-6 * scale  # smaller factors may round to zero
    assert (np.count_nonzero(found, 1) >= np.minimum(k, visible.sum(1))).all()
    values = [float(wgsef_value(x, k, weights=weights)) for x in pair]
    for x, value in zip(pair, values, strict=True):
        assert value >= 0.5 * (weights * np.float64(x) ** 2).sum() * (1 - 1e-5) - 1e-30  # squares underflow


@pytest.mark.parametrize("groups", [patterns.Channel(1), patterns.Block((2, 3), "max")])
def test_patterns_are_groups_of_entries(groups):
    """Channels and (ragged) blocks of any pooling against the same groups as labels."""
    v = jax.random.normal(jax.random.key(1), (6, 10))
    units = jnp.arange(groups.units(v.shape)).reshape(jax.eval_shape(groups.pool, v).shape)
    labels = np.asarray(groups.expand(units, v.shape))
    for function in (
        lambda g: wgsef_prox(v, 0.3, 3, groups=g),
        lambda g: wgsef_value(v, 3, groups=g),
        lambda g: group_l2_prox(v, 0.9, groups=g),
        lambda g: l0_projection(v, 3, groups=g),
    ):
        np.testing.assert_allclose(function(groups), function(labels), rtol=2e-6)


def test_n_of_m_is_one_envelope_per_group():
    v = jax.random.normal(jax.random.key(2), (8, 3))
    found = wgsef_prox(v, 0.5, 1, groups=patterns.NM(2, 4))
    for column in range(3):
        for start in (0, 4):
            alone = wgsef_prox(v[start : start + 4, column], 0.5, 2)
            np.testing.assert_allclose(found[start : start + 4, column], alone, rtol=1e-6)
    values = sum(float(wgsef_value(v[s : s + 4, c], 2)) for c in range(3) for s in (0, 4))
    assert float(wgsef_value(v, 1, groups=patterns.NM(2, 4))) == pytest.approx(values, rel=1e-6)


def test_a_metric_is_a_change_of_coordinates():
    """Minimises the weighted objective: 1/2 sum_g D_g ||x_g - v_g||^2 + lam GS_k(x)."""
    rng = np.random.default_rng(5)
    labels, weights, v, k, lam = problem(rng, (3, 1, 2, 1, 1, 2))
    metric = np.exp(rng.standard_normal(weights.size)).astype(np.float32)
    best = wgsef_prox(v, lam, k, groups=labels, weights=weights, metric=metric)

    def objective(x):
        return 0.5 * jnp.sum(metric[labels] * (x - v) ** 2) + lam * wgsef_value(
            x, k, groups=labels, weights=weights
        )

    steps = rng.standard_normal((200, v.size)) * 10 ** rng.uniform(-3, 0, (200, 1))
    others = jax.vmap(objective)(best + jnp.asarray(steps, jnp.float32))
    assert float(others.min()) >= float(objective(best)) - 1e-5


def test_jit_vmap_and_traced_arguments():
    v = jax.random.normal(jax.random.key(3), (5, 40))
    batched = jax.jit(jax.vmap(wgsef_prox))(v, jnp.linspace(0.0, 2.0, 5), jnp.arange(1, 6))
    for i in range(5):
        np.testing.assert_allclose(batched[i], wgsef_prox(v[i], 0.5 * i, i + 1), atol=1e-6)
    rows = wgsef_factors(jnp.abs(v), 0.5, 4, axis=-1)
    np.testing.assert_allclose(rows[2], wgsef_factors(jnp.abs(v[2]), 0.5, 4), atol=1e-6)


@pytest.mark.slow
def test_derivatives():
    """Of the prox against finite differences in float64 by sorting; of the value against (v - prox) / lam."""
    rng = np.random.default_rng(7)
    v, weights, direction = rng.standard_normal(9), np.exp(rng.standard_normal(9)), rng.standard_normal(9)
    narrow = [jnp.asarray(a, jnp.float32) for a in (v, weights, direction)]
    _, forward = jax.jvp(lambda x: wgsef_prox(x, 0.4, 3, weights=narrow[1]), narrow[:1], narrow[2:])
    step = 1e-6 * direction
    expected = (by_sorting(v + step, 0.4, 3, weights) - by_sorting(v - step, 0.4, 3, weights)) / 2e-6
    np.testing.assert_allclose(forward, expected, atol=1e-4)
    back = jax.grad(lambda x: wgsef_prox(x, 0.4, 3, weights=narrow[1]) @ narrow[2])(narrow[0])
    assert np.isfinite(back).all() and float(back @ narrow[2]) == pytest.approx(
        float(narrow[2] @ forward), rel=1e-4
    )
    x = wgsef_prox(narrow[0], 0.4, 3, weights=narrow[1])
    slope = jax.grad(lambda x: wgsef_value(x, 3, weights=narrow[1]))(x)
    np.testing.assert_allclose(jnp.where(x != 0, slope - (narrow[0] - x) / 0.4, 0), np.zeros(9), atol=2e-5)
    blocks = jax.grad(lambda x: wgsef_prox(x, 0.4, 1, groups=patterns.Channel(0)).sum())(jnp.eye(3)[:2] * 0)
    assert np.isfinite(blocks).all()


def test_bfloat16_is_computed_in_float32():
    v = V.astype(jnp.bfloat16)
    found = wgsef_prox(v, 0.1, 2)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wgsef_prox(V, 0.1, 2).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wgsef_prox(V, 1.0, 5), "k must be an integer from 1 to the number of groups, 4, got 5"),
        (lambda: wgsef_prox(V, 1.0, 0), "k must be an integer from 1 to the number of groups, 4, got 0"),
        (lambda: wgsef_prox(V, 1.0, 1.5), "got 1.5"),
        (lambda: wgsef_prox(V, jnp.inf, 2), "lam must be finite and at least 0, got inf"),
        (lambda: wgsef_prox(V, -1.0, 2), "lam must be finite and at least 0, got -1.0"),
        (lambda: wgsef_prox(V.at[1].set(jnp.inf), 1.0, 2), "holds infinities or NaN"),
        (lambda: wgsef_value(V.at[1].set(jnp.nan), 2), "holds infinities or NaN"),
        (
            lambda: wgsef_prox(V, 1.0, 2, weights=jnp.zeros(4)),
            "group weights must be positive and finite, got 0",
        ),
        (
            lambda: wgsef_prox(V, 1.0, 2, groups=np.zeros((3, 2), int)),
            "do not broadcast to the array of shape",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_sort_is_compiled():
    text = jax.jit(wgsef_prox).lower(jnp.zeros(4096), 1.0, 7).compile().as_text()
    assert " sort(" not in text and "TopK" not in text
    assert (
        " sort(" in jax.jit(jnp.sort).lower(jnp.zeros(4096)).compile().as_text()
    )  # what the above looks for
