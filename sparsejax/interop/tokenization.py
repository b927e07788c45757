"""Tokenizers of Hugging Face folders, through the `tokenizers` library."""

import os
from pathlib import Path

PAIR = ("vocab.json", "merges.txt")


def tokenizer(folder: str | os.PathLike):
    """The `tokenizers.Tokenizer` of a folder; `.encode(text).ids` and `.decode(ids)` are its use.

    It is read from `tokenizer.json`, without the padding and truncation that may be saved in it, or else from
    `vocab.json` and `merges.txt`: then it is GPT-2's byte-level BPE, which adds no special tokens to a text.

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
            return _byte_level(tokenizers, *(str(folder / name) for name in PAIR))
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    raise ValueError(
        f"{str(folder)!r} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt"
    )


def _byte_level(tokenizers, vocabulary: str, merges: str):
    model = tokenizers.models.BPE.from_file(vocabulary, merges)
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    if found.token_to_id("<|endoftext|>") is not None:
        found.add_special_tokens(["<|endoftext|>"])
    return found


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
