"""The picture of a run: accuracy and loss, layer densities, how the masks moved."""

from collections.abc import Mapping
from pathlib import Path

from absl import logging

from sparsejax.training.metrics import FILE, read_metrics

BLUE, ORANGE, GREEN, GREY = "#3465a4", "#d9730d", "#2f8f5b", "#8a8a8a"
PERCENT = "{x:.0%}"


def draw(workdir: Path, summary: Mapping) -> None:
    """Writes `curves.png` from `metrics.jsonl`; without matplotlib one line says that it is skipped."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("curves.png is skipped: matplotlib is not installed (pip install 'sparsejax[plot]')")
        return
    entries = read_metrics(workdir / FILE)
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with plt.rc_context({**style, "font.size": 10, "axes.titleweight": "bold", "legend.frameon": False}):
        figure = Figure(figsize=(14, 4.2), layout="constrained")
        score, layers, topology = figure.subplots(1, 3)
        _draw_score(score, entries)
        _draw_layers(layers, entries)
        _draw_topology(topology, entries)
        figure.suptitle(_title(workdir, summary), fontsize=11)
        figure.savefig(workdir / "curves.png", dpi=130)


def _title(workdir: Path, summary: Mapping) -> str:
    parts = [workdir.name, f"sparsity {summary['sparsity']:.1%}"]
    if "test_accuracy" in summary:
        parts.append(f"test accuracy {summary['test_accuracy']:.2%}")
    return "   |   ".join([*parts, f"training FLOPs {summary['train_flops_ratio']:.2f} x dense"])


def _series(entries, name: str) -> tuple[list, list]:
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _draw_score(axes, entries) -> None:
    """Loss on the left axis; test accuracy (not for regression) on the right."""
    axes.plot(*_series(entries, "train_loss"), color=ORANGE, label="training loss")
    axes.plot(*_series(entries, "test_loss"), color=ORANGE, linestyle=":", marker=".", label="test loss")
    axes.set(title="Learning", xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    steps, accuracy = _series(entries, "test_accuracy")
    if steps:
        axes.plot([], [], color=BLUE, marker=".", label="test accuracy")
        right = axes.twinx()
        right.plot(steps, accuracy, color=BLUE, marker=".")
        # At least five points of accuracy, so that noise does not look like a trend.
        right.set_ylim(min(min(accuracy), max(accuracy) - 0.05) - 0.01, max(accuracy) + 0.01)
        right.yaxis.set_major_formatter(PERCENT)
        right.set_ylabel("test accuracy", color=BLUE)
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
    _legend(axes)


def _draw_layers(axes, entries) -> None:
    """One bar for every sparsified leaf, the input layer on top."""
    densities = next((entry["density"] for entry in reversed(entries) if "density" in entry), {})
    axes.set(title="Density per layer", xlabel="kept weights", xlim=(0, 1.12))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="y", visible=False)
    if not densities:
        axes.text(0.5, 0.5, "no layer is sparsified", ha="center", transform=axes.transAxes, color=GREY)
        axes.set_yticks([])
        return
    names, values = list(densities), list(densities.values())
    bars = axes.barh(range(len(names)), values, color=GREEN)
    small = 10 if len(names) <= 12 else max(3, 120 // len(names))
    axes.bar_label(bars, labels=[f"{value:.1%}" for value in values], padding=3, fontsize=min(9, small))
    axes.set_yticks(range(len(names)), names, fontsize=small)
    axes.invert_yaxis()


def _draw_topology(axes, entries) -> None:
    """Churn between logs, sparsity, and the share of weights that were ever active."""
    axes.set(title="Topology", xlabel="step", ylabel="fraction of weights", ylim=(-0.03, 1.05))
    axes.plot(*_series(entries, "sparsity"), color=GREY, label="sparsity")
    axes.plot(*_series(entries, "churn"), color=ORANGE, label="churn since the last log")
    explored = _series(entries, "exploration_rate")
    if explored[0]:
        axes.plot(*explored, color=BLUE, label="ever active")
    axes.yaxis.set_major_formatter(PERCENT)
    _legend(axes)


def _legend(axes) -> None:
    """Below the axes, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, columnspacing=1.2)
