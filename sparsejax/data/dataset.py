"""What a data set is once it is in memory, and the steps every loader shares."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ENVIRONMENT = "SPARSEJAX_DATA"
SYSTEM_FOLDER = Path("/usr/share/datasets")

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
      name: the name it was loaded by.
      train, test: pairs `(x, y)`. `x` is float32, standardised: images `(n, height, width, channels)` or
        features `(n, features)`. `y` is int32 labels `(n,)`, or float32 targets `(n, targets)`. Of sequences,
        `x` and `y` are int32 tokens `(n, length)`.
      classes: the number of classes, or None for regression.
      validation: a pair `(x, y)` held out of the training split, or None.
    """

    name: str
    train: Split
    test: Split
    classes: int | None
    validation: Split | None = None

    @property
    def outputs(self) -> int:
        """The width of a model's last layer: the number of classes, or of regression targets."""
        return self.train[1].shape[-1] if self.classes is None else self.classes


def hold_out(data: Dataset, validation: int, limit: int | None) -> Dataset:
    """Moves the last `validation` training examples to a validation split and keeps the first `limit` others.

    Raises:
      ValueError: if this asks for more training examples than there are, or leaves none.
    """
    x, y = data.train
    left = len(x) - validation
    if validation < 0 or left < 1:
        raise ValueError(
            f"validation={validation} must be in [0, {len(x) - 1}], "
            f"the training examples of {data.name} but one"
        )
    limit = left if limit is None else limit
    if not 1 <= limit <= left:
        raise ValueError(f"limit={limit} must be in [1, {left}], the training examples of {data.name}")
    held_out = (x[left:], y[left:]) if validation else None
    return replace(data, train=(x[:limit], y[:limit]), validation=held_out)


def standardise(data: Dataset) -> Dataset:
    """Gives every split zero mean and unit variance in the units of the *training* split; not to tokens.

    The moments are per channel for images and per feature otherwise; a constant feature is only centred.
    Regression targets are standardised too, so that a mean squared error of 1 is what the training mean
    scores, whatever the unit of the targets.
    """
    if np.issubdtype(data.train[0].dtype, np.signedinteger):  # tokens; images come as uint8
        return data
    scale_x = _standardiser(data.train[0])
    scale_y = _standardiser(data.train[1]) if data.classes is None else lambda y: y.astype(np.int32)

    def convert(split):
        return None if split is None else (scale_x(split[0]), scale_y(split[1]))

    return replace(
        data, train=convert(data.train), test=convert(data.test), validation=convert(data.validation)
    )


def _standardiser(values: np.ndarray):
    axes = tuple(range(values.ndim - 1))
    mean = values.mean(axes, dtype=np.float64)
    deviation = values.std(axes, dtype=np.float64)
    deviation = np.where(deviation > 1e-12 * np.maximum(1.0, np.abs(mean)), deviation, 1.0)
    mean, deviation = mean.astype(np.float32), deviation.astype(np.float32)

    def apply(array):
        out = array.astype(np.float32)
        out -= mean
        out /= deviation
        return out

    return apply


def check_labels(labels: np.ndarray, classes: int, path: Path) -> np.ndarray:
    """The labels, or one sentence that names the file whose labels are out of range."""
    if labels.max() >= classes:
        raise ValueError(f"{path} is corrupted: it has label {labels.max()}, but labels are below {classes}")
    return labels


def find_folder(title: str, subfolder: str, files: Sequence[str], data_dir, advice: str) -> Path:
    """The first folder that holds all of `files`, each plain or with the suffix `.gz`.

    Args:
      title: the data set's name in the error.
      subfolder: the folder's usual name; each place is tried itself and with this subfolder.
      files: the names of the files.
      data_dir: the place to look first (or None), before `$SPARSEJAX_DATA` and `/usr/share/datasets`.
      advice: how to get the data, the end of the error's sentence.

    Raises:
      FileNotFoundError: if no folder has all the files.
    """
    places = [Path(p).expanduser() for p in (data_dir, os.environ.get(ENVIRONMENT), SYSTEM_FOLDER) if p]
    folders = [folder for place in places for folder in (place, place / subfolder)]
    for folder in folders:
        if all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in files):
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"{title} was not found: looked for {files[0]} and its companions in {looked} "
        f"(data_dir, ${ENVIRONMENT}, then {SYSTEM_FOLDER}); {advice}"
    )
