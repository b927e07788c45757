"""The dynamic programme against exhaustive search, and the search against planted sensitivities."""

import itertools

import numpy as np
import pytest

from sparsejax.compress.spdy import spdy_choice, spdy_search


def problem(seed, layers, options):
    """Errors that grow and times that fall from option to option, times whole multiples of a bucket of 100."""
    random = np.random.default_rng(seed)
    errors = [np.sort(random.uniform(size=options)) for _ in range(layers)]
    times = [np.sort(random.integers(0, 40, options))[::-1].astype(float) for _ in range(layers)]
    return errors, times


def exhaustive(errors, times, budget, coefficients):
    found = [
        sum(c * error[i] for c, error, i in zip(coefficients, errors, choice, strict=True))
        for choice in itertools.product(*(range(len(error)) for error in errors))
        if sum(time[i] for time, i in zip(times, choice, strict=True)) <= budget
    ]
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_exhaustive_one(seed):
    errors, times = problem(seed, 1 + seed % 4, 5)
    coefficients = np.random.default_rng(100 + seed).uniform(size=len(errors))
    fastest, slowest = sum(min(time) for time in times), sum(max(time) for time in times)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = max(1.0, np.ceil(fastest + share * (slowest - fastest)))
        choice = spdy_choice(errors, times, budget, coefficients, buckets=int(budget))  # a bucket is one unit
        assert sum(time[i] for time, i in zip(times, choice, strict=True)) <= budget
        value = sum(c * error[i] for c, error, i in zip(coefficients, errors, choice, strict=True))
        assert value == pytest.approx(exhaustive(errors, times, budget, coefficients), abs=1e-12)


def test_enough_time_leaves_everything_dense():
    errors, times = [[0, 0.2, 1]] * 6, [[5.0, 3.0, 0.0]] * 6
    assert spdy_choice(errors, times, 30.0) == (0,) * 6
    assert spdy_choice(errors, times, 1e9) == (0,) * 6


def test_the_time_of_everything_is_enough_for_everything():
    random, below = np.random.default_rng(0), 0
    for _ in range(60):
        times, rest = np.sort(random.uniform(size=(7, 4)))[:, ::-1], random.uniform(10, 100)
        budget = (rest + sum(times[:, 0])) - rest
        below += budget < sum(times[:, 0])  # by rounding
        assert spdy_choice([[0, 0.1, 0.2, 1]] * 7, times, budget) == (0,) * 7
    assert below > 10


def test_a_loss_that_is_no_number_is_never_the_best():
    errors, times = [[0, 0.5, 1]] * 6, [[2.0, 1.0, 0.0]] * 6
    losses = iter([np.nan, 3.0, np.nan, 2.0])
    found = spdy_search(errors, times, 6.0, lambda choice: next(losses), limit=4)
    assert found.loss == 2.0 and found.history == [np.inf, 3.0, 3.0, 2.0]


def test_rounding_costs_at_most_half_a_bucket_per_layer():
    random = np.random.default_rng(0)
    errors = [np.sort(random.uniform(size=9)) for _ in range(20)]
    times = [np.sort(random.uniform(size=9))[::-1] for _ in range(20)]
    choice = spdy_choice(errors, times, 8.0)
    spent = sum(time[i] for time, i in zip(times, choice, strict=True))
    assert 8.0 - 0.2 < spent <= 8.0 * (1 + 20 * 0.5 / 10_000)


def test_the_search_finds_sensitivities_that_the_errors_do_not_show():
    errors, times = [[0, 0.5, 1]] * 6, [[2.0, 1.0, 0.0]] * 6
    truth = np.array([0.05, 3, 0.1, 2, 0.05, 4])

    def objective(choice):
        return sum(c * error[i] for c, error, i in zip(truth, errors, choice, strict=True))

    found = spdy_search(errors, times, 6.0, objective, starts=20, patience=40)
    assert found.loss == pytest.approx(exhaustive(errors, times, 6.0, truth))
    assert found.loss == objective(found.choice) < objective(spdy_choice(errors, times, 6.0))
    assert spdy_choice(errors, times, 6.0, found.coefficients) == found.choice
    assert found.history == sorted(found.history, reverse=True)
    assert len(found.history) == found.evaluations


def test_a_choice_is_evaluated_once_and_the_limit_holds():
    errors, times = problem(3, 4, 5)
    seen = []
    limited = spdy_search(errors, times, 60.0, lambda choice: seen.append(choice) or len(seen), limit=3)
    assert len(seen) == len(set(seen)) == limited.evaluations <= 3
    again = spdy_search(errors, times, 60.0, lambda choice: sum(choice), seed=1)
    assert again.choice == spdy_search(errors, times, 60.0, lambda choice: sum(choice), seed=1).choice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0, 1]], [[2.0, 1.0]], 0.5), "the fastest options take 1, more than the budget of 0.5"),
        (([[0, 1]], [[2.0, 1.0]], 0), "the budget must be positive, got 0"),
        (([[0, 1]], [[2.0]], 1), "errors and times must have the same layers with the same options"),
        (([[0, 1]], [[2.0, -1.0]], 1), "the times of layer 0 must be one or more numbers from 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        spdy_choice(*arguments)


def test_a_search_needs_a_start():
    with pytest.raises(ValueError, match="starts of a SPDY search must be at least 1, got 0"):
        spdy_search([[0, 1]], [[2.0, 1.0]], 2, sum, starts=0)
