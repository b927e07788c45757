"""Sentences of English that every machine has: the first ones of the docstrings of Python's standard library."""

import ast
import re
from functools import cache
from pathlib import Path

import numpy as np

from sparsejax.data.stdlib import files

WORDS = (5, 40)  # shorter ones are titles, longer ones are lists


def sentences(split: str, count: int, seed: int, data_dir: str | None = None) -> list[str]:
    """`count` different sentences in a random order.

    Args:
      split: "train" or "test"; no file is in both, see `sparsejax.data.stdlib`, and no sentence of "train" in "test".
      seed: which ones, and their order.
      data_dir: read the `.py` files of this folder instead.

    Raises:
      FileNotFoundError: if the folder has no `.py` files.
      ValueError: for an unknown split, a file that is not Python (named), or if there are fewer sentences.
    """
    found = _of_split(split, data_dir)
    if not 1 <= count <= len(found):
        raise ValueError(f"the {split} split has {len(found)} sentences; between one and so many can be asked, got {count}")
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]


@cache
def _of_split(split: str, data_dir: str | None) -> list[str]:
    found = {text for path in files(split, data_dir) for text in _of_file(path)}
    return sorted(found.difference(_of_split("train", data_dir) if split == "test" else ()))


def _of_file(path: Path):
    """The first sentence of every docstring that has a usual length."""
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not Python: {error}") from error
    for node in ast.walk(module):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?]) ", paragraph)[0]
        if WORDS[0] <= len(sentence.split()) <= WORDS[1]:
            yield sentence
