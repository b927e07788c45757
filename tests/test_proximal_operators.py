"""Proximal operators and projections besides the envelope's: against scipy on the definitions, and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from sparsejax import patterns
from sparsejax.proximal import disjoint, group_l2_prox, l0_projection, l1_prox, nuclear_prox, rank_projection


def test_l1_prox_by_scipy():
    for v, lam in itertools.product((-2.0, -0.3, 0.0, 0.7), (0.0, 0.5, 3.0)):
        objective = lambda x, v=v, lam=lam: 0.5 * (x - v) ** 2 + lam * abs(x)
        best = scipy.optimize.minimize_scalar(objective, (-3, 3), tol=1e-12)
        assert float(l1_prox(jnp.asarray([v]), lam)[0]) == pytest.approx(best.x, abs=1e-6)
    np.testing.assert_allclose(
        l1_prox(jnp.asarray([3.0, -2.0, 1.0, 0.5]), jnp.asarray([1.0, 3.0, 0.5, 0.0])), [2, 0, 0.5, 0.5]
    )


@pytest.mark.parametrize("lam", [0.2, 0.8, 5.0])
def test_group_l2_prox_by_scipy(lam):
    """On the objective written with sqrt(||x||^2 + 1e-12), which is smooth."""
    rng = np.random.default_rng(1)
    labels, weights = np.array([0, 1, 1, 2, 2, 2, 3]), rng.uniform(0.3, 3, 4).astype(np.float32)
    v = rng.standard_normal(labels.size).astype(np.float32)

    def objective(x):
        norms = np.sqrt(np.bincount(labels, weights=np.float64(x) ** 2) + 1e-12)
        return 0.5 * ((x - v) ** 2).sum() + lam * (weights * norms).sum()

    best = scipy.optimize.minimize(objective, 0.5 * np.float64(v), method="BFGS", tol=1e-9)
    found = np.asarray(group_l2_prox(v, lam, groups=labels, weights=weights))
    np.testing.assert_allclose(found, best.x, atol=2e-4)
    assert objective(np.float64(found)) <= best.fun + 1e-5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_l0_projections_by_enumeration(k):
    v = jax.random.normal(jax.random.key(k), (4, 6))
    for groups, labels in ((None, np.arange(24).reshape(4, 6)), (patterns.Channel(0), np.arange(4)[:, None])):
        labels = np.broadcast_to(labels, v.shape)
        supports = itertools.combinations(range(labels.max() + 1), k) if k < 4 or groups else [()]
        errors = [np.linalg.norm(np.where(np.isin(labels, s), 0, v)) for s in supports]
        found = l0_projection(v, k, groups=groups)
        if len(errors) > 1 or groups:
            assert np.linalg.norm(v - found) == pytest.approx(min(errors), abs=1e-6)
        assert len(np.unique(labels[np.asarray(found) != 0])) == k
        np.testing.assert_array_equal(found[found != 0], v[found != 0])


def test_l0_projection_keeps_k_of_equal_entries():
    np.testing.assert_array_equal(l0_projection(jnp.ones(5), 2), [1, 1, 0, 0, 0])


def test_nuclear_prox():
    """The subgradient condition: v = x + lam (U V^T + W), W orthogonal to x's spaces and of norm <= 1."""
    left, right = (scipy.stats.ortho_group.rvs(n, random_state=n) for n in (5, 7))
    values = np.asarray([4.0, 2.5, 1.1, 0.9, 0.2])
    v = jnp.asarray(left @ np.diag(values) @ right[:5], jnp.float32)
    x, rank = nuclear_prox(v, 1.0, return_rank=True)
    kept = (left[:, :3] * [3.0, 1.5, 0.1]) @ right[:3]
    np.testing.assert_allclose(x, kept, atol=1e-5)
    assert int(rank) == 3
    rest = (np.asarray(v) - np.asarray(x)) - left[:, :3] @ right[:3]
    assert np.linalg.norm(rest, 2) <= 1 and np.abs(left[:, :3].T @ rest).max() < 1e-5
    np.testing.assert_array_equal(nuclear_prox(jnp.stack([v, 2 * v]), 1.0).shape, (2, 5, 7))


def test_rank_projection_error_is_the_tail_energy():
    v = jax.random.normal(jax.random.key(4), (6, 9))
    found = rank_projection(v, 2)
    values = np.linalg.svd(np.float64(v), compute_uv=False)
    assert np.linalg.norm(v - found) == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-5)
    assert np.linalg.matrix_rank(np.float64(found), tol=1e-4) == 2


def test_disjoint_groups():
    pattern = disjoint([[0, 5], np.eye(2, 3, 1, bool), [2, 3, 4]][:1] + [[1], [2, 3, 4]], (2, 3))
    np.testing.assert_array_equal(pattern.labels, [[0, 1, 2], [2, 2, 0]])
    masks = [np.arange(6).reshape(2, 3) < 2, np.arange(6).reshape(2, 3) >= 2]
    np.testing.assert_array_equal(disjoint(masks, (2, 3)).labels, [[0, 0, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: disjoint([np.ones((3, 2), bool)], (2, 3), name="w"),
            r"group 0 of w is a bool array of shape \(3, 2\), but w has shape \(2, 3\)",
        ),
        (lambda: rank_projection(jnp.eye(3), 4), "from 1 to the number of singular values, 3, got 4"),
        (
            lambda: disjoint([[0, 1], [1, 2]], (3,), name="dense_0/kernel"),
            "groups 0 and 1 of dense_0/kernel overlap in entry 1, but they must be disjoint",
        ),
        (lambda: disjoint([[0], [2]], (3,), name="a"), "entry 1 of a is in none of the 2 groups"),
        (lambda: disjoint([[0, 3]], (3,), name="a"), "group 0 of a must hold indices from 0 to 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
