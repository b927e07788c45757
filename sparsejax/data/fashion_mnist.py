"""Fashion-MNIST (Xiao et al. 2017): 60000 + 10000 grey images of 28x28, 10 classes, from its idx files.

An idx file is a magic number (two zero bytes, the type, the number of axes), the big-endian 32-bit size of
every axis, and the bytes in row-major order; it may be gzipped.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from sparsejax.data.dataset import Dataset, check_labels, find_folder

CLASSES = 10
IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
ADVICE = (
    "install the Debian package dataset-fashion-mnist, or put its four idx files "
    "(https://github.com/zalandoresearch/fashion-mnist) in a folder and pass it as data_dir"
)
UNSIGNED_BYTE = 8


def fashion_mnist(data_dir=None) -> Dataset:
    """Fashion-MNIST from `data_dir`, `$SPARSEJAX_DATA` or `/usr/share/datasets/fashion-mnist`.

    Raises:
      FileNotFoundError: if the files are in none of these places.
      ValueError: if a file is corrupted or truncated.
    """
    files = [name.format(split) for split in ("train", "t10k") for name in (IMAGES, LABELS)]
    folder = find_folder("Fashion-MNIST", "fashion-mnist", files, data_dir, ADVICE)
    return Dataset("fashion_mnist", _split(folder, "train"), _split(folder, "t10k"), CLASSES)


def _split(folder: Path, split: str):
    images_path, labels_path = (_existing(folder / name.format(split)) for name in (IMAGES, LABELS))
    images, labels = read_idx(images_path, axes=3), read_idx(labels_path, axes=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path} has {len(labels)} labels, but {images_path} has {len(images)} images"
        )
    return images[..., None], check_labels(labels, CLASSES, labels_path)


def _existing(path: Path) -> Path:
    return path if path.exists() else path.with_name(f"{path.name}.gz")


def read_idx(path, axes: int) -> np.ndarray:
    """The uint8 array in an idx file, gzipped if its name ends in `.gz`.

    Args:
      path: the file.
      axes: how many axes the array must have.

    Raises:
      ValueError: if the file is not a complete idx file of bytes with that many axes.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read, it is corrupted or truncated: {error}") from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes((0, 0, UNSIGNED_BYTE, axes)):
        raise ValueError(f"{path} is not an idx file of bytes with {axes} axes: it starts with {data[:4]!r}")
    shape = struct.unpack(f">{axes}I", data[4:start])
    if len(data) - start != np.prod(shape) or 0 in shape:
        raise ValueError(
            f"{path} is corrupted or truncated: its header announces the shape {shape}, "
            f"but {len(data) - start} bytes follow"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
