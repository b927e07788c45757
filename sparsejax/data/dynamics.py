"""Trajectories of two dynamical systems, as windows of delayed states and the state that follows.

  Lotka-Volterra   x' = a x - b x y,        y' = d x y - c y                       (a, b, c, d) = (1.5, 1, 3, 1)
  Lorenz           x' = s (y - x),          y' = x (r - z) - y,    z' = x y - b z  (s, r, b) = (10, 28, 8/3)

Trajectories start at random and are integrated by the classical Runge-Kutta method of fourth order. The test
split holds whole trajectories, so that neither its windows nor its initial states occur in training.
"""

from collections.abc import Callable

import numpy as np

from sparsejax.data.dataset import Dataset


def lotka_volterra(
    data_dir=None,
    *,
    window: int = 16,
    interval: float = 0.1,
    length: int = 200,
    trajectories: int = 40,
    test_fraction: float = 0.25,
    data_seed: int = 0,
) -> Dataset:
    """Regression: two populations, prey and predators, from the last `window` states to the next.

    Args:
      data_dir: unused; every loader takes it.
      window: delayed states in an input.
      interval: time between states.
      length: states in a trajectory, which gives `length - window` examples.
      trajectories: how many there are, in both splits together.
      test_fraction: fraction of the trajectories in the test split.
      data_seed: of the initial states, drawn uniformly from [1, 5] x [0.5, 3] (the equilibrium is (3, 1.5)).

    Returns:
      A data set with inputs `(n, 2 * window)`, for each variable its window from old to new, and targets
      `(n, 2)`.

    Raises:
      ValueError: for a window that leaves no example, an interval that is not positive, or an empty split.
    """
    rng = np.random.default_rng(data_seed)
    starts = rng.uniform((1.0, 0.5), (5.0, 3.0), (trajectories, 2))
    states = integrate(lotka_volterra_field, starts, interval, length)
    return _windows("lotka_volterra", states, window, test_fraction)


def lorenz(
    data_dir=None,
    *,
    window: int = 16,
    interval: float = 0.05,
    length: int = 200,
    trajectories: int = 40,
    test_fraction: float = 0.25,
    data_seed: int = 0,
) -> Dataset:
    """Regression: the Lorenz attractor, from the last `window` states to the next.

    Arguments and errors as for `lotka_volterra`. Trajectories start 5 units of time after points drawn
    uniformly from [-10, 10] x [-10, 10] x [15, 35], when they have reached the attractor. Inputs are
    `(n, 3 * window)`, targets `(n, 3)`.
    """
    rng = np.random.default_rng(data_seed)
    starts = rng.uniform((-10.0, -10.0, 15.0), (10.0, 10.0, 35.0), (trajectories, 3))
    starts = integrate(lorenz_field, starts, 5.0, 2)[:, -1]
    return _windows("lorenz", integrate(lorenz_field, starts, interval, length), window, test_fraction)


def lotka_volterra_field(state: np.ndarray) -> np.ndarray:
    """The time derivative `(..., 2)` of states `(..., 2)`; it keeps x - 3 log(x) + y - 1.5 log(y)."""
    prey, predators = state[..., 0], state[..., 1]
    return np.stack([1.5 * prey - prey * predators, prey * predators - 3.0 * predators], axis=-1)


def lorenz_field(state: np.ndarray) -> np.ndarray:
    """The time derivative `(..., 3)` of states `(..., 3)`."""
    x, y, z = state[..., 0], state[..., 1], state[..., 2]
    return np.stack([10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z], axis=-1)


def integrate(
    field: Callable, start: np.ndarray, interval: float, length: int, *, step: float = 0.005
) -> np.ndarray:
    """States at times 0, `interval`, ... by the classical Runge-Kutta method, in float64.

    Args:
      field: time derivative of states `(..., d)`.
      start: initial states `(..., d)`.
      interval: time between the states returned, divided into equal steps of at most `step`.
      length: how many states are returned, the initial one included.

    Returns:
      `(..., length, d)`.
    """
    if not interval > 0:
        raise ValueError(f"the interval between states must be positive, got interval={interval}")
    steps = int(np.ceil(interval / step - 1e-9))
    h, state = interval / steps, np.asarray(start, np.float64)
    states = [state]
    for _ in range(length - 1):
        for _ in range(steps):
            k1 = field(state)
            k2 = field(state + h / 2 * k1)
            k3 = field(state + h / 2 * k2)
            k4 = field(state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(state)
    return np.stack(states, axis=-2)


def _windows(name: str, states: np.ndarray, window: int, test_fraction: float) -> Dataset:
    """The data set of trajectories `(trajectories, length, d)`; the first ones are the test split."""
    trajectories, length, dimensions = states.shape
    if not 1 <= window < length:
        raise ValueError(f"window={window} must be in [1, {length - 1}], below the length of a trajectory")
    held_out = round(test_fraction * trajectories)
    if not 0 < held_out < trajectories:
        raise ValueError(f"test_fraction={test_fraction} of trajectories={trajectories} leaves a split empty")
    # (trajectories, length - window, d, window): the variables stay apart, as block-structured layers need it.
    seen = np.lib.stride_tricks.sliding_window_view(states[:, :-1], window, axis=1)

    def split(part):
        x = seen[part].reshape(-1, dimensions * window)
        return x, states[part, window:].reshape(-1, dimensions)

    return Dataset(name, split(slice(held_out, None)), split(slice(held_out)), None)
