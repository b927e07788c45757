"""Every table with results really runs in its quick version; and every full one expands to valid configs."""

import csv
import pathlib

import pytest

from experiments import table, tables
from experiments.similarity import encoder_folder
from sparsejax.training import config_hash

# A table is part of the project once its results are committed; a written one that waits for them only expands.
FINISHED = [name for name in tables.known() if (table.RESULTS / f"{name}.md").exists()]
FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("name", tables.known())
def test_expands(name):
    full = tables.load(name)
    configs, runs = table.expand(full, config_hash)
    assert len(configs) <= len(runs) == sum(len(panel.rows) * panel.seeds for panel in full.panels)
    quick, _ = table.expand(full, config_hash, quick=True)
    assert 0 < len(quick) < len(configs) / 3
    # a table whose runs are quick anyway only leaves out rows, and shares the others' results
    assert not full.quick or not quick.keys() & configs.keys()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One for all tables: what several of them start from is trained once."""
    return tmp_path_factory.mktemp("tables")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs the Debian package dataset-fashion-mnist")
@pytest.mark.parametrize("name", FINISHED)
def test_quick(name, workdir):
    if name == "minilm":
        try:
            encoder_folder()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    assert table.main([f"--table={name}", "--quick", f"--workdir={workdir}"]) == 0
    folder = workdir / "quick-results"
    page = (folder / f"{name}.md").read_text()
    quick = tables.load(name)
    assert all(claim.text.replace("|", "\\|") in page for claim in quick.claims)
    assert (folder / f"{name}.png").stat().st_size > 10_000
    lines = list(csv.DictReader((folder / f"{name}.csv").open()))
    rows = [row for panel in quick.panels for row in panel.rows if row.quick]
    assert len(lines) == quick.quick_seeds * len(rows)
    if quick.metrics[0] != tables.ACCURACY:
        return  # regression or a language model
    # Sixty steps train the better half of the rows well beyond guessing; the sparsest may stay there.
    accuracies = sorted(float(line["test_accuracy"]) for line in lines)
    assert accuracies[len(lines) // 2] > 0.2 and accuracies[-1] > 0.4
