"""The data sets that come with scikit-learn: small, real, and available everywhere.

None has an official split, so a seeded one is drawn (stratified by class for classification).
"""

import numpy as np

from sparsejax.data.dataset import Dataset


def digits(data_dir=None, *, test_fraction: float = 0.4, split_seed: int = 0) -> Dataset:
    """1797 handwritten digits, images of 8x8x1, 10 classes."""
    return _load("digits", test_fraction, split_seed, classes=10, shape=(8, 8, 1))


def iris(data_dir=None, *, test_fraction: float = 0.4, split_seed: int = 0) -> Dataset:
    """150 flowers, 4 features, 3 classes."""
    return _load("iris", test_fraction, split_seed, classes=3)


def wine(data_dir=None, *, test_fraction: float = 0.4, split_seed: int = 0) -> Dataset:
    """178 wines, 13 features, 3 classes."""
    return _load("wine", test_fraction, split_seed, classes=3)


def breast_cancer(data_dir=None, *, test_fraction: float = 0.4, split_seed: int = 0) -> Dataset:
    """569 tumours, 30 features, 2 classes."""
    return _load("breast_cancer", test_fraction, split_seed, classes=2)


def diabetes(data_dir=None, *, test_fraction: float = 0.4, split_seed: int = 0) -> Dataset:
    """Regression: 442 patients, 10 features, 1 target."""
    return _load("diabetes", test_fraction, split_seed, classes=None)


def linnerud(data_dir=None, *, test_fraction: float = 0.4, split_seed: int = 0) -> Dataset:
    """Regression: 20 men, 3 features, 3 targets."""
    return _load("linnerud", test_fraction, split_seed, classes=None)


def _load(name, test_fraction, split_seed, *, classes, shape=None) -> Dataset:
    # Imported here because scikit-learn takes a second to load, which the other data sets need not pay.
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction={test_fraction} must be in (0, 1)")
    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    if shape is not None:
        x = x.reshape(-1, *shape)
    if classes is None:
        y = np.reshape(y, (len(x), -1))
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=test_fraction, random_state=split_seed, stratify=None if classes is None else y
    )
    return Dataset(name, (x_train, y_train), (x_test, y_test), classes)
