"""Regenerates the table of a paper: `python -m experiments.table --table=rigl --jobs=2`.

Runs every row with every seed, except the runs already finished (found by the hash of their config in the
working folder), and writes `NAME.md`, `NAME.csv` and `NAME.png`. Interrupt it as you like: the same command
continues. `--list` shows the tables, `--quick` runs a two-minute version of one.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import tqdm

from experiments import report, tables, workers
from experiments.report import Run

RESULTS = pathlib.Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a run failed, 2 for a bad request, 130 for Ctrl-C."""
    args = _parse(argv)
    if args.list:
        print(listing())
        return 0
    try:
        table = tables.load(args.table)
        runs = regenerate(
            table, args.table, args.workdir, args.results, quick=args.quick, jobs=args.jobs, seeds=args.seeds
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # A run that was told to stop saves its state and exits.
        print("stopped; finished runs are kept, and the same command continues", file=sys.stderr)
        return 130
    return int(any(run.error for run in runs))


def listing() -> str:
    """All tables with their titles and the number of runs."""
    lines = []
    for name in tables.known():
        table = tables.load(name)
        count = sum(len(panel.rows) * panel.seeds for panel in table.panels)
        lines.append(f"{name:20s} {table.title} ({count} runs)")
    return "\n".join(lines)


def regenerate(
    table: tables.Table,
    name: str,
    workdir: pathlib.Path,
    results: pathlib.Path,
    *,
    quick: bool = False,
    jobs: int = 1,
    seeds: int | None = None,
    function: workers.Function | None = None,
    config_hash: Callable | None = None,
) -> list[Run]:
    """Executes what is missing of a table and writes its report.

    Args:
      table, name: the table, and the stem of the files written.
      workdir: where runs live, each in a folder named by its config's hash.
      results: where the report goes; with `quick` it goes to `workdir/quick-results` instead.
      quick: only the rows marked quick, with the quick overrides and seeds.
      jobs: local processes.
      seeds: seeds per row, instead of the table's own numbers.
      function: executes a run: `(config, workdir) -> summary`, and leaves `summary.json` there; that of the
        table unless given.
      config_hash: names a config; unless given, that of `sparsejax.training`.

    Returns:
      The runs with their summaries or errors.
    """
    if jobs < 1 or (seeds is not None and seeds < 1):
        raise ValueError(f"jobs and seeds must be at least 1, not {jobs} and {seeds}")
    if config_hash is None:
        from sparsejax.training import config_hash
    workdir, results = pathlib.Path(workdir).absolute(), pathlib.Path(results)
    folder = workdir / "quick-results" if quick else results
    for needed in (workdir, folder):
        try:
            needed.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{str(needed)!r} is not a folder that can be written: {error.strerror}"
            ) from None
    configs, runs = expand(table, config_hash, quick=quick, seeds=seeds)
    _share_compilations(workdir / "compilation-cache")
    start = time.monotonic()
    outcomes = _execute(configs, runs, workdir, function or table.function or workers.train, jobs)
    for run in runs:
        run.summary, run.error = outcomes[run.hash]
    if quick:
        warning = "(Quick version, too short to mean anything.) "
        table = dataclasses.replace(table, about=warning + table.about)
    command = f"python -m experiments.table --table={name}" + " --quick" * quick
    command += f" --seeds={seeds}" * (seeds is not None) + f" --jobs={jobs}" * (jobs > 1)
    verdicts = report.write(table, runs, folder, name, command)
    _print_outcome(table, runs, verdicts, folder / f"{name}.md", time.monotonic() - start)
    return runs


def expand(table: tables.Table, config_hash: Callable, *, quick: bool = False, seeds: int | None = None):
    """The configs by hash, and the runs of a table: rows x seeds.

    Rows with equal configs (a dense network shown twice) share one execution. A table with a function of its
    own has configs that `config_hash` need not know.
    """
    config_hash = config_hash if table.function is None else _plain_hash
    configs, runs = {}, []
    for panel in table.panels:
        for row in panel.rows:
            if quick and not row.quick:
                continue
            config = tables.override(table.base, {**panel.overrides, **row.overrides})
            config = tables.in_steps(tables.override(config, table.quick if quick else {}))
            for seed in range(seeds or (table.quick_seeds if quick else panel.seeds)):
                seeded = tables.override(config, {"seed": seed})
                runs.append(Run(panel, row, seed, config_hash(seeded)))
                configs[runs[-1].hash] = seeded
    return configs, runs


def _execute(configs: dict, runs: list[Run], workdir: pathlib.Path, function, jobs: int) -> dict:
    """`{hash: (summary, error)}` of all configs; executes those without a summary, with a progress bar."""
    outcomes = {hash: (_finished(workdir / hash), "") for hash in configs}
    missing = [hash for hash, (summary, _) in outcomes.items() if summary is None]
    names = {run.hash: f"{run.row.label}, seed {run.seed}" for run in reversed(runs)}
    tasks = [workers.Task(configs[hash], workdir / hash) for hash in missing]
    done = len(configs) - len(missing)
    with tqdm.tqdm(total=len(configs), initial=done, unit="run", dynamic_ncols=True) as bar:
        for event in workers.execute(tasks, function, jobs):
            hash = missing[event.task]
            if event.kind == "started":
                bar.set_postfix_str(names[hash])
                continue
            outcomes[hash] = event.summary, event.error
            if event.error:
                bar.write(f"failed: {names[hash]}: {event.error} ({workdir / hash})", file=sys.stderr)
            bar.update()
    return outcomes


def _plain_hash(config) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the config's JSON."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def _finished(folder: pathlib.Path) -> dict | None:
    """The summary of a finished run, or None."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _share_compilations(folder: pathlib.Path):
    """Lets runs that differ only in values (seeds, above all) share compiled programs, over all processes."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), str(value))  # For the workers, which have not imported JAX yet.
    if "jax" in sys.modules:
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, type(value)(os.environ[name.upper()]))


def _print_outcome(table, runs: list[Run], verdicts, path: pathlib.Path, seconds: float):
    """The verdicts, the failures and where the report is."""
    for verdict in verdicts:
        effect, interval = report.describe(verdict, table)
        print(f"{verdict.verdict:13s} {verdict.claim}" + (f": {effect} {interval}" if verdict.n else ""))
    failed = sum(bool(run.error) for run in runs)
    print(f"{len(runs)} runs, {failed} failed, in {seconds:.0f} s; report in {path}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's flags."""
    parser = argparse.ArgumentParser(prog="python -m experiments.table", description=__doc__.split("\n")[0])
    parser.add_argument("--table", help="which table; see --list")
    parser.add_argument("--list", action="store_true", help="show all tables")
    parser.add_argument("--quick", action="store_true", help="a two-minute version, reported in the workdir")
    parser.add_argument("--jobs", type=int, default=1, help="local processes")
    parser.add_argument("--seeds", type=int, help="seeds per row instead of the table's own number")
    workdir = pathlib.Path("runs/tables")
    parser.add_argument("--workdir", type=pathlib.Path, default=workdir, help="runs live here (%(default)s)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="reports go here (%(default)s)")
    args = parser.parse_args(argv)
    if not args.list and args.table is None:
        parser.error(f"--table or --list is needed (tables: {', '.join(tables.known())})")
    return args


if __name__ == "__main__":
    sys.exit(main())
