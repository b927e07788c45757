"""Pictures of tables: one axes per panel, one line per series, error bars over seeds."""

import math
import pathlib
import textwrap

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from experiments.claims import Results
from experiments.tables import Metric, Panel, Table

# Okabe and Ito's palette, which colour-blind readers can tell apart; black is left for the reference.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vPX"
WIDTH, HEIGHT, APART = 5.4, 4.0, 0.008
CHARACTER, HANDLE, LINE = 0.078, 0.75, 0.22  # inches: of text, and of a legend's entry and line


def draw(table: Table, results: Results, path: pathlib.Path):
    """Draws the first metric of a table against x, a panel per axes, and writes the picture as PNG.

    Points are means, bars the sample standard deviation over seeds; the reference series of a panel is a
    horizontal band. Series of all panels share their colours and one legend. A panel whose points all stand at
    one x is drawn with a line of the picture per series instead.
    """
    metric = table.metrics[0]
    width = WIDTH * len(table.panels)
    figure = matplotlib.figure.Figure(figsize=(width, HEIGHT), layout="constrained")
    series = dict.fromkeys(row.series for panel in table.panels for row in panel.rows)
    references = {panel.reference for panel in table.panels}
    plain = [name for name in series if name not in references]
    styles = {name: _style(i) for i, name in enumerate(plain)}
    styles |= {name: {"color": "black", "marker": "*"} for name in references}
    axes = figure.subplots(1, len(table.panels), squeeze=False)[0]
    for axis, panel in zip(axes, table.panels, strict=True):
        single = len({row.x for row in panel.rows if row.series != panel.reference}) == 1
        (_draw_dots if single else _draw_panel)(axis, panel, metric, results, styles)
    handles = {}
    for axis in axes:
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)) | handles
    if handles:
        shown = [name for name in series if name in handles]
        columns = min(len(shown), max(1, int(width / (CHARACTER * max(map(len, shown)) + HANDLE))))
        figure.set_figheight(HEIGHT + LINE * math.ceil(len(shown) / columns))
        place = "outside lower center"
        figure.legend([handles[name] for name in shown], shown, loc=place, ncols=columns, frameon=False)
    figure.suptitle(textwrap.fill(table.title, int(width / (1.3 * CHARACTER))))
    figure.savefig(path, dpi=150)


def position(panel: Panel, x: float) -> float:
    """Where x stands: sparsities by the logarithm of their density, which keeps 98 % and 99 % apart."""
    return -math.log10(1 - x) if panel.x_scale == "sparsity" else math.log10(x)


def _style(index: int) -> dict:
    """Colour, marker and dash of a series; all three return only after many series."""
    cycle = len(COLOURS)
    dash = ("-", "--", ":")[index // cycle % 3]
    return {"color": COLOURS[index % cycle], "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}


def _points(panel: Panel, series: str, metric: Metric, results: Results) -> list[tuple[float, float, float]]:
    """(x, mean, spread over seeds) of a series, by x."""
    points = []
    for row in sorted((r for r in panel.rows if r.series == series), key=lambda r: r.x):
        values = metric.scale * np.array(list(results.values(row.label, metric.name).values()))
        if values.size:
            points.append((row.x, values.mean(), values.std(ddof=1) if values.size > 1 else 0.0))
    return points


def _draw_dots(axis, panel: Panel, metric: Metric, results: Results, styles: dict[str, dict]):
    """One axes: a dot with its error bar per series, named at the left, the reference as a vertical band."""
    del styles  # names replace colours
    lines = [s for s in dict.fromkeys(row.series for row in panel.rows) if s != panel.reference]
    for place, series in enumerate(lines):
        for _, mean, spread in _points(panel, series, metric, results):
            axis.errorbar(mean, place, xerr=spread, color=COLOURS[0], marker="o", markersize=4.5, capsize=3)
    for _, mean, spread in _points(panel, panel.reference, metric, results):
        axis.axvline(mean, color="black", linewidth=1, label=panel.reference)
        axis.axvspan(mean - spread, mean + spread, color="black", alpha=0.12, linewidth=0)
    axis.set_yticks(range(len(lines)), lines, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(_axis_title(metric))
    _finish(axis, panel)


def _axis_title(metric: Metric) -> str:
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def _finish(axis, panel: Panel):
    axis.set_title(panel.title, fontsize="medium")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_panel(axis, panel: Panel, metric: Metric, results: Results, styles: dict[str, dict]):
    """One axes: lines with error bars, the reference as a band, ticks where there are points."""
    ticks = set()
    lines = [s for s in dict.fromkeys(row.series for row in panel.rows) if s != panel.reference]
    places = [position(panel, row.x) for row in panel.rows if row.series in lines]
    # Neighbouring series stand slightly apart, so that their error bars do not hide each other.
    step = APART * (max(places) - min(places)) if places else 0.0
    shift = {name: step * (i - (len(lines) - 1) / 2) for i, name in enumerate(lines)}
    for series in [panel.reference, *lines]:
        points = _points(panel, series, metric, results)
        if not points:
            continue
        xs, means, spreads = zip(*points, strict=True)
        if series == panel.reference:
            axis.axhline(means[0], color="black", linewidth=1, label=series)
            axis.axhspan(means[0] - spreads[0], means[0] + spreads[0], color="black", alpha=0.12, linewidth=0)
            continue
        ticks |= set(xs)
        at = [position(panel, x) + shift[series] for x in xs]
        plain = {"capsize": 3, "linewidth": 1.4, "markersize": 4.5}
        axis.errorbar(at, means, spreads, label=series, **plain, **styles[series])
    ticks = sorted(ticks)
    axis.set_xticks([position(panel, x) for x in ticks], [panel.tick(x) for x in ticks])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_xlabel(panel.x_title)
    axis.set_ylabel(_axis_title(metric))
    _finish(axis, panel)
