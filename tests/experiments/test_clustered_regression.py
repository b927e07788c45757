"""The regression with clustered weights, and a table whose runs are not training runs."""

import json

import ml_collections
import numpy as np
import pytest
from sklearn.metrics import f1_score

from experiments import clustered_regression, table, tables
from experiments.tables import Metric, Panel, Row, Table

EASY = {"size": 40, "bursts": 2, "length": 5, "samples": 60, "noise": 0.01}
CHAIN = {
    "name": "turbo_vbi",
    "structure": "chain",
    "p01": 0.07,
    "p10": 0.2,
    "slab": (1.0, 1.0),
    "spike": (1.0, 1e-4),
}


def runs_of(flags):
    """The lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_weights_are_active_in_bursts_that_do_not_touch():
    lengths = {
        tuple(runs_of(clustered_regression.clustered_data(seed, **EASY)[2] != 0)) for seed in range(50)
    }
    assert lengths == {(5, 5)}
    inputs, targets, weights = clustered_regression.clustered_data(0, **{**EASY, "noise": 0.0})
    np.testing.assert_allclose(np.linalg.lstsq(inputs, targets)[0], weights, atol=1e-10)
    with pytest.raises(ValueError, match="7 bursts of 5 do not fit into 40 weights"):
        clustered_regression.clustered_data(0, **{**EASY, "bursts": 7})


@pytest.mark.parametrize("structure", ["chain", "independent"])
def test_an_easy_problem_is_solved(structure):
    inputs, targets, weights = clustered_regression.clustered_data(1, **EASY)
    keywords = {key: value for key, value in CHAIN.items() if key != "name"} | {"structure": structure}
    active, mean = clustered_regression.turbo_vbi(inputs, targets, **keywords)
    missed = active != (weights != 0)
    assert (np.abs(weights[missed]) < 0.05).all(), "only weights that are nearly zero may be missed"
    np.testing.assert_allclose(mean, weights, atol=0.02)


def test_f1_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    found, truth = rng.random(50) < 0.5, rng.random(50) < 0.3
    assert clustered_regression.f1(found, truth) == pytest.approx(f1_score(truth, found))


def test_hindsight_is_never_worse(tmp_path):
    scores = {
        name: clustered_regression.run({"seed": 0, "data": EASY, "method": {"name": name}}, tmp_path / name)[
            "f1"
        ]
        for name in ("ard", "ard_best")
    }
    assert scores["ard_best"] >= scores["ard"] > 0.5
    assert json.loads((tmp_path / "ard" / "summary.json").read_text())["f1"] == scores["ard"]


def test_a_table_may_have_a_function_of_its_own(tmp_path):
    """Its configs need not be those of training runs, and finished runs are found again."""
    small = Table(
        title="A small table",
        papers=(),
        about="Nothing.",
        base=ml_collections.ConfigDict({"seed": 0, "data": EASY, "method": {}}),
        panels=(Panel("Panel", (Row("chain", "chain", 0.5, {"method": CHAIN}),), seeds=2),),
        claims=(),
        metrics=(Metric("f1", "F1"),),
        function=clustered_regression.run,
    )
    runs = table.regenerate(small, "small", tmp_path / "work", tmp_path / "results")
    assert [run.error for run in runs] == ["", ""] and runs[0].hash != runs[1].hash
    assert all(run.summary["f1"] > 0.8 for run in runs)
    again = table.regenerate(small, "small", tmp_path / "work", tmp_path / "results", function=pytest.fail)
    assert [run.summary for run in again] == [run.summary for run in runs]
    assert tables.load("rigl").function is None
