"""Writes Hugging Face folders part by part, whole or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from sparsejax.formats.base import is_packed
from sparsejax.interop.configs import describe, family_of
from sparsejax.interop.family import Family
from sparsejax.interop.padding import pad, uniform
from sparsejax.interop.tensors import DTYPES, INDEX, SINGLE, place, to_file
from sparsejax.masks import choose, flatten
from sparsejax.models.layers import layer_sizes

COPIED = (  # patterns: what a folder says about its texts, images, pooling and terms of use
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja"),
    *("generation_config.json", "preprocessor_config.json", "modules.json", "sentence_bert_config.json"),
    *("config_sentence_transformers.json", "LICENSE*", "NOTICE*", "USE_POLICY.md"),
)
METADATA = {"format": "pt"}  # transformers reads no file without it


def shapes(family: Family, model, config: Mapping) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every leaf by its path in its part, for every part of the model.

    The path of a part that is a parameter itself is "".
    """
    inputs = jax.ShapeDtypeStruct(*family.example(config))
    tree = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return {
        part: {path: leaf.shape for path, leaf in flatten(tree.get(part, {})).items()}
        for part in model.parts()
    }


def writer(
    folder: str | os.PathLike,
    model,
    config: Mapping[str, Any],
    *,
    source: str | os.PathLike | None = None,
    card: str | None = None,
    shard_bytes: int = 2**30,
) -> "Writer":
    """A context in which `out[part] = subtree` adds the parts of a model to a new folder, in any order.

    The folder appears when the context ends, or not at all if it ends in an error; until then the files are in a
    hidden folder beside it. Layers of uneven widths are padded with zeros to the largest, see
    `sparsejax.interop.padding`; packed kernels become dense. Tensors keep the dtype of the arrays.

    Args:
      folder: where to; it must not exist, or be empty.
      model: whose parameters they are.
      config: of the checkpoint that the model comes from (`Checkpoint.config`), or `{"model_type": ...}`; what has
        changed in the model is changed in it.
      source: a folder whose tokenizer, licence and other small files are copied, and the folders of the further
        modules that its `modules.json` names, as sentence encoders have them.
      card: text of `README.md`.
      shard_bytes: how many bytes of tensors are collected before a file is written.

    Raises:
      ValueError: if the folder is not empty, there is no sound source, the config cannot express the model; for a
        part that the model does not have, came already, has other leaves or shapes; at the end, if one is missing.
      OSError: if the finished folder cannot get its name; it is kept under the one that the error says.
    """
    return Writer(folder, model, config, source, card, shard_bytes)


