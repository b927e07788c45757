"""Tokenizers of Hugging Face folders, through the `tokenizers` library."""

import json
import os
from pathlib import Path

PAIR = ("vocab.json", "merges.txt")
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
END = "<|endoftext|>"  # all of GPT-2's special tokens, which its folders do not name


def tokenizer(folder: str | os.PathLike):
    """The `tokenizers.Tokenizer` of a folder; `.encode(text).ids` and `.decode(ids)` are its use.

    It is read from `tokenizer.json`, without the padding and truncation that may be saved in it, or else from
    `vocab.json` and `merges.txt`: then it is GPT-2's byte-level BPE, with the special tokens that
    `tokenizer_config.json` and `special_tokens_map.json` name, if there are such files. It puts none before a text
    unless `add_bos_token` asks for it, as in folders of OPT.

    Raises:
      ValueError: if the folder has none of these files, or one of them is damaged.
    """
    import tokenizers  # its Rust library is loaded only by those who need it

    folder = Path(folder).expanduser()
    try:
        if (folder / "tokenizer.json").is_file():
            found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            found.no_padding()
            found.no_truncation()
            return found
        if all((folder / name).is_file() for name in PAIR):
            return _byte_level(tokenizers, folder)
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    raise ValueError(
        f"{str(folder)!r} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt"
    )


def _byte_level(tokenizers, folder: Path):
    found = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*(str(folder / name) for name in PAIR)))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    settings = {}
    for name in SETTINGS:  # the last one has the last word
        if (folder / name).is_file():
            settings |= json.loads((folder / name).read_text(encoding="utf-8"))
    special = {role: _content(settings.get(role) or END) for role in SPECIAL}
    found.add_special_tokens([each for each in special.values() if found.token_to_id(each) is not None])
    if settings.get("add_bos_token", False):
        first = special["bos_token"]
        if found.token_to_id(first) is None:
            raise ValueError(f"add_bos_token puts {first!r} before every text, which {PAIR[0]} does not hold")
        found.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B:1",
            special_tokens=[(first, found.token_to_id(first))],
        )
    return found


def _content(token) -> str:
    """The text of a special token, which is stored as such or with its properties."""
    return token["content"] if isinstance(token, dict) else str(token)


def byte_tokenizer():
    """A `tokenizers.Tokenizer` whose ids are the bytes of the text, for models of bytes."""
    import tokenizers

    # GPT-2's letters for bytes: printable ones stand for themselves, the others for those from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    return found
