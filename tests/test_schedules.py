"""Schedules: exact end points, the papers' formulas, and the steps at which updates fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import schedules


def due_steps(total, *args, **kwargs):
    due = schedules.updates_due(*args, **kwargs)
    return [step for step in range(total) if bool(due(step))]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_ramps_have_exact_end_points(begin, length, initial, final):
    for make in (schedules.cubic, schedules.linear):
        schedule = make(begin, begin + length, final, initial)
        for step in (0, begin):
            assert schedule(jnp.int32(step)) == np.float32(initial)
        for step in (begin + length, begin + length + 1000):
            assert schedule(jnp.int32(step)) == np.float32(final)


def test_cubic_is_the_papers_polynomial():
    schedule = schedules.cubic(100, 950, final=0.9, initial=0.2)
    steps = np.arange(0, 1100)
    expected = 0.9 + (0.2 - 0.9) * (1 - np.clip((steps - 100) / 850, 0, 1)) ** 3
    got = np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got[100] == np.float32(0.2) and got[950] == np.float32(0.9)
    assert np.all(np.diff(got) >= 0)
    assert float(jax.grad(schedule)(949.0)) < 1e-5 < float(jax.grad(schedule)(101.0))
    assert got.dtype == np.float32


def test_linear_one_shot_and_constant():
    np.testing.assert_allclose(schedules.linear(10, 20, final=1.0, initial=0.5)(jnp.int32(15)), 0.75)
    step_function = schedules.one_shot(5, 0.8, initial=0.1)
    assert [float(step_function(step)) for step in (0, 4, 5, 9)] == pytest.approx([0.1, 0.1, 0.8, 0.8])
    assert float(schedules.constant(0.3)(7)) == pytest.approx(0.3)
    for schedule in (step_function, schedules.constant(0.3), schedules.cosine(0.3, 10)):
        assert jax.jit(schedule)(jnp.int32(3)).dtype == jnp.float32


def test_cosine_drop_fraction():
    schedule = jax.jit(schedules.cosine(0.3, 1000))
    assert [float(schedule(step)) for step in (0, 500)] == pytest.approx([0.3, 0.15])
    assert float(schedule(1000)) == float(schedule(5000)) == 0.0
    steps = np.arange(1000)
    np.testing.assert_allclose(
        jax.vmap(schedule)(jnp.asarray(steps)), 0.15 * (1 + np.cos(np.pi * steps / 1000)), atol=1e-6
    )


def test_updates_of_rigl():
    assert due_steps(60, 10, end=50) == [10, 20, 30, 40]
    assert due_steps(35, 10) == [10, 20, 30]
    assert due_steps(4, 1, end=3) == [1, 2]


def test_updates_of_gradual_pruning_include_the_end():
    assert due_steps(120, 20, begin=15, end=100, force_end=True) == [15, 35, 55, 75, 95, 100]
    assert due_steps(120, 20, begin=20, end=60, force_end=True) == [20, 40, 60]


def test_updates_are_traceable():
    due = jax.jit(schedules.updates_due(7, 3, 40, True))
    expected = due_steps(60, 7, 3, 40, True)
    assert [step for step in range(60) if due(jnp.int32(step))] == expected
    assert due(jnp.int32(10)).dtype == jnp.bool_


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedules.cubic(10, 10), "must end after it begins, got begin=10 and end=10"),
        (lambda: schedules.linear(10, 3), "must end after it begins, got begin=10 and end=3"),
        (lambda: schedules.cosine(0.3, 0), "the end of a cosine schedule must be positive, got 0"),
        (lambda: schedules.updates_due(0), "the update period must be at least 1 step, got 0"),
        (lambda: schedules.updates_due(5, 10, 10), "must end after they begin, got begin=10 and end=10"),
        (lambda: schedules.updates_due(5, force_end=True), "force_end=True needs an end, got end=None"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
