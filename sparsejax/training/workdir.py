"""The folder of a run: created, checked for writing, and tied to one configuration."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from sparsejax.training.config import differences

FILE = "config.json"


def prepare(workdir, config: Mapping, write: bool = True) -> Path:
    """The folder as a path, holding `config.json`; created if missing.

    Args:
      workdir: the folder.
      config: the resolved configuration.
      write: False for the processes of a job that must leave the folder alone.

    Raises:
      ValueError: one sentence, if the folder cannot be written or belongs to another configuration.
    """
    workdir = Path(workdir).expanduser().absolute()
    if not write:
        return workdir
    path = workdir / FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, config)
        elif not os.access(workdir, os.W_OK):
            raise PermissionError(13, "Permission denied")
        changed = differences(read_json(path), config)
        if changed and not _has_results(workdir):
            _write(path, config)  # nothing came of the other configuration: most likely it had a mistake
            changed = []
    except OSError as error:
        raise ValueError(f"workdir {str(workdir)!r} is not writable: {error.strerror or error}") from None
    if changed:
        raise ValueError(
            f"workdir {str(workdir)!r} belongs to another configuration ({'; '.join(changed)}); "
            "choose another workdir or restore these values"
        )
    return workdir


def read_json(path: Path):
    """The content of a JSON file, or a ValueError that names the file if it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); remove it or take another workdir") from None


def _has_results(workdir: Path) -> bool:
    saved = workdir / "checkpoints"
    metrics = workdir / "metrics.jsonl"
    return (
        (workdir / "summary.json").exists()
        or (saved.exists() and any(saved.iterdir()))
        or (metrics.exists() and metrics.stat().st_size > 0)
    )


def _write(path: Path, config: Mapping) -> None:
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    replacement.replace(path)  # atomic: a crash must not leave half a configuration
