"""What a table leaves behind: Markdown with the verdicts, CSV with every run, and a picture."""

import csv
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import plots
from experiments.claims import Results, Verdict
from experiments.tables import Figures, Metric, Panel, Row, Table


@dataclasses.dataclass
class Run:
    """One row with one seed: its config's hash, and once executed its summary or the error's sentence."""

    panel: Panel
    row: Row
    seed: int
    hash: str
    summary: dict | None = None
    error: str = ""


def results_of(table: Table, runs: Sequence[Run]) -> Results:
    """The summaries of the finished runs by row and seed, with every row of the table present."""
    summaries = {row.label: {} for panel in table.panels for row in panel.rows}
    for run in runs:
        if run.summary is not None:
            summaries[run.row.label][run.seed] = run.summary
    return Results(summaries)


def write(table: Table, runs: Sequence[Run], folder: pathlib.Path, name: str, command: str) -> list[Verdict]:
    """Writes `NAME.md`, `NAME.csv` and `NAME.png` into the folder and returns the verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    results = results_of(table, runs)
    verdicts = [claim(results) for claim in table.claims]
    _write_csv(table, runs, folder / f"{name}.csv")
    plots.draw(table, results, folder / f"{name}.png")
    (folder / f"{name}.md").write_text(markdown(table, runs, verdicts, name, command), encoding="utf-8")
    return verdicts


def markdown(table: Table, runs: Sequence[Run], verdicts: Sequence[Verdict], name: str, command: str) -> str:
    """The page of a table."""
    results = results_of(table, runs)
    blocks = [f"# {table.title}", "\n".join(f"- {paper}" for paper in table.papers), _paragraph(table, runs)]
    blocks += ["## Claims", _verdicts(table, verdicts, "claim"), f"![{table.title}]({name}.png)"]
    for panel in table.panels:
        rows = [row for row in panel.rows if any(run.row is row for run in runs)]
        if not rows:
            continue
        blocks.append(f"## {panel.title}")
        for metric in table.metrics:
            unit = f" ({metric.unit})" if metric.unit else ""
            blocks += [f"{metric.title[0].upper()}{metric.title[1:]}{unit}:"]
            blocks += [_pivot(panel, rows, metric, results)]
    parts = [part for verdict in verdicts if verdict.parts for part in verdict.comparisons]
    if parts:
        blocks += ["## The comparisons behind the claims", _verdicts(table, parts, "comparison")]
    failed = [run for run in runs if run.error]
    if failed:
        blocks += ["## Failed runs", "\n".join(f"- {r.row.label}, seed {r.seed}: {r.error}" for r in failed)]
    digest = hashlib.sha256("\n".join(sorted({run.hash for run in runs})).encode()).hexdigest()
    blocks += [
        "## Regenerate",
        f"```\n{command}\n```",
        f"Each run with its config hash is a line of [{name}.csv]({name}.csv); "
        f"the SHA-256 of the sorted hashes is `{digest}`.",
    ]
    return "\n\n".join(blocks) + "\n"


def amount(value: float, metric: Metric) -> str:
    """A value of a metric in its unit's digits."""
    return f"{metric.scale * value:.{metric.digits}f}"


def cell(results: Results, label: str, metric: Metric) -> str:
    """Mean and sample standard deviation over seeds; the mean alone where they do not differ or are one.

    A row without finished runs is "failed", a metric that its runs do not have is a dash.
    """
    values = list(results.values(label, metric.name).values())
    if not values:
        return "–" if results.summaries[label] else "failed"
    text = amount(float(np.mean(values)), metric)
    if len(values) == 1:
        return text
    spread = amount(float(np.std(values, ddof=1)), metric)
    return text if float(spread) == 0 else f"{text} ± {spread}"


def describe(verdict: Verdict, table: Table) -> tuple[str, str]:
    """Effect and interval of a verdict, as text with the unit."""
    metric = next((m for m in table.metrics if m.name == verdict.metric), Metric(verdict.metric, ""))
    unit = " points" if metric.unit == "%" else metric.unit and f" {metric.unit}"
    if math.isnan(verdict.effect):
        return "", verdict.note
    digits = max(metric.digits, 2)
    numbers = (verdict.effect, verdict.low, verdict.high)
    effect, low, high = (f"{metric.scale * number:+.{digits}f}" for number in numbers)
    interval = f"[{low}, {high}]" if math.isfinite(verdict.low) else ""
    return effect + unit, ", ".join(filter(None, (interval, verdict.note)))


def _paragraph(table: Table, runs: Sequence[Run]) -> str:
    """What was run and how long it took."""
    rows, hashes = len({run.row.label for run in runs}), {run.hash: run for run in runs}
    seconds = sum(run.summary.get("seconds", 0.0) for run in hashes.values() if run.summary)
    seeds = sorted({sum(other.row is run.row for other in runs) for run in runs})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    work = "training" if table.function is None else "work"
    return (
        f"{table.about} {rows} rows with {count} seeds, {len(hashes)} runs, {seconds / 60:.1f} minutes of "
        f"{work} in sum. Shown is the mean ± the sample standard deviation over seeds. A claim *holds* if "
        "the 95 % interval of the paired difference lies wholly on its side, *does not hold* if it lies "
        "wholly on the other, and is *undecided* otherwise; of a claim made of several comparisons, shown is "
        "the one that decides."
    )


def _verdicts(table: Table, verdicts: Sequence[Verdict], head: str) -> str:
    """One line per claim or comparison; of a conjunction the effect is that of the part that decides."""
    lines = [[head, "verdict", "effect", "95 % interval", "seeds"]]
    lines += [[v.claim, f"**{v.verdict}**", *describe(v, table), v.n] for v in verdicts]
    return _grid(lines)


def _pivot(panel: Panel, rows: Sequence[Row], metric: Metric, results: Results) -> str:
    """One line per series, one column per x, and below each series what the papers report for it."""
    columns = sorted({row.x for row in rows})
    lines = [["", *(panel.tick(x) for x in columns)]]
    for series in dict.fromkeys(row.series for row in rows):
        at = {row.x: row for row in rows if row.series == series}
        cells = (cell(results, at[x].label, metric) if x in at else "" for x in columns)
        lines.append([series, *cells])
        figures = [f for f in panel.paper if (f.series, f.metric) == (series, metric.name)]
        lines += [_paper_line(f, columns) for f in figures if f.values.keys() & set(columns)]
    return _grid(lines)


def _paper_line(figures: Figures, columns: Sequence[float]) -> list[str]:
    """The paper's figures under ours."""
    cells = (str(figures.values.get(x, "")) for x in columns)
    return [f"*paper: {figures.setting}*", *(f"*{text}*" if text else "" for text in cells)]


def _grid(lines: Sequence[Sequence]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = [[str(text).replace("|", "\\|") for text in line] for line in lines]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def _write_csv(table: Table, runs: Sequence[Run], path: pathlib.Path):
    """One line per run, with the table's metrics in raw units."""
    metrics = list(dict.fromkeys([*(metric.name for metric in table.metrics), "seconds"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        where = ["panel", "label", "series", "x"]
        writer.writerow([*where, "seed", "config_hash", "status", *metrics])
        for run in runs:
            summary: Mapping = run.summary or {}
            status = "finished" if run.summary is not None else "failed"
            values = [summary.get(metric, "") for metric in metrics]
            where = [run.panel.title, run.row.label, run.row.series, run.row.x]
            writer.writerow([*where, run.seed, run.hash, status, *values])
