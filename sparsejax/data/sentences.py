"""Sentences of English that every machine has: the first ones of the docstrings of Python's standard library."""

import ast
import re

import numpy as np

from sparsejax.data.stdlib import files

WORDS = (5, 40)  # shorter ones are titles, longer ones are lists


def sentences(split: str, count: int, seed: int, data_dir: str | None = None) -> list[str]:
    """`count` different sentences in a random order.

    Args:
      split: "train" or "test"; no file is in both, see `sparsejax.data.stdlib`.
      seed: which ones, and their order.
      data_dir: read the `.py` files of this folder instead.

    Raises:
      FileNotFoundError: if the folder has no `.py` files.
      ValueError: for an unknown split, or if there are fewer sentences.
    """
    found = sorted({text for path in files(split, data_dir) for text in _of_file(path.read_bytes())})
    if not 1 <= count <= len(found):
        raise ValueError(f"the {split} split has {len(found)} sentences; between one and so many can be asked, got {count}")
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]


def _of_file(source: bytes):
    """The first sentence of every docstring that has a usual length."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?]) ", paragraph)[0]
        if WORDS[0] <= len(sentence.split()) <= WORDS[1]:
            yield sentence
