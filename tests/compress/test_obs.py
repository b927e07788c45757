"""Structured OBS against the closed-form least squares on the inputs that are left."""

import numpy as np
import pytest

from sparsejax.compress.base import CompressionWarning
from sparsejax.compress.obs import damped_inverse, obs_database

RANDOM = np.random.default_rng(0)


def layer(inputs=12, outputs=5, tokens=60):
    x = RANDOM.normal(size=(tokens, inputs)) @ RANDOM.normal(size=(inputs, inputs))
    return RANDOM.normal(size=(inputs, outputs)), x.T @ x / tokens


def hessian(gram, damping):
    return 2 * gram + damping * 2 * np.mean(np.diag(gram)) * np.eye(len(gram))


def least_squares(kernel, h, left):
    """argmin of tr((W - W')^T H (W - W')) over W' that are zero outside of `left`."""
    fitted = np.zeros_like(kernel)
    fitted[left] = np.linalg.solve(h[np.ix_(left, left)], h[left] @ kernel)
    return fitted, np.trace((kernel - fitted).T @ h @ (kernel - fitted)) / 2


@pytest.mark.parametrize(("structures", "inputs"), [(12, 12), (4, 12), (3, 12), (200, 200)])
def test_every_step_is_the_least_squares_fit_and_its_cost(structures, inputs):
    kernel, gram = layer(inputs)
    h, width = hessian(gram, 0.01), inputs // structures
    found = obs_database(kernel, gram, structures, range(structures + 1))
    assert sorted(found.order) == list(range(structures)) and len(found.costs) == structures
    for size in range(structures + 1) if structures < 50 else (199, 150, 73, 72, 1):
        kept = np.setdiff1d(np.arange(structures), found.order[: structures - size])
        np.testing.assert_array_equal(np.flatnonzero(found.snapshots[size].kept), kept)
        left = np.flatnonzero(np.isin(np.arange(inputs) // width, kept))
        fitted, loss = least_squares(kernel, h, left)
        scale = np.abs(kernel).max()
        np.testing.assert_allclose(found.snapshots[size].rows, fitted[left], rtol=1e-5, atol=1e-5 * scale)
        assert sum(found.costs[: structures - size]) / 2 == pytest.approx(loss, rel=1e-8)
        norm = np.trace(kernel.T @ gram @ kernel)
        error = np.sqrt(np.trace((kernel - fitted).T @ gram @ (kernel - fitted)) / norm)
        assert found.snapshots[size].error == pytest.approx(error if size else 1.0, rel=1e-6)


@pytest.mark.parametrize("structures", [10, 5])
def test_the_cheapest_structure_goes_next(structures):
    kernel, gram = layer(10)
    h, owner = hessian(gram, 0.01), np.arange(10) // (10 // structures)
    gone, losses = [], []
    while len(gone) < structures - 1:
        trials = {
            g: least_squares(kernel, h, np.flatnonzero(~np.isin(owner, [*gone, g])))[1]
            for g in set(range(structures)) - set(gone)
        }
        gone.append(min(trials, key=trials.get))
        losses.append(trials[gone[-1]])
    found = obs_database(kernel, gram, structures, [1])
    assert found.order == gone
    np.testing.assert_allclose(np.cumsum(found.costs) / 2, losses)


def test_a_diagonal_matrix_changes_no_weight():
    kernel, _ = layer(9)
    gram = np.diag(RANDOM.uniform(0.1, 3, 9))
    found = obs_database(kernel, gram, 9, range(10), damping=0)
    scores = (kernel**2).sum(1) * np.diag(gram)
    assert found.order == np.argsort(scores).tolist()
    np.testing.assert_allclose(found.costs, 2 * np.sort(scores))
    for snapshot in found.snapshots.values():
        np.testing.assert_array_equal(snapshot.rows, kernel[snapshot.kept].astype(np.float32))


def test_a_copy_goes_first_and_its_twin_takes_its_weight():
    x = RANDOM.normal(size=(50, 6))
    x[:, 4] = x[:, 1]
    kernel = RANDOM.normal(size=(6, 3))
    kernel[4] = kernel[1]
    found = obs_database(kernel, x.T @ x / 50, 6, [5], damping=1e-9)
    assert found.order[0] in (1, 4) and found.snapshots[5].error < 1e-6
    twin = np.flatnonzero(np.isin(np.flatnonzero(found.snapshots[5].kept), (1, 4)))[0]
    np.testing.assert_allclose(found.snapshots[5].rows[twin], 2 * kernel[1], rtol=1e-5)


def test_more_damping_where_the_matrix_needs_it():
    x = RANDOM.normal(size=(3, 6))
    with pytest.warns(CompressionWarning, match="not positive definite with damping 0, .* was used"):
        inverse = damped_inverse(x.T @ x, 0.0)
    assert np.isfinite(inverse).all()
    assert np.isfinite(obs_database(np.eye(4), np.zeros((4, 4)), 4, [0, 2]).snapshots[2].rows).all()


def test_bad_input():
    kernel, gram = layer(4)
    with pytest.raises(ValueError, match="the Gram matrix of the inputs is not finite"):
        obs_database(kernel, gram * np.nan, 4, [2])
    with pytest.raises(ValueError, match=r"sizes must lie in 0 to 4, got \[5, 2\]"):
        obs_database(kernel, gram, 4, [2, 5])
