"""The finished blocks of an interrupted compression, in a folder.

`NAME.safetensors` holds a block's parameters (`params/...`) and masks (`masks/...`), with the report of its layers and
a digest of what it was made from in its metadata; `hidden.K.safetensors` the hidden states after K blocks, of which
the newest is kept; `resume.json` says how many blocks are done and of which call. Every file is written under another
name, brought to the disk and then renamed, the JSON file last, so that the folder is in order at any moment.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from sparsejax.masks import flatten

STATE = "resume.json"
VERSION = 2
_SHORT = 100  # characters of values that fit into a sentence


class Resume:
    """The folder of one call; restores the stream's hidden states if blocks are done.

    Attributes:
      done: how many blocks are.
    """

    def __init__(self, folder, arguments: dict, stream, model):
        """Opens the folder or makes it.

        Args:
          folder: where.
          arguments: JSON-able, what the result depends on besides the model and the tokens.
          stream: at the first block.
          model: the linen module.

        Raises:
          ValueError: if the folder belongs to a call with other arguments, tokens or embeddings (names which).
        """
        self.folder, self.stream = Path(folder), stream
        self.call = {
            "version": VERSION,
            **arguments,
            "model": repr(model),
            "tokens": _digest(stream.tokens),
            "embedded tokens": _digest(stream.hidden),
        }
        self.call = json.loads(json.dumps(self.call))
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self._state()
        self.done = state["done"]
        if self.done:
            stream.hidden = safetensors.numpy.load_file(self._hidden(self.done))["hidden"]
        self._tidy()

    def _state(self) -> dict:
        path = self.folder / STATE
        if not path.exists():
            return {"done": 0}
        state = json.loads(path.read_text())
        found = state["call"]
        for key in {**self.call, **found}:
            if self.call.get(key) != found.get(key):
                values = f" ({found.get(key)} there, {self.call.get(key)} here)"
                raise ValueError(
                    f"{self.folder} holds a compression with another {key}{values if len(values) < _SHORT else ''}; "
                    "choose another folder or empty it"
                )
        return state

    def read(self, name: str, old):
        """(parameters, masks, report) of a finished block, numpy arrays; `old` are its given parameters.

        Raises:
          ValueError: if it was made from others.
        """
        with safetensors.safe_open(self._file(name), framework="np") as file:
            if file.metadata()["made from"] != _digest_of_tree(old):
                raise ValueError(
                    f"{self.folder} holds a compression of another {name}; choose another folder or empty it"
                )
            report = json.loads(file.metadata()["report"])
            tree = {}
            for key in file.keys():  # noqa: SIM118
                *above, last = key.split("/")
                node = tree
                for part in above:
                    node = node.setdefault(part, {})
                node[last] = file.get_tensor(key)
        return tree["params"], tree["masks"], report

    def write(self, name: str, old, params, masks, report: dict, hidden) -> None:
        """Adds a finished block, made from the parameters `old`, and the hidden states after it."""
        tree = jax.device_get({"params": params, "masks": masks})
        metadata = {"report": json.dumps(report), "made from": _digest_of_tree(old)}
        self._save(self._file(name), flatten(tree), metadata)
        self._save(self._hidden(self.done + 1), {"hidden": hidden}, {})
        self.done += 1
        temporary = self.folder / f"{STATE}.part"
        temporary.write_text(json.dumps({"done": self.done, "call": self.call}))
        _publish(temporary, self.folder / STATE)
        self._tidy()

    def _tidy(self) -> None:
        """Removes hidden states of other moments than this."""
        for path in self.folder.glob("hidden.*"):
            if path != self._hidden(self.done):
                path.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _hidden(self, done: int) -> Path:
        return self.folder / f"hidden.{done}.safetensors"

    def _save(self, path: Path, tensors: dict, metadata: dict) -> None:
        temporary = path.with_suffix(".part")
        tensors = {key: np.asarray(value, order="C") for key, value in tensors.items()}
        safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
        _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    """Renames a file once its content is on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(array) -> str:
    array = np.asarray(array, order="C")
    found = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


def _digest_of_tree(tree) -> str:
    digests = {name: _digest(leaf) for name, leaf in flatten(tree).items()}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
