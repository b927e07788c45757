"""Packed trees survive safetensors files bit for bit, and broken files are one sentence."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax.core import freeze

import sparsejax
from sparsejax import formats, patterns

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def tree(dtype):
    w = jax.random.normal(jax.random.key(0), (16, 24)).astype(dtype)
    scores = jnp.abs(w)
    free = patterns.Unstructured()
    params = {
        "nm": {"kernel": w, "bias": jnp.arange(24.0).astype(dtype)},
        "block": {"kernel": w},
        "deep": {"er": {"bitmap": w.at[0, 0].set(-0.0).at[0, 1].set(jnp.nan), "csr": w}},
        "conv": w.reshape(2, 2, 4, 24),
        "count": jnp.asarray(3),
    }
    masks = {
        "nm": {"kernel": patterns.NM(2, 4).mask(scores), "bias": jnp.asarray(True)},
        "block": {"kernel": patterns.Block((8, 12)).mask(scores, 0.5)},
        "deep": {"er": {"bitmap": free.mask(scores, 0.5).at[0, :2].set(True), "csr": free.mask(scores, 0.9)}},
        "conv": patterns.NM(1, 4).mask(scores.reshape(2, 2, 4, 24)),
        "count": jnp.asarray(True),
    }
    return sparsejax.pack(params, masks, {"deep/er/bitmap": "bitmap", "deep/er/csr": "csr"})[0]


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    packed = tree(dtype)
    kinds = {type(leaf) for leaf in jax.tree.leaves(packed, is_leaf=formats.is_packed)}
    assert kinds >= set(formats.FORMATS.values())
    formats.save(tmp_path / "model.safetensors", packed)
    loaded = formats.load(tmp_path / "model.safetensors")
    assert_identical(loaded, packed)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    formats.save(tmp_path / "frozen.safetensors", freeze(packed))
    assert_identical(formats.load(tmp_path / "frozen.safetensors"), packed)


def test_what_other_readers_see(tmp_path):
    packed = tree(jnp.bfloat16)
    formats.save(tmp_path / "model.safetensors", packed)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="np") as file:
        names, metadata = set(file.keys()), file.metadata()
        values = file.get_tensor("nm/kernel/values")
    assert names == set(sparsejax.masks.flatten(packed))
    np.testing.assert_array_equal(values, packed["nm"]["kernel"].values)
    header = json.loads(metadata["sparsejax.formats"])
    assert header["version"] == 1
    assert header["arrays"]["nm/kernel"] == {
        "format": "nm",
        "shape": [16, 24],
        "n": 2,
        "m": 4,
        "dtype": "bfloat16",
    }
    assert header["arrays"]["block/kernel"]["block"] == [8, 12]
    assert header["arrays"]["conv"]["shape"] == [2, 2, 4, 24]


def test_files_of_others_are_dense_trees(tmp_path):
    tensors = {"a/kernel": np.eye(3, dtype=np.float32), "b": np.arange(3, dtype=np.int32)}
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    assert_identical(
        formats.load(tmp_path / "other.safetensors"),
        {"a": {"kernel": jnp.eye(3)}, "b": jnp.arange(3, dtype=jnp.int32)},
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": [jnp.ones(2)]}, "['a'][0] cannot be saved: trees must be nested dicts"),
        ({"a/b": jnp.ones(2)}, "['a/b'] cannot be saved"),
        ({3: jnp.ones(2)}, "[3] cannot be saved"),
        (jnp.ones(2), "a single leaf cannot be saved"),
        ({}, "a tree without leaves cannot be saved"),
        (
            {"a": jnp.ones(2, jnp.float8_e4m3fn)},
            "a has dtype float8_e4m3fn, which cannot be saved (known: bool, bf",
        ),
        ({"a": jax.random.key(0)}, "a has dtype key<fry>, which cannot be saved (known: bool, bf"),
        ({"a": np.ones(1)}, "a is float64, which could be loaded only with jax_enable_x64"),
        ({"a": 1}, "a is int64, which could be loaded only with jax_enable_x64"),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        formats.save(tmp_path / "bad.safetensors", bad)


def broken(tmp_path, change):
    """Saves a 2:4 array after `change(tensors, about, header)`."""
    path = tmp_path / "broken.safetensors"
    formats.save(path, {"k": formats.pack(jnp.ones((4, 2)), np.arange(8).reshape(4, 2) < 4, "2:4")})
    with safetensors.safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["sparsejax.formats"])
    change(tensors, header["arrays"]["k"], header)
    safetensors.numpy.save_file(tensors, path, metadata={"sparsejax.formats": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a, h: t.pop("k/indices"), "k in the file lacks k/indices"),
        (lambda t, a, h: a.pop("m"), "k in the file lacks m"),
        (lambda t, a, h: a.update(format="nmm"), "unknown format of k 'nmm'; did you mean 'nm'?"),
        (
            lambda t, a, h: a.update(dtype="float16"),
            "k in the file should be float16, but its values are float32",
        ),
        (
            lambda t, a, h: a.update(shape=[8, 2]),
            "values of k must have shape (4, 2), but its shape is (2, 2)",
        ),
        (lambda t, a, h: t["k/indices"].fill(1), "indices of k do not ascend inside every group of 2:4"),
        (lambda t, a, h: h.update(version=2), "has version 2 of packed formats, but this is 1"),
        (lambda t, a, h: h.pop("version"), "must be an object with a version and an object of arrays"),
        (lambda t, a, h: h.pop("arrays"), "must be an object with a version and an object of arrays"),
        (lambda t, a, h: h.update(arrays=[]), "must be an object with a version and an object of arrays"),
        (lambda t, a, h: h["arrays"].update(k=[1]), "must say what k is in an object, got [1]"),
        (lambda t, a, h: h["arrays"].update(k=None), "must say what k is in an object, got None"),
        (lambda t, a, h: a.update(format=[1]), "unknown format of k [1]"),
        (lambda t, a, h: a.update(dtype=[1]), "k in the file should be [1], but its values are float32"),
        *(
            (
                lambda t, a, h, wrong=wrong: a.update(shape=wrong),
                f"shape of k must be a list of integers, got {wrong!r}",
            )
            for wrong in (4, None, "44", ["4", 4], [[4], 4], [4.0, 2], [True, 2])
        ),
        *(
            (
                lambda t, a, h, wrong=wrong: a.update(shape=wrong),
                "the shape of k must have at least one axis and from 1 ",
            )
            for wrong in ([], [-4, -2], [4, 0], [2**40, 2])
        ),
        *(
            (lambda t, a, h, wrong=wrong: a.update(n=wrong), f"n of k must be an integer, got {wrong!r}")
            for wrong in ("2", None, 2.0, [2], True)
        ),
        (
            lambda t, a, h: a.update(m=2**70),
            "k cannot be packed as 2:1180591620717411303424: m must be a power",
        ),
        (
            lambda t, a, h: t.update({"k/x": np.ones(1)}),
            "k/x in the file is float64, which needs jax_enable_x64",
        ),
        (lambda t, a, h: t.update({"k/x": np.ones(1, "f4")}), "holds an array k and others inside its path"),
    ],
)
def test_broken_files(tmp_path, change, message):
    assert message in refusal(broken(tmp_path, change))


def refusal(path):
    """The sentence with which a file is refused, which names it."""
    with pytest.raises(ValueError) as error:
        formats.load(path)
    start = f"{path} cannot be loaded: "
    assert str(error.value).startswith(start) and "\n" not in str(error.value)
    return str(error.value)[len(start) :]


@pytest.mark.parametrize(
    ("about", "leaves", "message"),
    [
        (
            {"format": "bitmap", "shape": [-2, -2]},
            {"bitmap": np.ones(1, np.uint8)},
            "the shape of k must have at",
        ),
        (
            {"format": "csr", "shape": [2**33, 2]},
            {"inputs": "i4", "indptr": "i4"},
            "the shape of k must have at ",
        ),
        (
            {"format": "csr", "shape": [2**62, 4]},
            {"inputs": "i4", "indptr": "i4"},
            "the shape of k must have at ",
        ),
        (
            {"format": "csr", "shape": [4, -1]},
            {"inputs": "u2", "indptr": "i4"},
            "the shape of k must have at ",
        ),
        (
            {"format": "block", "shape": [2, 2], "block": [2, 2]},
            {"blocks": np.ones((1, 1, 2, 2), "f4"), "indices": np.zeros((), "i4")},
            "indices of k must have shape (1, 1), but its shape is ()",
        ),
        (
            {"format": "block", "shape": [2, 2], "block": [2, 2]},
            {"blocks": np.ones((2, 2), "f4"), "indices": np.zeros((1, 1), "i4")},
            "blocks of k must have shape (1, 1, 2, 2), but its shape is (2, 2)",
        ),
        (
            {"format": "block", "shape": [4, 0], "block": [2, 2]},
            {"blocks": np.ones((0, 1, 2, 2), "f4"), "indices": np.zeros((0, 1), "i4")},
            "the shape of k must have at least one axis",
        ),
        (
            {"format": "block", "shape": [2, 2], "block": [2.0, 2]},
            {"blocks": np.ones((1, 1, 2, 2), "f4"), "indices": np.zeros((1, 1), "i4")},
            "block of k must be a list of integers, got [2.0, 2]",
        ),
    ],
)
def test_hostile_metadata(tmp_path, about, leaves, message):
    leaves = {name: np.ones(2, leaf) if isinstance(leaf, str) else leaf for name, leaf in leaves.items()}
    if "blocks" not in leaves:
        leaves["data"] = np.ones(2, "f4")
    header = {"version": 1, "arrays": {"k": {"dtype": "float32", **about}}}
    path = tmp_path / "hostile.safetensors"
    tensors = {f"k/{name}": leaf for name, leaf in leaves.items()}
    safetensors.numpy.save_file(tensors, path, metadata={"sparsejax.formats": json.dumps(header)})
    assert refusal(path).startswith(message)


def test_metadata_that_is_no_object(tmp_path):
    path = tmp_path / "text.safetensors"
    for text in ("{", "[]", "null", "1" * 5000, "[" * 10**5):
        safetensors.numpy.save_file({"a": np.ones(1, "f4")}, path, metadata={"sparsejax.formats": text})
        assert refusal(path).startswith("its metadata sparsejax.formats ")


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100])
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert refusal(tmp_path / "a.safetensors")


def test_float64_survives_where_jax_has_it(tmp_path):
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
        packed = {"k": formats.pack(w, np.ones((4, 2), bool), "csr")}
        assert w.dtype == jnp.float64
        formats.save(tmp_path / "x.safetensors", packed)
        assert_identical(formats.load(tmp_path / "x.safetensors"), packed)
