"""Data sets: shapes, moments, split, files read as their formats say, and the messages for bad ones."""

import gzip
import struct

import numpy as np
import pytest
import sklearn.datasets

from sparsejax.data import DATASETS, load
from sparsejax.data.cifar import read_records
from sparsejax.data.dataset import SYSTEM_FOLDER
from sparsejax.data.fashion_mnist import read_idx

BUNDLED = {  # examples, shape of one x, classes or targets
    "digits": (1797, (8, 8, 1), 10),
    "iris": (150, (4,), 3),
    "wine": (178, (13,), 3),
    "breast_cancer": (569, (30,), 2),
    "diabetes": (442, (10,), 1),
    "linnerud": (20, (3,), 3),
}
REGRESSION = ("diabetes", "linnerud")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_shapes_and_moments(name):
    examples, shape, outputs = BUNDLED[name]
    data = load(name)
    (x, y), (x_test, y_test) = data.train, data.test
    assert len(x) + len(x_test) == examples and x.shape[1:] == x_test.shape[1:] == shape
    assert abs(len(x_test) - 0.4 * examples) < 1
    assert x.dtype == x_test.dtype == np.float32
    assert data.validation is None and data.outputs == outputs
    axes = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(x.mean(axes), 0.0, atol=1e-4)
    np.testing.assert_allclose(x.std(axes), 1.0, atol=1e-4)
    # Only the training split is standardised exactly: the test split keeps its own moments.
    assert np.abs(x_test.mean(axes)).max() > 1e-4
    if name in REGRESSION:
        assert data.classes is None and y.dtype == np.float32 and y.shape == (len(x), outputs)
        np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-4)
    else:
        assert data.classes == outputs and y.dtype == np.int32 and y.shape == (len(x),)
        share = np.bincount(y, minlength=outputs) / len(y)
        np.testing.assert_allclose(np.bincount(y_test, minlength=outputs) / len(y_test), share, atol=0.02)


def test_digits_are_the_digits_of_scikit_learn():
    raw, labels = sklearn.datasets.load_digits(return_X_y=True)
    data = load("digits")
    images = np.concatenate([data.train[0], data.test[0]]).reshape(len(raw), 64)
    # Undo the standardisation with the smallest and largest pixel, 0 and 16, and match images as a set.
    scale = 16.0 / (images.max() - images.min())
    pixels = np.rint((images - images.min()) * scale)
    ours = sorted(map(tuple, np.c_[pixels, np.concatenate([data.train[1], data.test[1]])]))
    assert ours == sorted(map(tuple, np.c_[raw, labels]))


def test_split_depends_on_its_seed_and_fraction_only():
    first, again, other = load("iris"), load("iris"), load("iris", split_seed=1)
    np.testing.assert_array_equal(first.train[0], again.train[0])
    assert not np.array_equal(first.train[0], other.train[0])
    assert len(load("iris", test_fraction=0.2).test[0]) == 30


def test_limit_and_validation_partition_the_training_split():
    whole, part = load("digits"), load("digits", validation=78, limit=500)
    assert len(part.train[0]) == 500 and len(part.validation[0]) == 78 and len(part.test[0]) == 719
    np.testing.assert_array_equal(part.train[1], whole.train[1][:500])
    np.testing.assert_array_equal(part.validation[1], whole.train[1][-78:])
    np.testing.assert_allclose(part.train[0].mean(), 0.0, atol=1e-5)


def test_synthetic_clusters_are_separable_as_the_spread_says():
    data = load("synthetic", examples=400, features=16, classes=4, spread=0.1)
    (x, y), (x_test, y_test) = data.train, data.test
    assert x.shape == (300, 16) and x_test.shape == (100, 16) and data.classes == 4
    assert np.bincount(np.concatenate([y, y_test])).tolist() == [100] * 4
    centres = np.stack([x[y == c].mean(0) for c in range(4)])
    nearest = np.linalg.norm(x_test[:, None] - centres, axis=-1).argmin(-1)
    assert (nearest == y_test).all()


