"""SPDY: how much each layer is compressed, so that a time budget is met (Frantar & Alistarh 2022).

Every layer l has options i of error e[l][i] and time t[l][i]. For sensitivities c in [0, 1]^L,

  minimise  sum_l c_l e[l][i_l]   such that   sum_l t[l][i_l] <= T

by a dynamic programme over time in buckets of T / 10000, and the c whose choice of options makes the best model
is searched: 100 random ones, then a local search from the best that draws r of them again, for r from a tenth
of the layers down to 1, until 100 draws in a row brought nothing.

Times are rounded to the nearest bucket, so that a choice may exceed T by half a bucket per layer; if the options of
least error fit, they are the choice. Anything that adds up can take the place of time: parameters,
floating-point operations, bytes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

BUCKETS = 10_000


class Search(NamedTuple):
    """choice: option of every layer; coefficients: the sensitivities that led to it; loss: of that choice;
    evaluations: how many different choices were evaluated; history: the best loss after each of them."""

    choice: tuple[int, ...]
    coefficients: np.ndarray
    loss: float
    evaluations: int
    history: list[float]


def spdy_choice(
    errors: Sequence, times: Sequence, budget: float, coefficients=None, *, buckets: int = BUCKETS
) -> tuple[int, ...]:
    """The option of every layer that minimises the weighted error within the budget.

    Args:
      errors, times: for each layer a sequence of numbers, one per option; times are at least 0.
      budget: T, in the unit of the times.
      coefficients: c, one per layer; None for ones.
      buckets: how many T is divided into.

    Returns:
      One index per layer. Between equally good choices the earlier option of the later layer wins.

    Raises:
      ValueError: if lengths differ, a time is negative or not a number, or the fastest options exceed the budget.
    """
    errors, rounded = _check(errors, times, budget, buckets)
    dense = tuple(int(np.argmin(error)) for error in errors)
    if sum(time[i] for time, i in zip(times, dense, strict=True)) <= budget * (1 + 1e-9):
        return (
            dense  # a choice that just fits may exceed T by rounding, of its sum and of its times to buckets
        )
    weights = np.ones(len(errors)) if coefficients is None else np.asarray(coefficients, np.float64)
    best, chosen = np.zeros(buckets + 1), []  # best[b]: smallest error of the layers so far in b buckets
    for weight, error, cost in zip(weights, errors, rounded, strict=True):
        reached = np.full((error.size, buckets + 1), np.inf)
        for i in np.flatnonzero(cost <= buckets):
            reached[i, cost[i] :] = best[: buckets + 1 - cost[i]] + weight * error[i]
        chosen.append(np.argmin(reached, 0))
        best = np.min(reached, 0)
    left, choice = buckets, []
    for cost, options in zip(reversed(rounded), reversed(chosen), strict=True):
        choice.append(int(options[left]))
        left -= cost[choice[-1]]
    return tuple(reversed(choice))


def spdy_search(
    errors: Sequence,
    times: Sequence,
    budget: float,
    objective: Callable[[tuple[int, ...]], float],
    *,
    starts: int = 100,
    patience: int = 100,
    share: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    buckets: int = BUCKETS,
) -> Search:
    """The choice of smallest objective among those that some sensitivities lead to.

    Args:
      errors, times, budget, buckets: as for `spdy_choice`.
      objective: the loss of a choice, such as that of the stitched model on calibration data; called once for
        every different choice. NaN counts as infinite.
      starts: random sensitivities at first; the first of them are all ones.
      patience: draws without improvement after which r becomes smaller.
      share: of the layers that are drawn again at first.
      limit: evaluations of the objective after which the search stops; None for no limit.
      seed: of all draws.

    Raises:
      ValueError: as `spdy_choice`, or for `starts` or `limit` below 1.
    """
    for name, value in (("starts", starts), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"{name} of a SPDY search must be at least 1, got {value}")
    random = np.random.default_rng(seed)
    layers, losses, history = len(errors), {}, []
    best = (np.inf, None, None)  # loss, choice, coefficients

    def attempt(coefficients) -> bool:
        nonlocal best
        choice = spdy_choice(errors, times, budget, coefficients, buckets=buckets)
        if choice not in losses:
            loss = float(objective(choice))
            losses[choice] = np.inf if np.isnan(loss) else loss
            better = best[1] is None or losses[choice] < best[0]
            best = (losses[choice], choice, coefficients) if better else best
            history.append(best[0])
            return better
        return False

    def spent() -> bool:
        return limit is not None and len(losses) >= limit

    for start in range(starts):
        if not spent():
            attempt(random.uniform(size=layers) if start else np.ones(layers))
    for redrawn in range(max(1, round(share * layers)), 0, -1):
        failures = 0
        while failures < patience and not spent():
            trial = best[2].copy()
            trial[random.choice(layers, redrawn, replace=False)] = random.uniform(size=redrawn)
            failures = 0 if attempt(trial) else failures + 1
    return Search(best[1], best[2], best[0], len(losses), history)


def _check(errors, times, budget, buckets):
    """Errors as float arrays and times as integer buckets."""
    if not budget > 0:
        raise ValueError(f"the budget must be positive, got {budget}")
    if len(errors) != len(times) or any(len(e) != len(t) for e, t in zip(errors, times, strict=True)):
        raise ValueError("errors and times must have the same layers with the same options")
    errors = [np.asarray(error, np.float64) for error in errors]
    times = [np.asarray(time, np.float64) for time in times]
    for layer, time in enumerate(times):
        if not np.all(time >= 0) or not time.size:
            raise ValueError(f"the times of layer {layer} must be one or more numbers from 0, got {time}")
    rounded = [np.rint(np.minimum(time / budget, 2) * buckets).astype(np.int64) for time in times]
    if sum(int(cost.min()) for cost in rounded) > buckets:
        fastest = sum(float(time.min()) for time in times)
        raise ValueError(f"the fastest options take {fastest:g}, more than the budget of {budget:g}")
    return errors, rounded


__all__ = ["Search", "spdy_choice", "spdy_search"]
