"""The runner of tables, with stand-ins for training: caching, failures, resuming, the files it writes."""

import csv
import hashlib
import json
import os
import pathlib
import sys

import ml_collections
import pytest

from experiments import report, table, tables, workers
from experiments.claims import Claim, Results, greater
from experiments.tables import ACCURACY, NONZEROS, Figures, Metric, Panel, Row, Share, Table

BASE = ml_collections.ConfigDict({"seed": 0, "steps": 100, "method": {"name": "dense"}})


def row(name, sparsity, **kwargs):
    method = {"name": name, "sparsity": sparsity}
    return Row(f"{name} {sparsity:g}", name, sparsity, {"method": method}, **kwargs)


TOY = Table(
    title="A toy",
    papers=("Nobody, Nowhere, 2020",),
    about="Nothing is trained.",
    base=BASE,
    panels=(
        Panel(
            "One panel",
            (
                row("dense", 0.0, quick=True),
                row("set_", 0.9),
                row("rigl", 0.9, quick=True),
                row("rigl", 0.98),
            ),
            seeds=3,
            paper=(Figures("rigl", "ResNet-50, ImageNet", {0.9: 73.07}),),
        ),
    ),
    claims=(Claim("RigL beats SET", greater("rigl 0.9", "set_ 0.9")),),
    metrics=(ACCURACY, NONZEROS),
    quick={"steps": 5},
)


def toy_hash(config):
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def pretend(config, workdir):
    """A run whose accuracy depends on method, sparsity and seed; leaves what training leaves."""
    method = config.method.to_dict()
    bonus = {"dense": 0.04, "set_": 0.0, "rigl": 0.02}[method["name"]]
    accuracy = 0.85 + bonus + 0.001 * config.seed - 0.1 * method.get("sparsity", 0.0) ** 4
    summary = {"test_accuracy": accuracy, "nonzeros": 1000, "seconds": 60.0, "steps": config.steps}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "summary.json").write_text(json.dumps(summary))
    return summary


def fail_on_seed_1(config, workdir):
    if config.method.name == "rigl" and config.seed == 1:
        raise FloatingPointError("loss is NaN at step 7\nmore")
    return pretend(config, workdir)


def die_on_seed_1(config, workdir):
    if config.seed == 1 and config.method.name == "dense":
        os._exit(9)
    return pretend(config, workdir)


def tell_process(config, workdir):
    summary = pretend(config, workdir) | {"pid": os.getpid(), "cores": len(os.sched_getaffinity(0))}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return summary


class Counter:
    """Counts the runs that are really executed, and may be interrupted."""

    def __init__(self, stop_after=None):
        self.runs, self.stop_after = 0, stop_after

    def __call__(self, config, workdir):
        if self.runs == self.stop_after:
            raise KeyboardInterrupt
        self.runs += 1
        return pretend(config, workdir)


@pytest.fixture
def regenerate(tmp_path, monkeypatch):
    """Regenerates the toy table in a temporary folder, leaving JAX's settings alone."""
    monkeypatch.setattr(table, "_share_compilations", lambda folder: None)

    def run(function=pretend, toy=TOY, **kwargs):
        work, results = tmp_path / "work", tmp_path / "results"
        return table.regenerate(toy, "toy", work, results, function=function, config_hash=toy_hash, **kwargs)

    run.path = tmp_path
    return run