@pytest.mark.parametrize("kind", ["clusters", "teacher"])
def test_synthetic_is_a_function_of_its_seed(kind):
    first, again, other = (load("synthetic", kind=kind, examples=200, data_seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(first.train[0], again.train[0])
    np.testing.assert_array_equal(first.train[1], again.train[1])
    assert not np.array_equal(first.train[1], other.train[1])
    assert len(np.unique(first.train[1])) > 5


# --- files -------------------------------------------------------------------------------------------


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion(tmp_path):
    """A folder with a tiny Fashion-MNIST, gzipped training files and plain test files."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count, suffix in (("train", 12, ".gz"), ("t10k", 5, "")):
        arrays[split] = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", arrays[split][0])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", arrays[split][1])
    return tmp_path, arrays


def test_fashion_mnist_reads_idx_files(fashion, monkeypatch):
    folder, arrays = fashion
    images, labels = arrays["train"]
    data = load("fashion_mnist", folder)
    expected = ((images - images.mean()) / images.std())[..., None]
    np.testing.assert_allclose(data.train[0], expected, atol=1e-5)
    np.testing.assert_array_equal(data.train[1], labels)
    test = ((arrays["t10k"][0] - images.mean()) / images.std())[..., None]
    np.testing.assert_allclose(data.test[0], test, atol=1e-5)
    monkeypatch.setenv("SPARSEJAX_DATA", str(folder))
    np.testing.assert_array_equal(load("fashion_mnist").train[0], data.train[0])


def test_fashion_mnist_corrupted_files_are_named(fashion):
    folder, _ = fashion
    images = folder / "train-images-idx3-ubyte.gz"
    good = images.read_bytes()
    images.write_bytes(good[: len(good) // 2])
    with pytest.raises(
        ValueError, match="train-images-idx3-ubyte.gz cannot be read, it is corrupted or truncated"
    ):
        load("fashion_mnist", folder)
    images.write_bytes(gzip.compress(gzip.decompress(good)[:-1]))
    with pytest.raises(ValueError, match=r"announces the shape \(12, 28, 28\), but 9407 bytes follow"):
        load("fashion_mnist", folder)
    images.write_bytes(gzip.compress(b"<html>not an idx file</html>"))
    with pytest.raises(ValueError, match="is not an idx file of bytes with 3 axes: it starts with b'<htm'"):
        load("fashion_mnist", folder)
    write_idx(images, np.zeros((11, 28, 28)))
    with pytest.raises(ValueError, match="has 12 labels, but .* has 11 images"):
        load("fashion_mnist", folder)
    images.write_bytes(good)
    write_idx(folder / "t10k-labels-idx1-ubyte", np.full(5, 10))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is corrupted: it has label 10"):
        load("fashion_mnist", folder)


def test_missing_data_set_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsejax.data.dataset.SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError) as error:
        load("fashion_mnist", tmp_path / "here")
    message = str(error.value)
    for place in ("here", "mine", "system", "dataset-fashion-mnist", "SPARSEJAX_DATA"):
        assert place in message
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match="CIFAR-10 was not found: .*cifar-10-binary.tar.gz"):
        load("cifar10", tmp_path)


def test_real_fashion_mnist():
    try:
        data = load("fashion_mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert data.train[0].shape == (60000, 28, 28, 1) and data.test[0].shape == (10000, 28, 28, 1)
    assert np.bincount(data.train[1]).tolist() == [6000] * 10
    # The published mean and deviation of the training pixels are 0.2860 and 0.3530 of full scale.
    black = data.train[0].min()
    np.testing.assert_allclose(black, -0.2860 / 0.3530, atol=1e-3)


def test_idx_files_of_the_system_are_found_where_debian_puts_them():
    path = SYSTEM_FOLDER / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist: the Debian package dataset-fashion-mnist is not installed")
    # The first test images: ankle boot, pullover, trouser, trouser, shirt.
    assert read_idx(path, axes=1)[:5].tolist() == [9, 2, 1, 1, 6]


def cifar_record(labels, image):
    """The published format: labels, then red, green and blue planes, each row by row."""
    return bytes(labels) + image.transpose(2, 0, 1).astype(np.uint8).tobytes()


def test_cifar10_reads_binary_files(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 32, 32, 3)), rng.integers(0, 10, 12)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for i, name in enumerate(names):
        pair = range(2 * i, 2 * i + 2)
        (folder / name).write_bytes(b"".join(cifar_record([labels[j]], images[j]) for j in pair))
    for place in (tmp_path, folder):
        data = load("cifar10", place)
        mean, deviation = images[:10].mean((0, 1, 2)), images[:10].std((0, 1, 2))
        np.testing.assert_allclose(data.train[0], (images[:10] - mean) / deviation, atol=1e-5)
        np.testing.assert_allclose(data.test[0], (images[10:] - mean) / deviation, atol=1e-5)
        assert data.train[1].tolist() == labels[:10].tolist() and data.test[1].dtype == np.int32
        assert data.classes == 10


def test_cifar100_uses_fine_labels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    (tmp_path / "train.bin").write_bytes(cifar_record([3, 99], image) + cifar_record([7, 41], image[::-1]))
    (tmp_path / "test.bin").write_bytes(cifar_record([0, 5], image))
    data = load("cifar100", tmp_path)
    assert data.train[1].tolist() == [99, 41] and data.test[1].tolist() == [5] and data.classes == 100
    np.testing.assert_array_equal(data.train[0][0], data.train[0][1][::-1])


def test_cifar_corrupted_files_are_named(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="data_batch_1.bin is corrupted or truncated: its 3072 bytes"):
        read_records(path, labels=1, classes=10)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="its 0 bytes are not one or more records of 3073"):
        read_records(path, labels=1, classes=10)
    path.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match="data_batch_1.bin is corrupted: it has label 10"):
        read_records(path, labels=1, classes=10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"name": "mnist"}, ", ".join(sorted(DATASETS))),
        (
            {"name": "digits", "test_fracton": 0.5},
            "unknown keyword of data set 'digits': 'test_fracton'; did you",
        ),
        ({"name": "digits", "test_fraction": 1.5}, r"test_fraction=1.5 must be in \(0, 1\)"),
        ({"name": "digits", "limit": 5000}, r"limit=5000 must be in \[1, 1078\]"),
        ({"name": "iris", "validation": 90}, r"validation=90 must be in \[0, 89\]"),
        ({"name": "synthetic", "kind": "cluster"}, "unknown kind of synthetic data 'cluster'; did you mean"),
        ({"name": "synthetic", "examples": 1}, "test_fraction=0.25 of examples=1 leaves a split empty"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_stdlib_is_source_code_with_next_bytes(tmp_path):
    data = load("stdlib", length=32, size=20_000)
    x, y = data.train
    assert x.shape == y.shape == (625, 32) and x.dtype == np.int32 and data.classes == 256
    np.testing.assert_array_equal(x.ravel()[1:], y.ravel()[:-1])
    assert "import" in bytes(x.ravel().astype(np.uint8)).decode(errors="replace")
    for index in range(30):
        (tmp_path / f"{index:02d}.py").write_bytes(bytes([index]) * 100)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.py").write_bytes(bytes([200]) * 100)
    mine = load("stdlib", tmp_path, length=10, size=100_000)
    assert set(np.unique(mine.test[0])) == {0, 10, 20}
    assert set(np.unique(mine.train[0])) == set(range(30)) - {0, 10, 20}


def test_mistakes_about_stdlib(tmp_path):
    with pytest.raises(FileNotFoundError, match="has 0 Python files"):
        load("stdlib", tmp_path)
    with pytest.raises(ValueError, match=r"length >= 1 and size >= 10 \(length \+ 1\), got 100 and 50"):
        load("stdlib", length=100, size=50)
