"""Classification problems of any size, drawn from a seed."""

import numpy as np

from sparsejax.data.dataset import Dataset
from sparsejax.masks import choose


def synthetic(
    data_dir=None,
    *,
    examples: int = 4096,
    features: int = 64,
    classes: int = 10,
    kind: str = "clusters",
    spread: float = 1.0,
    hidden: int = 32,
    test_fraction: float = 0.25,
    data_seed: int = 0,
) -> Dataset:
    """A seeded classification problem.

    Args:
      data_dir: unused; every loader takes it.
      examples: size of the training and test split together.
      features: input dimensions.
      classes: number of classes.
      kind: "clusters", one Gaussian ball of standard deviation `spread` per class around standard normal
        centres, equally many examples each; or "teacher", Gaussian inputs labelled by the largest output of a
        random two-layer ReLU network with `hidden` units.
      spread: standard deviation of a cluster.
      hidden: hidden units of the teacher.
      test_fraction: fraction of the examples in the test split.
      data_seed: everything is a pure function of it and the other arguments.

    Raises:
      ValueError: for an unknown kind, or if a split would be empty.
    """
    held_out = round(test_fraction * examples)
    if not 0 < held_out < examples:
        raise ValueError(f"test_fraction={test_fraction} of examples={examples} leaves a split empty")
    rng = np.random.default_rng(data_seed)
    if choose("kind of synthetic data", kind, ("clusters", "teacher")) == "clusters":
        x, y = _clusters(rng, examples, features, classes, spread)
    else:
        x, y = _teacher(rng, examples, features, classes, hidden)
    return Dataset("synthetic", (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out]), classes)


def _clusters(rng, examples, features, classes, spread):
    centres = rng.standard_normal((classes, features))
    y = rng.permutation(np.arange(examples) % classes)
    return centres[y] + spread * rng.standard_normal((examples, features)), y


def _teacher(rng, examples, features, classes, hidden):
    first = rng.standard_normal((features, hidden)) / np.sqrt(features)
    second = rng.standard_normal((hidden, classes))
    # Centred outputs keep the classes of similar size: without it the largest mean would win most examples.
    x = rng.standard_normal((examples, features))
    outputs = np.maximum(x @ first, 0.0) @ second
    return x, np.argmax(outputs - outputs.mean(0), axis=-1)
