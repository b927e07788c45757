"""Schedules: values over steps, as plain `optax.Schedule` functions, and when a mask update is due.

Every factory returns `f(step) -> float32 scalar`; `step` may be a Python int or a traced int32 or float32.
The end points are exact, whatever the period of the updates that read them.
"""

import math

import jax.numpy as jnp
import optax


def constant(value: float) -> optax.Schedule:
    """The same value at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def one_shot(at: int, final: float, initial: float = 0.0) -> optax.Schedule:
    """`initial` before step `at`, `final` from it on."""
    return lambda step: jnp.where(jnp.asarray(step) >= at, jnp.float32(final), jnp.float32(initial))


def linear(begin: int, end: int, final: float = 1.0, initial: float = 0.0) -> optax.Schedule:
    """A straight line from `initial` at `begin` to `final` at `end`, constant outside.

    Raises:
      ValueError: if `end` is not after `begin`.
    """
    return _ramp(begin, end, final, initial, power=1)


def cubic(begin: int, end: int, final: float = 1.0, initial: float = 0.0) -> optax.Schedule:
    """s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3, constant outside (Zhu & Gupta 2017).

    Raises:
      ValueError: if `end` is not after `begin`.
    """
    return _ramp(begin, end, final, initial, power=3)


def cosine(initial: float, end: int) -> optax.Schedule:
    """initial / 2 (1 + cos(pi t / end)), and 0 from `end` on: RigL's drop fraction (Evci et al. 2020).

    Raises:
      ValueError: if `end` is not positive.
    """
    if end <= 0:
        raise ValueError(f"the end of a cosine schedule must be positive, got {end}")

    def schedule(step):
        step = jnp.asarray(step)
        value = 0.5 * initial * (1.0 + jnp.cos(math.pi * (step.astype(jnp.float32) / end)))
        return jnp.where(step >= end, jnp.float32(0.0), value.astype(jnp.float32))

    return schedule


def drop_fraction_schedule(fraction: float | optax.Schedule, end: int | None) -> optax.Schedule:
    """The share of the kept weights that a topology update replaces.

    A schedule is returned as it is; a float is annealed by `cosine` to 0 at `end`, or constant without end.

    Raises:
      ValueError: for a float outside [0, 1].
    """
    if callable(fraction):
        return fraction
    if not 0 <= fraction <= 1:
        raise ValueError(f"drop_fraction must be in [0, 1], got {fraction}")
    return constant(fraction) if end is None else cosine(fraction, end)


def updates_due(every: int, begin: int = 0, end: int | None = None, force_end: bool = False):
    """When masks are updated: every `every` steps, counted from `begin`.

    Never at step 0, where nothing has been trained. Without `force_end` updates happen in
    [begin, end), as RigL does. With it they happen in [begin, end], and at `end` even where it is no multiple
    of the period: gradual pruning needs that last update to reach its final sparsity.

    Args:
      every, begin, end: host ints; `end=None` never stops.
      force_end: see above; needs an `end`.

    Returns:
      `due(step) -> bool scalar`, for an int or a traced int32 step.

    Raises:
      ValueError: for a period below 1, an end that is not after the beginning, or `force_end` without end.
    """
    if every < 1:
        raise ValueError(f"the update period must be at least 1 step, got {every}")
    if end is not None and end <= begin:
        raise ValueError(f"updates must end after they begin, got begin={begin} and end={end}")
    if force_end and end is None:
        raise ValueError("force_end=True needs an end, got end=None")

    def due(step):
        step = jnp.asarray(step)
        periodic = (step > 0) & (step >= begin) & ((step - begin) % every == 0)
        if end is None:
            return periodic
        return (periodic & (step < end)) | (force_end & (step == end))

    return due


def _ramp(begin: int, end: int, final: float, initial: float, power: int) -> optax.Schedule:
    if end <= begin:
        raise ValueError(f"a schedule must end after it begins, got begin={begin} and end={end}")

    def schedule(step):
        step = jnp.asarray(step)
        left = 1.0 - (step - begin).astype(jnp.float32) / (end - begin)
        value = final + (initial - final) * jnp.clip(left, 0.0, 1.0) ** power
        # final + (initial - final) is not always initial in floating point
        return jnp.where(step <= begin, initial, jnp.where(step >= end, final, value)).astype(jnp.float32)

    return schedule
