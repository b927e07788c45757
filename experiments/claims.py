"""Claims: sentences of a paper made checkable, with statistical verdicts.

A claim is a sentence and a check; a check is a function of `Results` that returns a `Verdict`. Checks are
built from three blocks, and nest:

    Claim("RigL beats SET at every sparsity", all_of(*(
        greater(f"RigL {s} %", f"SET {s} %") for s in (90, 95, 98))))

Comparisons are paired over seeds: two methods with the same seed share data order and initial weights, so
their difference varies less than either does. The interval is the two-sided 95 % Student-t interval of the
mean paired difference, which is the one of `scipy.stats.ttest_rel(a, b).confidence_interval()`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from sparsejax.masks import choose

HOLDS = "holds"
DOES_NOT_HOLD = "does not hold"
UNDECIDED = "undecided"
CONFIDENCE = 0.95

# What is compared: a row's label, a number, or the `gap` between two such.
Quantity = Any


@dataclasses.dataclass(frozen=True)
class Results:
    """The finished runs of a table.

    Attributes:
      summaries: `{label: {seed: summary}}` for every row of the table, also one without finished runs; a
        summary maps metric names to numbers.
    """

    summaries: Mapping[str, Mapping[int, Mapping[str, Any]]]

    def values(self, label: str, metric: str) -> dict[int, float]:
        """The finite values of a metric by seed (a run that diverged or failed has none)."""
        runs = choose("row", label, self.summaries)
        found = {seed: run.get(metric) for seed, run in runs.items()}
        return {s: float(v) for s, v in found.items() if v is not None and math.isfinite(v)}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
      claim: the sentence.
      verdict: "holds", "does not hold" or "undecided".
      effect, low, high: the mean paired difference and its 95 % interval in the metric's unit (NaN where
        there is none). For a conjunction, those of the part that decides.
      n: seeds in the comparison (the fewest among the parts of a conjunction).
      metric: the name of the metric compared.
      note: why the comparison is weaker than asked for, empty if it is not.
      parts: the verdicts of a conjunction, one for each comparison; empty for a comparison.
    """

    claim: str
    verdict: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    metric: str = "test_accuracy"
    note: str = ""
    parts: tuple["Verdict", ...] = ()

    @property
    def comparisons(self) -> tuple["Verdict", ...]:
        """The single comparisons behind this verdict, in order."""
        if not self.parts:
            return (self,)
        return tuple(leaf for part in self.parts for leaf in part.comparisons)


Check = Callable[[Results], Verdict]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence and the check that decides it; calling it with `Results` gives the `Verdict`."""

    text: str
    check: Check

    def __call__(self, results: Results) -> Verdict:
        return dataclasses.replace(self.check(results), claim=self.text)


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and the ends of its two-sided 95 % Student-t interval.

    With one difference the interval is unbounded; with zero variance it is the mean itself.
    """
    differences = np.asarray(differences, np.float64)
    mean = float(differences.mean())
    if differences.size == 1:
        return mean, -math.inf, math.inf
    error = float(scipy.stats.sem(differences))
    half = error * float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, differences.size - 1))
    return mean, mean - half, mean + half


def greater(a: Quantity, b: Quantity, metric: str = "test_accuracy", *, by: float = 0.0) -> Check:
    """The claim that `a` exceeds `b` by more than `by`.

    Holds if the interval of `a - b` lies above `by`, does not hold if it lies below, else is undecided.

    Args:
      a, b: labels of rows, numbers, or `gap(...)`.
      by: in the metric's unit; negative to claim that `a` falls behind by less than so much.
    """
    text = f"{name(a)} > {name(b)}" + (f" {'-' if by < 0 else '+'} {abs(by):g}" if by else "")

    def decide(low: float, high: float) -> str:
        if low > by:
            return HOLDS
        return DOES_NOT_HOLD if high < by else UNDECIDED

    return lambda results: _compare(results, a, b, metric, text, decide)


