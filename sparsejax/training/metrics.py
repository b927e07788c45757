"""Metrics of a run: one JSON object per line, and TensorBoard events.

`metrics.jsonl` holds nothing that depends on the clock, so an interrupted and resumed run writes the same
bytes as an uninterrupted one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorboardX

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """The entries of a metrics file; a last line cut short by a crash is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def scalars(entry: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an entry by name; those of nested mappings as `outer/inner`."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


class MetricsWriter:
    """Appends entries to `metrics.jsonl` and to TensorBoard events.

    Args:
      workdir: the folder of the run.
      step: the step that was resumed from; later entries, of a lost stretch, are removed.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / FILE
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step]
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        replacement.replace(path)  # atomic: a crash here must not lose the earlier entries
        self._file = path.open("a")
        purge = step + 1 if step else None
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, entry: Mapping) -> None:
        """Appends one entry, which must have a "step"."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()  # before the checkpoint of this step, so that a crash cannot lose it
        for name, value in scalars(entry):
            if name != "step":
                self._board.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()
