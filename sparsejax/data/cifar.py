"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their published *binary* files.

Each has 50000 + 10000 colour images of 32x32.

A record is the label (CIFAR-100: the coarse label, then the fine one) and 3072 bytes, channel by channel.
"""

from pathlib import Path

import numpy as np

from sparsejax.data.dataset import Dataset, check_labels, find_folder

SHAPE = (3, 32, 32)
ADVICE = (
    "get {archive} from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, "
    "and pass the folder as data_dir"
)


def cifar10(data_dir=None) -> Dataset:
    """CIFAR-10 from the folder `cifar-10-batches-bin`: 10 classes.

    Raises:
      FileNotFoundError: if the files are not in `data_dir`, `$SPARSEJAX_DATA` or `/usr/share/datasets`.
      ValueError: if a file is corrupted or truncated.
    """
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    advice = ADVICE.format(archive="cifar-10-binary.tar.gz")
    folder = find_folder("CIFAR-10", "cifar-10-batches-bin", [*train, "test_batch.bin"], data_dir, advice)
    parts = [read_records(folder / name, labels=1, classes=10) for name in train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test = read_records(folder / "test_batch.bin", labels=1, classes=10)
    return Dataset("cifar10", (images, labels), test, 10)


def cifar100(data_dir=None) -> Dataset:
    """CIFAR-100 with its fine labels, from the folder `cifar-100-binary`: 100 classes.

    Raises:
      FileNotFoundError: if the files are not in `data_dir`, `$SPARSEJAX_DATA` or `/usr/share/datasets`.
      ValueError: if a file is corrupted or truncated.
    """
    advice = ADVICE.format(archive="cifar-100-binary.tar.gz")
    folder = find_folder("CIFAR-100", "cifar-100-binary", ["train.bin", "test.bin"], data_dir, advice)
    train, test = (read_records(folder / f"{s}.bin", labels=2, classes=100) for s in ("train", "test"))
    return Dataset("cifar100", train, test, 100)


def read_records(path, labels: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The images `(n, 32, 32, 3)` and labels `(n,)` of one binary file, both uint8.

    Args:
      path: the file.
      labels: how many label bytes a record starts with; the last one is used.
      classes: labels must be below this.

    Raises:
      ValueError: if the file is empty, not a whole number of records, or has a label out of range.
    """
    path = Path(path)
    size = labels + int(np.prod(SHAPE))
    data = np.fromfile(path, np.uint8)
    if not data.size or data.size % size:
        raise ValueError(
            f"{path} is corrupted or truncated: its {data.size} bytes are not one or more records of {size}"
        )
    records = data.reshape(-1, size)
    images = records[:, labels:].reshape(-1, *SHAPE).transpose(0, 2, 3, 1)
    return images, check_labels(records[:, labels - 1], classes, path)
