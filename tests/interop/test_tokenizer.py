"""Tokenizers of folders."""

import json

import pytest
import tokenizers
from golden_folders import GOLDEN

from sparsejax.interop.huggingface import tokenizer

FOLDER = GOLDEN / "tokenizer"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def test_vocabulary_and_merges_are_gpt2s_tokenizer():
    found = tokenizer(FOLDER)
    for text in EXPECTED:
        assert found.encode(text["text"]).ids == text["ids"]
        assert found.decode(text["ids"], skip_special_tokens=False) == text["text"]


def test_one_file_without_its_padding_and_truncation(tmp_path):
    made = tokenizer(FOLDER)
    made.enable_padding(length=64)
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer(tmp_path)
    assert isinstance(found, tokenizers.Tokenizer)
    assert [found.encode(text["text"]).ids for text in EXPECTED] == [text["ids"] for text in EXPECTED]


def test_a_folder_without_a_tokenizer_and_a_damaged_one(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds no tokenizer: neither tokenizer.json nor vocab.json with merges"
    ):
        tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer in .* cannot be read: "):
        tokenizer(tmp_path)
