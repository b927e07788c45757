"""Dynamical systems against scipy's integrator, conserved quantities, and windows counted by hand."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sparsejax.data import load
from sparsejax.data.dynamics import integrate, lorenz, lorenz_field, lotka_volterra, lotka_volterra_field

FIELDS = {"lotka_volterra": lotka_volterra_field, "lorenz": lorenz_field}
# The right-hand sides as scipy's documentation and textbooks write them.
TEXTBOOK = {
    "lotka_volterra": lambda t, s: [1.5 * s[0] - s[0] * s[1], -3.0 * s[1] + s[0] * s[1]],
    "lorenz": lambda t, s: [10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]],
}
STARTS = {"lotka_volterra": [[2.0, 1.0], [4.0, 2.5]], "lorenz": [[1.0, 2.0, 20.0], [-5.0, -4.0, 25.0]]}


@pytest.mark.parametrize("name", FIELDS)
def test_trajectories_are_scipys(name):
    states = integrate(FIELDS[name], STARTS[name], 0.1, 21)
    for start, found in zip(STARTS[name], states, strict=True):
        times = np.linspace(0, 2, 21)
        expected = solve_ivp(TEXTBOOK[name], (0, 2), start, "DOP853", times, rtol=1e-11, atol=1e-11).y.T
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_method_has_order_four():
    exact = integrate(lorenz_field, [1.0, 2.0, 20.0], 0.4, 2, step=0.0005)[-1]
    errors = [
        np.abs(integrate(lorenz_field, [1.0, 2.0, 20.0], 0.4, 2, step=h)[-1] - exact).max()
        for h in (0.02, 0.01)
    ]
    assert 10 < errors[0] / errors[1] < 24  # 2^4, up to higher orders


def test_lotka_volterra_keeps_its_invariant():
    x, y = np.moveaxis(integrate(lotka_volterra_field, [[2.0, 1.0]], 0.1, 200)[0], -1, 0)
    invariant = x - 3 * np.log(x) + y - 1.5 * np.log(y)
    assert np.ptp(invariant) < 1e-6 and np.ptp(x) > 2


def test_windows_and_splits():
    data = lorenz(window=4, length=10, trajectories=5, test_fraction=0.4)
    assert data.classes is None and data.outputs == 3
    (x, y), (x_test, y_test) = data.train, data.test
    assert (
        x.shape == (3 * 6, 12) and y.shape == (18, 3) and x_test.shape == (12, 12) and y_test.shape == (12, 3)
    )
    # Within a trajectory a window is the one before, shifted, with that one's target at its end.
    old, new = x[0].reshape(3, 4), x[1].reshape(3, 4)
    np.testing.assert_array_equal(new[:, :-1], old[:, 1:])
    np.testing.assert_array_equal(new[:, -1], y[0])
    # The last target follows from the last window's newest state.
    following = integrate(lorenz_field, x[5].reshape(3, 4)[:, -1], 0.05, 2)[-1]
    np.testing.assert_allclose(y[5], following, rtol=1e-9)
    assert np.abs(x_test[0] - x[0]).max() > 0.1


def test_load_standardises_and_is_a_function_of_the_seed():
    data, again, other = (load("lotka_volterra", data_seed=seed) for seed in (0, 0, 1))
    x, y = data.train
    assert x.shape == (30 * 184, 32) and x.dtype == y.dtype == np.float32 and data.classes is None
    np.testing.assert_allclose([x.mean(), y.mean(0)[0], y.std(0)[1]], [0, 0, 1], atol=1e-4)
    np.testing.assert_array_equal(x, again.train[0])
    assert not np.array_equal(x, other.train[0])
    raw = lotka_volterra().train[1]
    assert raw.min() > 0  # populations


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"window": 200}, r"window=200 must be in \[1, 199\], below the length of a trajectory"),
        ({"trajectories": 1}, "test_fraction=0.25 of trajectories=1 leaves a split empty"),
        ({"interval": 0.0}, "the interval between states must be positive, got interval=0.0"),
        ({"windows": 8}, "unknown keyword of data set 'lorenz': 'windows'; did you mean 'window'?"),
    ],
)
def test_bad_arguments_are_one_sentence(keywords, message):
    with pytest.raises(ValueError, match=message):
        load("lorenz", **keywords)
