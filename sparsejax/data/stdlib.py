"""`stdlib`: language modelling on the bytes of Python's own standard library, which every machine has."""

import os
import sysconfig
from pathlib import Path

import numpy as np

from sparsejax.data.dataset import Dataset
from sparsejax.masks import choose

BYTES = 256
# Not the library itself: installed packages, and tests, which are long tables of data.
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
TEST_EVERY = 10


def stdlib(data_dir: str | None = None, *, length: int = 128, size: int = 4_000_000) -> Dataset:
    """Windows of source code and their next bytes.

    Files come in the order of their paths; every tenth is in the test split, so that no file is in both. The
    text depends on the version of Python, and so do results to a small degree.

    Args:
      data_dir: read the `.py` files of this folder instead.
      length: bytes of a window (of the input; the targets are the same bytes shifted by one).
      size: use the first windows up to so many bytes of training text, and a tenth as many of test text.

    Returns:
      A `Dataset` with int32 `x` and `y` of shape (windows, length) and 256 classes.

    Raises:
      FileNotFoundError: if the folder has no `.py` files.
      ValueError: if a window would not fit.
    """
    if length < 1 or size < 10 * (length + 1):
        raise ValueError(f"stdlib needs length >= 1 and size >= 10 (length + 1), got {length} and {size}")
    train, test = source("train", data_dir, size), source("test", data_dir, size // 10)
    return Dataset("stdlib", _windows(train, length), _windows(test, length), BYTES)


def source(split: str, data_dir: str | None = None, size: int = 4_000_000) -> bytes:
    """The first `size` bytes of a split (and one more, where there is one): "train" or "test".

    Raises:
      FileNotFoundError: if the folder has no `.py` files.
    """
    parts, total = [], 0
    for path in files(split, data_dir):
        if total > size:
            break
        parts.append(path.read_bytes())
        total += len(parts[-1])
    return b"".join(parts)[: size + 1]


def files(split: str, data_dir: str | None = None) -> list[Path]:
    """The `.py` files of a split in the order of their paths: "test" has every tenth, "train" the others.

    Raises:
      FileNotFoundError: if the folder has no `.py` files.
    """
    folder = Path(data_dir or sysconfig.get_paths()["stdlib"])
    found = []
    for parent, inner, names in os.walk(folder):
        inner[:] = set(inner).difference(LEFT_OUT)  # those are not walked: installed packages may be many
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    found.sort()
    if len(found) < TEST_EVERY:
        raise FileNotFoundError(
            f"stdlib was not found: {folder} has {len(found)} Python files; data_dir may name another folder"
        )
    chosen = choose("split", split, {"train": False, "test": True})
    return [path for index, path in enumerate(found) if (index % TEST_EVERY == 0) == chosen]


def _windows(text: bytes, length: int):
    text = np.frombuffer(text, np.uint8).astype(np.int32)
    count = (len(text) - 1) // length
    return tuple(text[start : start + count * length].reshape(count, length) for start in (0, 1))
