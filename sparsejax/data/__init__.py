"""Data sets by name: `load("digits")`.

Those bundled with scikit-learn and the synthetic ones need no file; the others are read from `data_dir`, the
folder in the environment variable `SPARSEJAX_DATA`, or `/usr/share/datasets`. Nothing is ever downloaded.
"""

import inspect

from sparsejax.data.bundled import breast_cancer, diabetes, digits, iris, linnerud, wine
from sparsejax.data.cifar import cifar10, cifar100
from sparsejax.data.dataset import Dataset, hold_out, standardise
from sparsejax.data.dynamics import lorenz, lotka_volterra
from sparsejax.data.fashion_mnist import fashion_mnist
from sparsejax.data.stdlib import stdlib
from sparsejax.data.synthetic import synthetic
from sparsejax.masks import choose

DATASETS = {
    "breast_cancer": breast_cancer,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "diabetes": diabetes,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "iris": iris,
    "linnerud": linnerud,
    "lorenz": lorenz,
    "lotka_volterra": lotka_volterra,
    "stdlib": stdlib,
    "synthetic": synthetic,
    "wine": wine,
}


def load(name: str, data_dir=None, *, limit: int | None = None, validation: int = 0, **kw) -> Dataset:
    """The data set called `name`, standardised by the moments of its training split.

    Args:
      name: a key of `DATASETS`.
      data_dir: a folder to look in first, for the data sets that are read from files.
      limit: keep only the first `limit` training examples (the test split stays whole).
      validation: hold this many training examples out, in `Dataset.validation`.
      **kw: keywords of that data set's loader.

    Raises:
      ValueError: for an unknown name or keyword, a corrupted file, or sizes that do not fit.
      FileNotFoundError: if the files of a data set are missing.
    """
    loader = choose("data set", name, DATASETS)
    known = [key for key in inspect.signature(loader).parameters if key != "data_dir"]
    for key in kw:
        choose(f"keyword of data set {name!r}:", key, [*known, "limit", "validation"])
    return standardise(hold_out(loader(data_dir, **kw), validation, limit))


__all__ = ["DATASETS", "Dataset", "load"]
