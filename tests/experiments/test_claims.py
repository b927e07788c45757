"""Verdicts against scipy's paired t-test and against cases worked out by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments import claims
from experiments.claims import Claim, Results, all_of, gap, greater, within


def results(**rows) -> Results:
    """Rows of accuracies, seeded 0, 1, 2 ..."""
    return Results({k: {s: {"test_accuracy": v} for s, v in enumerate(vs)} for k, vs in rows.items()})


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_interval_is_that_of_scipys_paired_t_test(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.9, 0.02, n), rng.normal(0.88, 0.02, n)
    verdict = greater("a", "b")(results(a=a, b=b))
    oracle = scipy.stats.ttest_rel(a, b)
    expected = oracle.confidence_interval(0.95)
    np.testing.assert_allclose((verdict.low, verdict.high), (expected.low, expected.high), rtol=1e-10)
    np.testing.assert_allclose(verdict.effect, a.mean() - b.mean(), rtol=1e-10)
    assert verdict.n == n
    assert (verdict.verdict != "undecided") == (oracle.pvalue < 0.05)


def test_greater_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653.
    verdict = greater("a", "b")(results(a=[2, 4, 6], b=[1, 2, 3]))
    assert verdict.effect == 2
    assert math.isclose(verdict.low, 2 - 4.302653 / math.sqrt(3), abs_tol=1e-6)
    assert verdict.verdict == "undecided"
    clear = results(a=[2.0, 2.1, 2.2], b=[1, 1, 1])
    assert greater("a", "b")(clear).verdict == "holds"
    assert greater("b", "a")(clear).verdict == "does not hold"
    assert greater("a", "b", by=0.5)(clear).verdict == "holds"
    assert greater("a", "b", by=2)(clear).verdict == "does not hold"
    assert greater("b", "a", by=-2)(clear).verdict == "holds"


def test_pairing_removes_what_seeds_share():
    a = [0.50, 0.70, 0.90]
    assert greater("a", "b")(results(a=a, b=[x - 0.01 for x in a])).verdict == "holds"


def test_within_needs_the_whole_interval_inside_the_margin():
    runs = results(a=[0.90, 0.91, 0.92], b=[0.90, 0.911, 0.919], c=[0.80, 0.81, 0.82], d=[0.95, 0.85, 0.93])
    assert within("a", "b", 0.005)(runs).verdict == "holds"
    assert within("a", "c", 0.05)(runs).verdict == "does not hold"
    assert within("c", "a", 0.05)(runs).verdict == "does not hold"
    assert within("a", "d", 0.05)(runs).verdict == "undecided"
    with pytest.raises(ValueError, match="must be positive, not -1"):
        within("a", "b", -1)


def test_one_seed_is_undecided_and_says_so():
    verdict = greater("a", "b")(results(a=[0.9], b=[0.1]))
    assert verdict.verdict == "undecided"
    assert (verdict.low, verdict.high) == (-math.inf, math.inf)
    assert verdict.note == "one seed gives no interval"


@pytest.mark.parametrize("shift, expected", [(1.0, "holds"), (-1.0, "does not hold"), (0.0, "undecided")])
def test_zero_variance(shift, expected):
    verdict = greater("a", "b")(results(a=[1 + shift, 2 + shift, 3 + shift], b=[1, 2, 3]))
    assert verdict.verdict == expected
    assert verdict.low == verdict.effect == verdict.high == shift


def test_zero_variance_is_equivalence():
    assert within("a", "b", 0.1)(results(a=[1, 2], b=[1, 2])).verdict == "holds"


def test_missing_and_diverged_runs():
    runs = results(a=[0.9, 0.8, 0.7], b=[0.5, math.nan, 0.4], c=[], d=[math.nan])
    verdict = greater("a", "b")(runs)
    assert (verdict.n, verdict.note) == (2, "only 2 seeds in common")
    assert math.isclose(verdict.effect, 0.35)
    absent = greater("c", "d")(runs)
    assert (absent.verdict, absent.n) == ("undecided", 0)
    assert absent.note == "no test_accuracy of c, d"
    apart = Results({"a": {0: {"test_accuracy": 1}}, "b": {1: {"test_accuracy": 0}}})
    assert greater("a", "b")(apart).note == "the rows have no seed in common"
    with pytest.raises(ValueError, match="unknown row 'RigK'; did you mean 'RigL'"):
        greater("RigK", 0)(results(RigL=[1]))


def test_numbers_and_gaps():
    runs = results(big=[0.90, 0.92], small=[0.50, 0.51], sparse=[0.89, 0.91], tiny=[0.40, 0.41])
    assert greater("big", 0.1)(runs).verdict == "holds"
    assert greater(0.1, "big")(runs).verdict == "does not hold"
    shrinks = greater(gap("small", "tiny"), gap("big", "sparse"))(runs)
    assert shrinks.verdict == "holds"
    assert math.isclose(shrinks.effect, 0.09)
    assert shrinks.claim == "(small - tiny) > (big - sparse)"
    assert greater(gap("big", 0.1), gap("small", 0.1))(runs).verdict == "holds"
    with pytest.raises(ValueError, match="names no row"):
        greater(1, 2)(runs)


def test_conjunction():
    runs = results(a=[3.0, 3.1, 3.2], b=[2.0, 2.1, 2.21], c=[1.0, 1.2, 1.1], d=[0, 5, 1])
    holds = all_of(greater("a", "b"), greater("a", "c"))(runs)
    assert holds.verdict == "holds"
    assert math.isclose(holds.effect, 0.996667, abs_tol=1e-6)  # of the weaker part
    assert [part.claim for part in holds.comparisons] == ["a > b", "a > c"]
    assert all_of(greater("a", "b"), greater("a", "d"))(runs).verdict == "undecided"
    fails = all_of(greater("a", "d"), greater("b", "a"), greater("a", "b"))(runs)
    assert fails.verdict == "does not hold"
    assert fails.effect < 0
    nested = all_of(all_of(greater("a", "b"), greater("b", "c")), greater("a", "c"))(runs)
    assert len(nested.comparisons) == 3
    empty = results(a=[1, 2], b=[])
    assert all_of(greater("a", 0, by=-9), greater("a", "b"))(empty).note == "no test_accuracy of b"
    with pytest.raises(ValueError, match="at least one"):
        all_of()


def test_a_claim_keeps_its_sentence_and_metric():
    runs = Results({k: {s: {"loss": v + s} for s in range(3)} for k, v in (("a", 1), ("b", 2))})
    verdict = Claim("b loses more than a", greater("b", "a", "loss"))(runs)
    assert (verdict.claim, verdict.verdict, verdict.metric) == ("b loses more than a", claims.HOLDS, "loss")
