"""Text for language models: what calibration and evaluation read.

A corpus is `stdlib` (see `sparsejax.data.stdlib`), a text file, or a folder whose `.txt`, `.md` and `.py` files are read in the
order of their paths. Every tenth file of a folder, and the last tenth of a file, is the test split.
"""

from pathlib import Path

import numpy as np

from sparsejax.data.stdlib import TEST_EVERY
from sparsejax.data.stdlib import source as stdlib_source
from sparsejax.masks import choose

SUFFIXES = (".txt", ".md", ".py")
SPLITS = ("train", "test")


def read(corpus: str, split: str, size: int = 4_000_000) -> bytes:
    """The first `size` bytes of a split of a corpus.

    Args:
      corpus: "stdlib", or the path of a file or folder.
      split: "train" or "test".
      size: bytes at most, and little more is read.

    Raises:
      ValueError: for an unknown split, a size below 1, or a corpus without text.
      FileNotFoundError: for a path that is not there.
    """
    choose("split", split, SPLITS)
    if size < 1:
        raise ValueError(f"size must be at least 1 byte, got {size}")
    if corpus == "stdlib":
        return stdlib_source(split, size=size)[:size]
    path = Path(corpus).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"the corpus {corpus!r} is neither 'stdlib' nor the path of a file or folder")
    text = _of_folder(path, split, size) if path.is_dir() else _of_file(path, split, size)
    if not text:
        raise ValueError(
            f"the {split} split of the corpus {corpus!r} has no text (of a folder, files that end in "
            f"{', '.join(SUFFIXES)} are read)"
        )
    return text[:size]


def encode(text: bytes, tokenizer=None) -> np.ndarray:
    """Tokens, int32 `(n,)`: bytes as they are, or by a `tokenizers.Tokenizer` without special tokens."""
    if tokenizer is None:
        return np.frombuffer(text, np.uint8).astype(np.int32)
    found = tokenizer.encode(text.decode("utf-8", errors="ignore"), add_special_tokens=False)
    return np.asarray(found.ids, np.int32)


def sample(tokens: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """`count` windows of `length` tokens from random places, int32 `(count, length)`: calibration data.

    Raises:
      ValueError: if there are fewer than `length` tokens, or `count` or `length` is less than one.
    """
    _check(tokens, count, length)
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, count)
    return tokens[starts[:, None] + np.arange(length)]


def windows(tokens: np.ndarray, length: int, count: int | None = None) -> np.ndarray:
    """The first `count` consecutive windows (None: all), int32 `(count, length)`: evaluation data.

    Raises:
      ValueError: as `sample`, and if there are fewer than `count` windows.
    """
    _check(tokens, 1 if count is None else count, length)
    found = tokens[: len(tokens) // length * length].reshape(-1, length)
    if count is not None and count > len(found):
        raise ValueError(
            f"the text has {len(tokens)} tokens, {len(found)} windows of {length}; {count} were asked for"
        )
    return found[:count]


def _check(tokens, count: int, length: int) -> None:
    if count < 1 or length < 1:
        raise ValueError(f"windows need a count and a length of at least 1, got {count} and {length}")
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}")


def _of_file(path: Path, split: str, size: int) -> bytes:
    total = path.stat().st_size
    border = total - total // TEST_EVERY
    start, end = (0, border) if split == "train" else (border, total)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(min(size, end - start))


def _of_folder(folder: Path, split: str, size: int) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if len(files) == 1:
        return _of_file(files[0], split, size)
    parts, total = [], 0
    for index, path in enumerate(files):
        if total >= size:
            break
        if (index % TEST_EVERY == 0) == (split == "test"):
            parts.append(path.read_bytes())
            total += len(parts[-1])
    return b"\n".join(parts)
