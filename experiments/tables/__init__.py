"""Tables of papers, one a file: what is run, what the paper says, and which of its claims are tested.

A new table is a file in this folder that defines `TABLE = Table(...)`; the file's name is the table's name.
Everything else (runs, seeds, caching, statistics, Markdown, CSV, plot) is `experiments.table`'s work.
"""

import copy
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from experiments.claims import Claim, Results
from sparsejax.masks import choose

# How the values of x are spaced in the plot and written: fractions of zeros, or plain numbers on a log axis.
X_SCALES = ("sparsity", "log")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of the summary that the table shows as `scale * value`, with so many digits and this unit."""

    name: str
    title: str
    scale: float = 1.0
    digits: int = 3
    unit: str = ""


# LeNet-300-100 for three epochs of Fashion-MNIST: what most tables start from. Nothing is logged, evaluated
# or saved before the end, and tables that share settings share runs.
FASHION_MNIST = ml_collections.ConfigDict(
    {
        "seed": 0,
        "data": {"name": "fashion_mnist"},
        "model": {"name": "mlp", "hidden": (300, 100)},
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "schedule": "cosine"},
        "method": {"name": "dense"},
        "batch_size": 128,
        "steps": 1407,
        "log_every": 500,
        "eval_every": 0,
        "checkpoint_every": 0,
        "curves": False,
    }
)
QUICK = {"steps": 60, "data.limit": 8000}

ACCURACY = Metric("test_accuracy", "test accuracy", 100, 2, "%")
TRAIN_FLOPS = Metric("train_flops_ratio", "training FLOPs / dense", 1, 3)
SPARSITY = Metric("sparsity", "sparsity reached", 100, 2, "%")
NONZEROS = Metric("nonzeros", "non-zero parameters", 1, 0)


@dataclasses.dataclass(frozen=True)
class Share:
    """A number of steps, as a fraction of the run's `steps`; it follows when `--quick` shortens the run."""

    fraction: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting, run with several seeds.

    Attributes:
      label: unique in the table; claims refer to it.
      series: the method it belongs to: a line of the plot and of the printed table.
      x: where it stands on the x axis: a column of the printed table.
      overrides: dotted paths of the config and their values; a dict replaces the whole subtree, and a
        `Share(0.75)` becomes that part of the run's steps.
      quick: whether `--quick` runs it too.
    """

    label: str
    series: str
    x: float
    overrides: Mapping[str, Any]
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a paper reports for a series, by x, with the setting it was measured in."""

    series: str
    setting: str
    values: Mapping[float, float | str]
    metric: str = ACCURACY.name


@dataclasses.dataclass(frozen=True)
class Panel:
    """The rows that are printed as one table and drawn in one axes.

    Attributes:
      title: heading.
      rows: the settings, in the order they are printed.
      seeds: how many seeds each row is run with: 0, 1, 2 ...
      overrides: of the table's base config, for all rows.
      paper: the papers' own figures.
      x_title, x_scale: name of the x axis, and "sparsity" or "log".
      reference: the series drawn as a horizontal band (a dense network, say), empty for none.
    """

    title: str
    rows: tuple[Row, ...]
    seeds: int
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: tuple[Figures, ...] = ()
    x_title: str = "sparsity"
    x_scale: str = "sparsity"
    reference: str = "dense"

    def __post_init__(self):
        choose("x scale", self.x_scale, X_SCALES)

    def tick(self, x: float) -> str:
        """How a value of x is written."""
        return f"{100 * x:g} %" if self.x_scale == "sparsity" else f"{x:.4g}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A paper's table at small scale.

    Attributes:
      title, papers: the heading, and the works it stands for.
      about: one paragraph on the setting and on where it departs from the papers.
      base: the config that all rows start from.
      panels: the rows.
      claims: what is decided from the rows.
      metrics: shown per row; the first is the plotted one.
      quick: overrides for `--quick`, applied last, and `quick_seeds` the seeds then; two minutes in all.
      function: executes a run, if that is not `sparsejax.training.run`: `(config, workdir) -> summary`,
        leaving `summary.json` in the workdir. It must be importable, for the workers; its configs are named by
        their values as they are.

    Raises:
      ValueError: if two rows share a label, or a claim speaks of a row that is not there.
    """

    title: str
    papers: tuple[str, ...]
    about: str
    base: ml_collections.ConfigDict
    panels: tuple[Panel, ...]
    claims: tuple[Claim, ...]
    metrics: tuple[Metric, ...] = (ACCURACY,)
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quick_seeds: int = 2
    function: Callable | None = None

    def __post_init__(self):
        labels = [row.label for panel in self.panels for row in panel.rows]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"table {self.title!r} has more than one row labelled {twice[0]!r}")
        for claim in self.claims:
            claim(Results({label: {} for label in labels}))


def known() -> list[str]:
    """The names of all tables."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Table:
    """The table of that name; an unknown one raises an error that lists the known ones."""
    return importlib.import_module(f"{__name__}.{choose('table', name, known())}").TABLE


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of the config with dotted paths set; a dict replaces the whole subtree.

    Raises:
      ValueError: if a path's parent is not in the config.
    """
    config = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                raise ValueError(f"override {path!r} names no part of the config: there is no {parent!r}")
            node = node[parent]
        if leaf in node:
            del node[leaf]
        node[leaf] = ml_collections.ConfigDict(value) if isinstance(value, Mapping) else value
    return config


def in_steps(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of the config in which every `Share` is a number of steps."""

    def convert(value):
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return round(value.fraction * config.steps) if isinstance(value, Share) else value

    return ml_collections.ConfigDict(convert(config.to_dict()))
