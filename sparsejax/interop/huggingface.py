"""Hugging Face folders (`config.json` and safetensors) in and out of our models, without PyTorch.

    checkpoint = load("llama-3.2-1b", dtype="bfloat16")
    logits = checkpoint.model.apply({"params": checkpoint.params}, tokens)
    save("smaller", checkpoint.model, params, checkpoint.config, source="llama-3.2-1b", card="# Pruned\\n")

A model that is larger than memory is read and written part by part, `model.parts()` being their names:

    model, params, config = load("llama-3.1-8b", lazy=True)
    with writer("smaller", model, config, source="llama-3.1-8b") as out:
        for part in model.parts():
            out[part] = prune(params[part])

The families are those of `sparsejax.interop.families.FAMILIES`.
"""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from sparsejax.interop.configs import attributes, family_of
from sparsejax.interop.family import Family, Variant
from sparsejax.interop.tensors import DTYPES, Files, Place, file_shape, from_file, place, read_json
from sparsejax.interop.tokenization import tokenizer
from sparsejax.interop.writing import join, shapes, writer
from sparsejax.masks import choose

__all__ = ["Checkpoint", "LazyParams", "load", "save", "tokenizer", "writer"]
CONFIG = "config.json"


class Checkpoint(NamedTuple):
    """A model and what a folder says about it.

    Attributes:
      model: one of `sparsejax.models`, whose `dtype` is None: it computes in the dtype of its parameters, promoted
        with that of its inputs where these are images.
      params: nested dicts of arrays; or `LazyParams`.
      config: `config.json`, which `save` needs again.
    """

    model: Any
    params: Mapping[str, Any]
    config: dict[str, Any]


class LazyParams(Mapping):
    """The parameters of a folder: every look-up of a part (`embed`, `block_0`, ...) reads it from the files anew.

    `dict(lazy)` reads all of them, which is what `model.apply` needs.
    """

    def __init__(
        self, files: Files, family: Family, variant: Variant, model, config: Mapping, dtype: str | None
    ):
        self._files, self._model, self._dtype = files, model, dtype
        self._shapes = shapes(family, model, config)
        self._places = {
            part: {path: place(family, join(part, path), shape) for path, shape in leaves.items()}
            for part, leaves in self._shapes.items()
        }
        self._check(family, variant)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, part) -> bool:
        return part in self._places  # without reading it

    def __getitem__(self, part: str):
        """The subtree `part`.

        Raises:
          ValueError: for a part that the model does not have.
        """
        choose("part", part, self._places)
        tree = {}
        for path, where in self._places[part].items():
            if not path:  # a parameter that is no module's
                return self._read(where)
            *modules, leaf = path.split("/")
            node = tree
            for module in modules:
                node = node.setdefault(module, {})
            node[leaf] = self._read(where)
        return tree

    def _read(self, where: Place):
        arrays = [from_file(self._files.read(name, where.part), where.layout) for name in where.tensors]
        array = np.stack(arrays) if where.is_stacked else arrays[0]
        return jnp.asarray(np.ascontiguousarray(array.astype(self._dtype or array.dtype, copy=False)))

    def _check(self, family: Family, variant: Variant) -> None:
        """Raises ValueError, naming the first tensor, unless the files hold exactly those that the model needs."""
        used = set()
        for part, leaves in self._places.items():
            for path, where in leaves.items():
                shape = file_shape(where, self._shapes[part][path], self._model)
                for name in where.tensors:
                    self._check_tensor(name, variant.written(name), shape)
                    used.add(name)
        ignored = (
            (*family.ignored, "lm_head.weight") if getattr(self._model, "tied", False) else family.ignored
        )
        extra = [name for name in self._files if name not in used and not _matches(name, ignored)]
        unread = [name for name in extra if _matches(name, family.unread)]
        if unread:
            logging.warning("%s: not in %s, left out", ", ".join(unread), type(self._model).__name__)
        unknown = sorted(set(extra) - set(unread))
        if unknown:
            file, tensor = self._files.origin(unknown[0])
            others = f" (nor {len(unknown) - 1} others)" if len(unknown) > 1 else ""
            raise ValueError(
                f"{file} holds the tensor {tensor}, which {variant.architecture} with this config does not have{others}"
            )

    def _check_tensor(self, name: str, written: str, shape: tuple[int, ...]) -> None:
        if name not in self._files:
            raise ValueError(f"the tensor {written} is missing in {str(self._files.folder)!r}")
        dtype, found = self._files.header(name)
        if dtype not in DTYPES:
            raise ValueError(
                f"the tensor {written} is of dtype {dtype}, but must be of {', '.join(sorted(DTYPES))}"
            )
        if found != shape:
            raise ValueError(f"the tensor {written} has shape {found}, but config.json asks for {shape}")


def load(folder: str | os.PathLike, dtype: str | None = None, *, lazy: bool = False) -> Checkpoint:
    """The model in a Hugging Face folder, which `transformers` computes to float32 rounding.

    Task heads that our encoders lack (`cls`, `classifier`, ...) are left out, with a warning that names them.

    Args:
      folder: with `config.json` and `model.safetensors`, or several files with an index.
      dtype: of the parameters, `float32`, `bfloat16` or `float16`; None leaves every tensor as it is stored.
      lazy: give `LazyParams`, which read a part when it is looked up; names, shapes and dtypes are checked at once.

    Raises:
      ValueError: one sentence for a folder without config or weights, an unsupported architecture or entry of the
        config, a missing or extra tensor, one of a wrong dtype or shape, a damaged file.
    """
    if dtype is not None:
        choose("dtype", dtype, DTYPES.values())
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        is_name = not folder.exists() and len(folder.parts) <= 2 and not folder.is_absolute()
        download = f"hf download {folder} --local-dir {folder.name}"
        advice = f" (Hub names are not downloaded; {download})" if is_name else ""
        raise ValueError(f"{str(folder)!r} holds no {CONFIG}{advice}")
    config = read_json(folder / CONFIG)
    family = family_of(config)
    if config.get("auto_map"):
        logging.warning("%s: the code that auto_map names is not run", folder)
    files = Files(folder, family)
    variant = family.variant(files, config.get("architectures") or ())
    model = family.model(**attributes(family, variant, config))
    if getattr(model, "tied", False):
        files.alias(f"{family.tensors['embed']}.weight", "lm_head.weight")
    params = LazyParams(files, family, variant, model, config, dtype)
    return Checkpoint(model, params if lazy else dict(params), config)


def save(
    folder: str | os.PathLike,
    model,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    source: str | os.PathLike | None = None,
    card: str | None = None,
    shard_bytes: int = 2**30,
) -> None:
    """Writes a folder that `transformers` loads; see `writer` for the arguments and errors.

    Args:
      params: the parameters by part, read one part at a time (`LazyParams`, say, or nested dicts).
    """
    extra = sorted(set(params) - set(model.parts()))
    if extra:
        raise ValueError(
            f"the parameters have {extra[0]!r}, which the model lacks (it has {', '.join(model.parts())})"
        )
    with writer(folder, model, config, source=source, card=card, shard_bytes=shard_bytes) as out:
        for part in model.parts():
            if part in params:
                out[part] = params[part]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