class Writer:
    """See `writer`."""

    def __init__(self, folder, model, config, source, card, shard_bytes):
        # a folder cannot take the name of a link, but of what the link leads to
        self._folder = Path(folder).expanduser().resolve()
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise ValueError(f"{str(self._folder)!r} exists already; remove it or name another folder")
        self._source = None if source is None else Path(source).expanduser()
        if self._source is not None and not self._source.is_dir():
            raise ValueError(f"the source {str(self._source)!r} is not a folder")
        self._copied = [] if self._source is None else _small_files(self._source)
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self._family = family_of(config)
        if type(model) is not self._family.model:
            raise ValueError(
                f"a checkpoint of {self._family.variants[0].architecture} needs a model of the class "
                f"{self._family.model.__name__}, got {type(model).__name__}"
            )
        self._config, self._card, self._shard_bytes = dict(config), card, shard_bytes
        self._model, self._target = model, uniform(model, self._family)
        self._shapes, self._wanted = (shapes(self._family, each, config) for each in (model, self._target))
        self._names(self._shapes)  # raises for parameters that have no place in a checkpoint
        self._variant = self._family.variant(self._names(self._wanted))
        to_json(self._describe("float32"))  # so that what cannot be written is found out before the work
        self._waiting, self._waiting_bytes = {}, 0
        self._files, self._done, self._dtype = [], [], None  # files: the names of each one's tensors
        self._parameters = self._bytes = 0

    def __enter__(self) -> "Writer":
        self._partial = self._folder.with_name(f".{self._folder.name}.{uuid.uuid4().hex}.partial")
        self._made = [parent for parent in self._folder.parents if not parent.exists()]
        self._partial.mkdir(parents=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()
            return
        try:
            self._partial.rename(self._folder)
        except OSError as cause:
            raise OSError(
                f"the finished folder {str(self._partial)!r} cannot be renamed to {str(self._folder)!r}: {cause}"
            ) from cause

    def _remove(self) -> None:
        """Leaves nothing behind, nor the parents that were made for the folder."""
        shutil.rmtree(self._partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may use a parent by now
            for parent in self._made:
                parent.rmdir()

    def __setitem__(self, part: str, subtree) -> None:
        choose("part", part, self._shapes)
        if part in self._done:
            raise ValueError(f"{part} was written already")
        leaves = {path: np.asarray(leaf) for path, leaf in _dense(subtree).items()}
        self._check(part, leaves)
        if part.startswith("block_"):
            sizes = layer_sizes(self._model, int(part.removeprefix("block_")))
            leaves = pad(leaves, sizes, self._target, self._wanted[part], self._dtype or "float32")
        for name, tensor in self._tensors(part, leaves).items():
            self._waiting[name] = tensor
            self._waiting_bytes += tensor.nbytes
        self._done.append(part)
        if self._waiting_bytes >= self._shard_bytes:
            self._flush()

    def _check(self, part: str, leaves: Mapping[str, np.ndarray]) -> None:
        wanted = self._shapes[part]
        for path in (*wanted, *leaves):
            name = join(part, path)
            if path not in leaves or path not in wanted:
                raise ValueError(
                    f"{name} is {'missing' if path in wanted else 'not a parameter of the model'}"
                )
            if leaves[path].shape != wanted[path]:
                raise ValueError(
                    f"{name} has shape {leaves[path].shape}, but the model has {wanted[path]}{self._at(name)}"
                )
            if str(leaves[path].dtype) not in DTYPES.values():
                allowed = ", ".join(sorted(DTYPES.values()))
                raise ValueError(
                    f"{name} has dtype {leaves[path].dtype}, which cannot be written (known: {allowed})"
                )
            self._dtype = self._dtype or str(leaves[path].dtype)

    def _at(self, name: str) -> str:
        """What a shape depends on beside the model: a vit's images, of which only the config tells."""
        if name != "positions":
            return ""
        _, height, width, _ = self._family.example(self._config)[0]
        return f" for images of {height}x{width} pixels (image_size in the config)"

    def _names(self, shapes: Mapping[str, Mapping]) -> list[str]:
        """The tensors that hold parts of these shapes, by the names of `Family.tensors`."""
        return [
            name
            for part, leaves in shapes.items()
            for path, shape in leaves.items()
            for name in place(self._family, join(part, path), shape).tensors
        ]

    def _tensors(self, part: str, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors that hold the leaves of one part, by their names in the file."""
        pieces = {}
        for path, leaf in leaves.items():
            where = place(self._family, join(part, path), leaf.shape)
            arrays = leaf if where.is_stacked else leaf[None]
            for name, array in zip(where.tensors, arrays, strict=True):
                pieces.setdefault(name, {})[where.part[0]] = to_file(array, where.layout, self._model)
        joined = {name: [found[k] for k in sorted(found)] for name, found in pieces.items()}
        return {
            self._variant.written(name): np.ascontiguousarray(
                np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0]
            )
            for name, arrays in joined.items()
        }

    def _flush(self) -> None:
        """Writes the tensors that wait into a file of their own."""
        if not self._waiting:
            return
        self._parameters += sum(tensor.size for tensor in self._waiting.values())
        self._bytes += self._waiting_bytes
        safetensors.numpy.save_file(self._waiting, self._partial / f"{len(self._files)}", METADATA)
        self._files.append(sorted(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _describe(self, dtype: str) -> dict[str, Any]:
        return describe(self._family, self._variant, self._target, self._config, dtype)

    def _finish(self) -> None:
        for part, leaves in self._shapes.items():
            if not leaves and part not in self._done:  # a block without sub-blocks has no parameters
                self[part] = {}
        missing = [part for part in self._shapes if part not in self._done]
        if missing:
            raise ValueError(f"{', '.join(missing)} of the model were not written, so there is no folder")
        self._flush()
        self._name_files()
        _write_json(self._partial / "config.json", self._describe(self._dtype))
        _copy(self._copied, self._partial)
        if self._card is not None:
            (self._partial / "README.md").write_text(self._card, encoding="utf-8")

    def _name_files(self) -> None:
        """Gives the files the names that they can have only now, and writes the index if there are several."""
        count = len(self._files)
        if count == 1:
            (self._partial / "0").rename(self._partial / SINGLE)
            return
        index = {}
        for i, names in enumerate(self._files):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self._partial / f"{i}").rename(self._partial / file)
            index |= dict.fromkeys(names, file)
        metadata = {"total_parameters": self._parameters, "total_size": self._bytes}
        _write_json(self._partial / INDEX, {"metadata": metadata, "weight_map": index})


def _dense(subtree) -> dict[str, Any]:
    """The leaves of a part by path, packed ones unpacked."""
    dense = jax.tree.map(
        lambda leaf: leaf.to_dense() if is_packed(leaf) else leaf, subtree, is_leaf=is_packed
    )
    return flatten(dense)


def join(part: str, path: str) -> str:
    """The path of a leaf in the whole tree; a part that is a leaf itself has the path ""."""
    return f"{part}/{path}" if path else part


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what a folder says about its texts, images, pooling and terms of use; errors as `writer`."""
    _copy(_small_files(source), folder)


def _copy(paths: list[Path], folder: Path) -> None:
    for path in paths:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def _small_files(source: Path) -> list[Path]:
    """The files of `COPIED`, and the folders of the modules after the transformer."""
    found = [path for pattern in COPIED for path in sorted(source.glob(pattern)) if path.is_file()]
    path = source / "modules.json"
    if not path.is_file():
        return found
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        folders = [source / each["path"] for each in modules if not each["type"].endswith(".Transformer")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a list of modules with path and type: {error!r}") from error
    inside = [each for each in folders if each.is_dir() and each.resolve().parent == source.resolve()]
    return found + inside


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(to_json(value, sort_keys=True), encoding="utf-8")


def to_json(value: Mapping, **keywords) -> str:
    """The text of a JSON object, in which NumPy's numbers and dtypes are plain ones."""
    return json.dumps(value, indent=2, default=_plain, **keywords) + "\n"


def _plain(value):
    if isinstance(value, Mapping):  # Flax's frozen ones
        return dict(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return value.tolist()
    return np.dtype(value).name