def test_writes_markdown_csv_and_picture(regenerate, capsys):
    assert len(regenerate()) == 12
    folder = regenerate.path / "results"
    page = (folder / "toy.md").read_text()
    assert page.startswith("# A toy\n\n- Nobody, Nowhere, 2020\n")
    assert "| | 0 % | 90 % | 98 % |".replace("| |", "|  |") in page
    # 0.85 + 0.02 + 0.001 - 0.1 * 0.9**4 = 0.80539, and seeds 0.001 apart have a deviation of 0.001.
    assert "| rigl |  | 80.54 ± 0.10 | 77.88 ± 0.10 |" in page
    assert "| *paper: ResNet-50, ImageNet* |  | *73.07* |  |" in page
    assert "| dense | 1000 |  |  |" in page
    assert "| RigL beats SET | **holds** | +2.00 points | [+2.00, +2.00] | 3 |" in page
    assert "4 rows with 3 seeds, 12 runs, 12.0 minutes" in page
    assert "python -m experiments.table --table=toy\n" in page
    assert "Failed" not in page
    lines = list(csv.DictReader((folder / "toy.csv").open()))
    assert len(lines) == 12
    assert lines[4]["label"] == "set_ 0.9" and lines[4]["seed"] == "1"
    hashes = [line["config_hash"] for line in lines]
    assert hashes == [toy_hash(tables.override(BASE, r.overrides | {"seed": s}))
                      for r in TOY.panels[0].rows for s in range(3)]  # fmt: skip
    assert hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest() in page
    assert (folder / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "holds" in capsys.readouterr().out


def test_finished_runs_are_not_repeated(regenerate):
    first, again, more = Counter(), Counter(), Counter()
    regenerate(first, seeds=2)
    page = (regenerate.path / "results/toy.md").read_text()
    regenerate(again, seeds=2)
    assert (first.runs, again.runs) == (8, 0)
    assert (regenerate.path / "results/toy.md").read_text() == page
    regenerate(more)
    assert more.runs == 4
    changed = tables.override(BASE, {"steps": 200})
    other = Counter()
    regenerate(other, toy=Table("Other", (), "", changed, TOY.panels, ()))
    assert other.runs == 12


def test_equal_configs_run_once(regenerate):
    again = Row("again", "dense", 0.0, row("dense", 0.0).overrides)
    panels = (TOY.panels[0], Panel("Two", (again,), seeds=3))
    counter = Counter()
    runs = regenerate(counter, toy=Table("Twice", (), "", BASE, panels, ()))
    assert (len(runs), counter.runs) == (15, 12)
    assert runs[-1].summary == runs[2].summary


def test_ctrl_c_and_resume(regenerate):
    with pytest.raises(KeyboardInterrupt):
        regenerate(Counter(stop_after=5))
    rest = Counter()
    regenerate(rest)
    assert rest.runs == 7


def test_a_truncated_summary_is_run_again(regenerate):
    runs = regenerate()
    (regenerate.path / "work" / runs[3].hash / "summary.json").write_text('{"test_acc')
    counter = Counter()
    regenerate(counter)
    assert counter.runs == 1


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_failed_runs_are_reported_and_the_rest_continue(regenerate, jobs, capsys):
    runs = regenerate(fail_on_seed_1, jobs=jobs)
    failed = [run for run in runs if run.error]
    assert [run.row.label for run in failed] == ["rigl 0.9", "rigl 0.98"]
    assert failed[0].error == "FloatingPointError: loss is NaN at step 7"
    assert "more" in (regenerate.path / "work" / failed[0].hash / "error.txt").read_text()
    page = (regenerate.path / "results/toy.md").read_text()
    assert "- rigl 0.9, seed 1: FloatingPointError: loss is NaN at step 7" in page
    assert "only 2 seeds in common" in page
    statuses = [line["status"] for line in csv.DictReader((regenerate.path / "results/toy.csv").open())]
    assert statuses.count("failed") == 2
    assert "failed: rigl 0.9, seed 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_worker_fails_only_its_run(regenerate):
    runs = regenerate(die_on_seed_1, jobs=2)
    assert "the worker died with exit code 9" in runs[1].error
    assert all(run.summary for run in runs if run is not runs[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_workers_are_reused_and_pinned(regenerate):
    mine = os.sched_getaffinity(0)
    runs = regenerate(tell_process, jobs=2)
    assert len({run.summary["pid"] for run in runs} - {os.getpid()}) == 2
    if len(mine) == 2:
        assert {run.summary["cores"] for run in runs} == {1}
    assert os.sched_getaffinity(0) == mine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_shares_split_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 7})
    assert workers.shares(2) == [{0, 2, 7}, {1, 3}]
    assert workers.shares(7) == [{0}, {1}, {2}, {3}, {7}, {0}, {1}]


def test_quick_runs_fewer_and_reports_elsewhere(regenerate):
    runs = regenerate(quick=True)
    assert [(run.row.label, run.seed) for run in runs] == [
        ("dense 0", 0), ("dense 0", 1), ("rigl 0.9", 0), ("rigl 0.9", 1)]  # fmt: skip
    assert {run.summary["steps"] for run in runs} == {5}
    assert not (regenerate.path / "results").exists()
    page = (regenerate.path / "work/quick-results/toy.md").read_text()
    assert "--table=toy --quick\n" in page
    assert "no test_accuracy of set_ 0.9" in page


def test_a_row_without_any_finished_run(regenerate):
    def broken(config, workdir):
        raise OSError("no data")

    runs = regenerate(broken)
    assert all(run.error == "OSError: no data" for run in runs)
    assert "| rigl |  | failed | failed |" in (regenerate.path / "results/toy.md").read_text()


@pytest.fixture
def toy_folder(monkeypatch):
    """The toy table under the name `toy` beside the real ones, with a stand-in for training."""
    known = tables.known()
    monkeypatch.setattr(tables, "known", lambda: [*known, "toy"])
    monkeypatch.setitem(sys.modules, "experiments.tables.toy", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "TABLE", TOY, raising=False)
    monkeypatch.setattr(table, "_share_compilations", lambda folder: None)
    monkeypatch.setattr(table.regenerate, "__kwdefaults__", {
        **table.regenerate.__kwdefaults__, "function": fail_on_seed_1, "config_hash": toy_hash})  # fmt: skip


def test_command_line(toy_folder, tmp_path, capsys, monkeypatch):
    where = [f"--workdir={tmp_path}/w", f"--results={tmp_path}/r"]
    assert table.main(["--list"]) == 0
    assert "toy                  A toy (12 runs)" in capsys.readouterr().out
    assert table.main(["--table=toy", "--seeds=1", *where]) == 0
    assert table.main(["--table=toy", *where]) == 1
    assert (tmp_path / "r/toy.md").exists()
    capsys.readouterr()
    assert table.main(["--table=toi"]) == 2
    error = capsys.readouterr().err
    assert "unknown table 'toi'; did you mean 'toy'? (known: " in error and error.count("\n") == 1
    assert table.main(["--table=toy", "--jobs=0"]) == 2
    assert "must be at least 1, not 0" in capsys.readouterr().err
    kwargs = {**table.regenerate.__kwdefaults__, "function": Counter(stop_after=0)}
    monkeypatch.setattr(table.regenerate, "__kwdefaults__", kwargs)
    assert table.main(["--table=toy", "--seeds=2", *where]) == 130
    assert "the same command continues" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table.main([])
    assert "--table or --list is needed" in capsys.readouterr().err


def test_override():
    config = ml_collections.ConfigDict({"a": {"b": 1, "c": 2}, "d": 3})
    changed = tables.override(config, {"a.b": 5, "d": "text", "a.e": 6})
    assert changed.to_dict() == {"a": {"b": 5, "c": 2, "e": 6}, "d": "text"}
    assert tables.override(config, {"a": {"x": (1, 2)}}).to_dict() == {"a": {"x": (1, 2)}, "d": 3}
    assert config.to_dict() == {"a": {"b": 1, "c": 2}, "d": 3}
    with pytest.raises(ValueError, match="override 'q.b' names no part of the config: there is no 'q'"):
        tables.override(config, {"q.b": 1})


def test_shares_of_the_steps_follow_quick():
    method = {"name": "rigl", "update_end": Share(0.75), "deeper": {"begin": Share(0.1)}}
    panel = Panel("p", (Row("r", "r", 0.5, {"method": method}, quick=True),), seeds=1)
    toy = Table("x", (), "", BASE, (panel,), (), quick={"steps": 20})
    for quick, expected in ((False, (75, 10)), (True, (15, 2))):
        configs, _ = table.expand(toy, toy_hash, quick=quick)
        (config, *_) = configs.values()
        assert (config.method.update_end, config.method.deeper.begin) == expected


def test_a_table_is_checked_when_it_is_made():
    panel = TOY.panels[0]
    with pytest.raises(ValueError, match="unknown row 'rigl 0.99'; did you mean 'rigl 0.9'"):
        Table("x", (), "", BASE, (panel,), (Claim("c", greater("rigl 0.99", "set_ 0.9")),))
    with pytest.raises(ValueError, match="more than one row labelled 'dense 0'"):
        Table("x", (), "", BASE, (panel, panel), ())
    with pytest.raises(ValueError, match="unknown x scale 'lg'; did you mean 'log'"):
        Panel("x", panel.rows, 1, x_scale="lg")


def test_cells():
    def cell(values, metric):
        runs = {seed: {metric.name: value} for seed, value in enumerate(values)}
        return report.cell(Results({"row": runs}), "row", metric)

    assert cell([], ACCURACY) == "failed"
    assert cell([None, None], ACCURACY) == "–"
    assert cell([0.5], ACCURACY) == "50.00"
    assert cell([0.5, 0.6], ACCURACY) == "55.00 ± 7.07"
    assert cell([12345.0, 12345.0], NONZEROS) == "12345"
    assert cell([0.1, 0.3], Metric("m", "m")) == "0.200 ± 0.141"


def test_picture_of_panels(tmp_path):
    """Every series gets a legend entry, the reference a band, and 98 % does not touch 99 %."""
    rows = tuple(row(name, s) for name in ("set_", "rigl") for s in (0.8, 0.98, 0.99))
    panels = (
        Panel("A", (row("dense", 0.0), *rows), seeds=2),
        Panel("B", tuple(Row(f"w{w}", "set_", w, {}) for w in (16, 512)), seeds=1, x_scale="log"),
    )
    toy = Table("Two panels", (), "", BASE, panels, ())
    runs = [report.Run(p, r, seed, "", {"test_accuracy": 0.8 + 0.01 * seed})
            for p in panels for r in p.rows for seed in (0, 1)]  # fmt: skip
    path = pathlib.Path(tmp_path / "x.png")
    from experiments import plots

    plots.draw(toy, report.results_of(toy, runs), path)
    assert path.stat().st_size > 10_000
    places = [plots.position(panels[0], x) for x in (0.8, 0.9, 0.95, 0.98, 0.99)]
    assert all(b - a > 0.25 for a, b in zip(places, places[1:], strict=False))
