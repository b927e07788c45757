"""Safetensors files of a folder, and how a leaf of our parameters lies in their tensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (safetensors finds NumPy's bfloat16 through it)
import numpy as np
import safetensors

from sparsejax.interop.family import Family

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}
LEGACY = {".gamma": ".weight", ".beta": ".bias"}  # how the first checkpoints of BERT call a norm's parameters


class Place(NamedTuple):
    """Where a leaf lies: in these tensors (one for every expert, else one), in the columns of part k of n."""

    tensors: tuple[str, ...]
    layout: str
    part: tuple[int, int] = (0, 1)
    is_stacked: bool = False


def place(family: Family, path: str, shape: tuple[int, ...]) -> Place:
    """Where the leaf at `path` of our parameters, an array of `shape`, lies in a checkpoint.

    Raises:
      ValueError: if the family has no such leaf.
    """
    index = re.match(r"block_(\d+)/", path)
    pattern = re.sub(r"^block_\d+/", "block_{i}/", path)
    module, _, leaf = pattern.rpartition("/")
    name, suffix = family.tensors.get(pattern), ""
    if name is None:
        name, suffix = family.tensors.get(module), SUFFIXES.get(leaf)
    if name is None or suffix is None:
        raise ValueError(
            f"a checkpoint of {family.variants[0].architecture} has no place for the parameter {path}"
        )
    name, _, part = name.partition("[")
    part = tuple(map(int, part.rstrip("]").split("/"))) if part else (0, 1)
    layout = family.layouts.get(module, family.kernels) if leaf == "kernel" else "same"
    is_stacked = "{e}" in name
    numbers = range(shape[0] if is_stacked else 1)
    names = (name.format(i=index and index[1], e=e) + suffix for e in numbers)
    return Place(tuple(names), layout, part, is_stacked)


def _patches_in(array):
    return array.transpose(2, 3, 1, 0).reshape(-1, len(array))


def _patches_out(array, patch: int):
    return array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1)


def from_file(array: np.ndarray, layout: str) -> np.ndarray:
    """A tensor of a file as our leaf has it."""
    return {"linear": np.transpose, "patches": _patches_in}.get(layout, np.asarray)(array)


def to_file(array: np.ndarray, layout: str, model) -> np.ndarray:
    """The inverse of `from_file`."""
    if layout == "patches":
        return _patches_out(array, model.patch)
    return array.T if layout == "linear" else array


def file_shape(where: Place, shape: tuple[int, ...], model) -> tuple[int, ...]:
    """The shape of each of the tensors in which a leaf of `shape` lies."""
    leaf = np.broadcast_to(np.float32(0), shape[1:] if where.is_stacked else shape)
    *rest, last = to_file(leaf, where.layout, model).shape
    return (*rest, last * where.part[1])


class Files:
    """The tensors of a folder by the names of `Family.tensors`, read when they are asked for.

    Raises:
      ValueError: for a folder without weights, an index that is not one or names files or tensors that are not
        there, a file that is no safetensors file, or two tensors of one parameter.
    """

    def __init__(self, folder: Path, family: Family):
        self.folder, self._headers = folder, {}  # {file: {name in the file: (dtype, shape)}}
        self._names = {}  # name -> (file, name in the file)
        for file, tensors in self._files().items():
            for tensor in tensors:
                name = next((tensor[: -len(a)] + b for a, b in LEGACY.items() if tensor.endswith(a)), tensor)
                for variant in family.variants:
                    name = name.removeprefix(variant.prefix)
                if name in self._names:
                    other = self._names[name][1]
                    raise ValueError(
                        f"{str(folder)!r} holds both {other} and {tensor}, which name the same parameter"
                    )
                self._names[name] = (file, tensor)

    def __iter__(self):
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def alias(self, name: str, other: str) -> None:
        """Lets the tensor `other`, if there is one, stand for `name` where that is missing."""
        if other in self._names:
            self._names.setdefault(name, self._names[other])

    def origin(self, name: str) -> tuple[str, str]:
        """The file that holds a tensor, and the tensor's name there."""
        return self._names[name]

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype, as safetensors calls it, and the shape of a tensor, without reading it."""
        file, tensor = self._names[name]
        return self._headers[file][tensor]

    def read(self, name: str, part: tuple[int, int] = (0, 1)) -> np.ndarray:
        """Part k of n equal parts of a tensor's last axis."""
        file, tensor = self._names[name]
        # opened anew each time: what was read through a mapping stays in memory for as long as it is open
        with safetensors.safe_open(self.folder / file, framework="np") as opened:
            if part == (0, 1):
                return opened.get_tensor(tensor)
            width = self.header(name)[1][-1] // part[1]
            return opened.get_slice(tensor)[..., part[0] * width : (part[0] + 1) * width]

    def _files(self) -> dict[str, list[str]]:
        """The tensors of every file of weights."""
        if (self.folder / SINGLE).is_file():
            return {SINGLE: self._tensors(SINGLE)}
        if not (self.folder / INDEX).is_file():
            pickled = next(self.folder.glob("pytorch_model*.bin"), None)
            advice = (
                f" ({pickled.name} needs PyTorch: load it there and save_pretrained once)" if pickled else ""
            )
            raise ValueError(f"{str(self.folder)!r} holds no weights: neither {SINGLE} nor {INDEX}{advice}")
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, Mapping) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{str(self.folder / INDEX)!r} has no weight_map from tensors to files")
        found = {}
        for tensor, file in index.items():
            if file not in found:
                if Path(file).name != file or not (self.folder / file).is_file():
                    raise ValueError(f"{INDEX} names {file!r}, which is not in {str(self.folder)!r}")
                found[file] = self._tensors(file)
            if tensor not in found[file]:
                raise ValueError(f"{INDEX} says that {tensor} is in {file}, but it is not")
        return found

    def _tensors(self, file: str) -> list[str]:
        path = self.folder / file
        try:
            with safetensors.safe_open(path, framework="np") as opened:
                slices = {tensor: opened.get_slice(tensor) for tensor in opened.keys()}  # noqa: SIM118
                self._headers[file] = {
                    tensor: (each.get_dtype(), tuple(each.get_shape())) for tensor, each in slices.items()
                }
            return list(self._headers[file])
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is not a sound safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: if it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, but it holds a {type(found).__name__}")
    return found