def within(a: Quantity, b: Quantity, margin: float, metric: str = "test_accuracy") -> Check:
    """The claim that `a` and `b` differ by at most `margin`, in the metric's unit.

    Holds if the interval of `a - b` lies inside +-`margin`, does not hold if it lies wholly outside.
    """
    if margin <= 0:
        raise ValueError(f"the margin of an equivalence must be positive, not {margin}")
    text = f"{name(a)} = {name(b)} +- {margin:g}"

    def decide(low: float, high: float) -> str:
        if -margin <= low and high <= margin:
            return HOLDS
        return DOES_NOT_HOLD if low > margin or high < -margin else UNDECIDED

    return lambda results: _compare(results, a, b, metric, text, decide)


def all_of(*checks: Check) -> Check:
    """The conjunction: fails with any part that does not hold, holds if all parts hold.

    Each part keeps its own 95 % interval. That is conservative for "holds" (all must), while among many true
    parts one may fail by chance, once in forty: the report therefore lists every part.
    """
    if not checks:
        raise ValueError("all_of needs at least one check")

    def check(results: Results) -> Verdict:
        parts = tuple(part(results) for part in checks)
        verdicts = {part.verdict for part in parts}
        whole = next(v for v in (DOES_NOT_HOLD, UNDECIDED, HOLDS) if v in verdicts)
        # The part that decides is the weakest of those that share the verdict; one without data comes first.
        deciding = min((p for p in parts if p.verdict == whole), key=lambda p: (p.n > 0, p.effect))
        text = " and ".join(part.claim for part in parts)
        return dataclasses.replace(deciding, claim=text, n=min(p.n for p in parts), parts=parts)

    return check


@dataclasses.dataclass(frozen=True)
class gap:  # noqa: N801 (reads as a function beside `greater` and `within`)
    """The quantity `a - b`, paired over seeds, to be compared with another quantity."""

    a: Quantity
    b: Quantity


def name(quantity: Quantity) -> str:
    """How a quantity is written in a report."""
    if isinstance(quantity, gap):
        return f"({name(quantity.a)} - {name(quantity.b)})"
    return quantity if isinstance(quantity, str) else f"{quantity:g}"


def _rows(quantity: Quantity) -> list[str]:
    """The labels of the rows that a quantity reads."""
    if isinstance(quantity, gap):
        return [*_rows(quantity.a), *_rows(quantity.b)]
    return [quantity] if isinstance(quantity, str) else []


def _values(quantity: Quantity, results: Results, metric: str) -> dict[int, float] | float:
    """The quantity by seed; a number stays one."""
    if isinstance(quantity, gap):
        return _paired(_values(quantity.a, results, metric), _values(quantity.b, results, metric))
    return results.values(quantity, metric) if isinstance(quantity, str) else float(quantity)


def _paired(a: dict[int, float] | float, b: dict[int, float] | float) -> dict[int, float] | float:
    """`a - b` over the seeds that both have."""
    if isinstance(a, float):
        return a - b if isinstance(b, float) else {seed: a - value for seed, value in b.items()}
    if isinstance(b, float):
        return {seed: value - b for seed, value in a.items()}
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def _compare(results: Results, a: Quantity, b: Quantity, metric: str, text: str, decide) -> Verdict:
    """The verdict on one comparison, which says when there is too little to decide it."""
    rows = list(dict.fromkeys([*_rows(a), *_rows(b)]))
    if not rows:
        raise ValueError(f"the comparison {text!r} names no row")
    seeds = {row: results.values(row, metric).keys() for row in rows}
    absent = [row for row in rows if not seeds[row]]
    if absent:
        return Verdict(text, UNDECIDED, metric=metric, note=f"no {metric} of {', '.join(absent)}")
    differences = list(_paired(_values(a, results, metric), _values(b, results, metric)).values())
    if not differences:
        return Verdict(text, UNDECIDED, metric=metric, note="the rows have no seed in common")
    effect, low, high = interval(differences)
    note = ""
    if len(differences) == 1:
        note = "one seed gives no interval"
    elif len(differences) < max(map(len, seeds.values())):
        note = f"only {len(differences)} seeds in common"
    verdict = UNDECIDED if len(differences) == 1 else decide(low, high)
    return Verdict(text, verdict, effect, low, high, len(differences), metric, note)
