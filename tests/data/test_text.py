"""Corpora for calibration and evaluation: splits, windows, bad input."""

import numpy as np
import pytest

from sparsejax.data import load, text
from sparsejax.data.stdlib import source


def test_stdlib_is_the_text_that_models_are_trained_on():
    data = load("stdlib", length=32, size=20_000)
    found = text.encode(text.read("stdlib", "train", 20_000))
    np.testing.assert_array_equal(data.train[0].ravel(), found[: data.train[0].size])
    held_out = text.encode(text.read("stdlib", "test", 2_000))
    np.testing.assert_array_equal(data.test[0].ravel(), held_out[: data.test[0].size])
    assert found.dtype == np.int32 and len(found) == 20_000


def test_a_file_and_a_folder_are_split_without_overlap(tmp_path):
    (tmp_path / "one.txt").write_bytes(bytes(range(100)))
    train, test = (text.read(str(tmp_path / "one.txt"), split) for split in text.SPLITS)
    assert train + test == bytes(range(100)) and len(test) == 10
    assert text.read(str(tmp_path), "test") == test  # a folder of one file is that file
    for i in range(20):
        (tmp_path / f"{i:02}.md").write_text(f"<{i}>")
    (tmp_path / "table.csv").write_text("not text")
    train, test = (text.read(str(tmp_path), split) for split in text.SPLITS)
    assert b"<0>" in test and b"<10>" in test and b"<1>" in train and b"not" not in train + test
    assert not set(test.split()) & set(train.split())
    assert text.read(str(tmp_path), "train", size=4) == b"<1>\n"


def test_a_file_is_read_only_as_far_as_needed(tmp_path, monkeypatch):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(100)))
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    assert text.read(str(path), "train", 3) == b"\0\1\2"
    assert text.read(str(path), "test", 4) == bytes(range(90, 94))


def test_a_folder_below_one_that_is_left_out_by_name_has_its_files(tmp_path):
    folder = tmp_path / "tests" / "mine"
    (folder / "tests").mkdir(parents=True)
    for i in range(10):
        (folder / f"{i}.py").write_text(f"{i}")
        (folder / "tests" / f"{i}.py").write_text("left out")
    assert source("train", folder) == b"123456789"


def test_samples_are_windows_of_the_text_and_seeded():
    tokens = np.arange(1000, dtype=np.int32)
    found = text.sample(tokens, 50, 16, seed=3)
    np.testing.assert_array_equal(np.diff(found, axis=1), 1)
    assert found.shape == (50, 16) and len(set(found[:, 0])) > 40
    np.testing.assert_array_equal(found, text.sample(tokens, 50, 16, seed=3))
    assert (found != text.sample(tokens, 50, 16, seed=4)).any()
    assert (text.sample(tokens[:16], 3, 16, seed=0) == tokens[:16]).all()  # the last place is a place


def test_windows_are_consecutive():
    tokens = np.arange(25, dtype=np.int32)
    np.testing.assert_array_equal(text.windows(tokens, 10), tokens[:20].reshape(2, 10))
    assert text.windows(tokens, 10, 1).shape == (1, 10)


def test_a_tokenizer_is_used():
    class Letters:
        def encode(self, words, add_special_tokens):
            assert not add_special_tokens
            return type("Encoding", (), {"ids": [ord(letter) - ord("a") for letter in words]})

    np.testing.assert_array_equal(text.encode("abca\u00e9".encode()[:-1], Letters()), [0, 1, 2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp: text.read("nowhere", "train"), "the corpus 'nowhere' is neither 'stdlib' nor the path"),
        (lambda tmp: text.read("stdlib", "valid"), "unknown split 'valid'"),
        (lambda tmp: text.read(str(tmp), "train"), r"has no text .*\.txt, \.md, \.py are read"),
        (lambda tmp: text.read("stdlib", "train", 0), "size must be at least 1 byte, got 0"),
        (lambda tmp: text.windows(np.arange(25), 10, 5), "25 tokens, 2 windows of 10; 5 were asked for"),
        (lambda tmp: text.sample(np.arange(5), 2, 6, 0), "the text has 5 tokens, fewer than one window of 6"),
        (lambda tmp: text.windows(np.arange(5), 0), "at least 1, got 1 and 0"),
    ],
)
def test_mistakes_about_text(tmp_path, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(tmp_path)
