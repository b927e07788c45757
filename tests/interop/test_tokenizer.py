"""Tokenizers of folders."""

import json
import shutil

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


@pytest.mark.parametrize("form", [str, lambda token: {"content": token, "lstrip": False}])
def test_special_tokens_are_those_of_the_folder(tmp_path, form):
    """As folders of OPT have them: one token before every text."""
    vocabulary = json.loads((FOLDER / "vocab.json").read_text())
    tokens = {"</s>": len(vocabulary), "<pad>": len(vocabulary) + 1}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | tokens))
    shutil.copy(FOLDER / "merges.txt", tmp_path)
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    special = {role: form(token) for role, token in names.items()}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    plain = [*EXPECTED[0]["ids"], tokens["</s>"]]
    assert tokenizer(tmp_path).encode(EXPECTED[0]["text"] + "</s>").ids == plain
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**special, "add_bos_token": True}))
    found = tokenizer(tmp_path)
    assert found.encode(EXPECTED[0]["text"] + "</s>").ids == [tokens["</s>"], *plain]
    assert found.encode("<pad>").ids == [tokens["</s>"], tokens["<pad>"]]
    assert found.decode(found.encode(EXPECTED[0]["text"]).ids) == EXPECTED[0]["text"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    with pytest.raises(ValueError, match="puts '<s>' before every text, which vocab.json does not hold"):
        tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_and_a_damaged_one(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds no tokenizer: neither tokenizer.json nor vocab.json with merges"
    ):
        tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer in .* cannot be read: "):
        tokenizer(tmp_path)
