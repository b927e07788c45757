"""Packed trees in safetensors files: no pickle, and any reader of safetensors sees the leaves.

Tensors are named by the path of a leaf, those of a packed one by its path and the leaf's field:
`Dense_0/kernel/values`, `Dense_0/kernel/indices`, `Dense_0/bias`. The file's metadata holds one JSON text under
`METADATA`, which says what the packed leaves are:

  {"version": 1, "arrays": {
    "Dense_0/kernel": {"format": "nm", "dtype": "bfloat16", "shape": [784, 300], "n": 2, "m": 4}
  }}
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sparsejax.formats.base import is_packed
from sparsejax.formats.group_quantised import GroupQuantisedArray
from sparsejax.formats.packing import FORMATS
from sparsejax.masks import choose, flatten, path_name

KINDS = {**FORMATS, GroupQuantisedArray.NAME: GroupQuantisedArray}
METADATA = "sparsejax.formats"
VERSION = 1
DTYPES = (
    *("bool", "bfloat16", "float16", "float32", "float64"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
)


def save(path: str | os.PathLike, tree) -> None:
    """Writes nested dicts of dense and packed arrays to a safetensors file.

    Args:
      path: the file.
      tree: nested dicts (or flax's FrozenDict) whose keys are strings without `/`; empty ones are not kept.

    Raises:
      ValueError: if the tree has other containers or keys, no leaf, or a leaf of a dtype that is not in `DTYPES` or
        that `load` would need `jax_enable_x64` for.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed)
    for keys, _ in leaves:
        if not keys or not all(_is_name(key) for key in keys):
            raise ValueError(
                f"{jax.tree_util.keystr(keys) or 'a single leaf'} cannot be saved: trees must be nested dicts whose "
                "keys are strings without '/'"
            )
    if not leaves:
        raise ValueError("a tree without leaves cannot be saved")
    arrays = {path_name(keys): _describe(leaf) for keys, leaf in leaves if is_packed(leaf)}
    tensors = {name: _on_host(name, leaf) for name, leaf in flatten(tree).items()}
    text = json.dumps({"version": VERSION, "arrays": arrays}, sort_keys=True)
    safetensors.numpy.save_file(tensors, os.fspath(path), metadata={METADATA: text})


def load(path: str | os.PathLike):
    """The nested dicts of dense and packed arrays in a safetensors file, bit for bit as they were saved.

    A file without our metadata is read as dense arrays.

    Raises:
      ValueError: one sentence that names the file, if it is none of safetensors, or if its metadata and its tensors
        do not fit together.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            arrays = _arrays((file.metadata() or {}).get(METADATA, '{"version": 1, "arrays": {}}'))
            tensors = {name: _on_device(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        leaves = {name: _rebuild(name, about, tensors) for name, about in arrays.items()}
        return _nested((*tensors.items(), *leaves.items()))
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _arrays(text: str) -> dict:
    """What the metadata says of each packed array."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its metadata {METADATA} is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("arrays"), dict) or "version" not in header:
        raise ValueError(f"its metadata {METADATA} must be an object with a version and an object of arrays")
    if header["version"] != VERSION:
        raise ValueError(f"it has version {header['version']} of packed formats, but this is {VERSION}")
    return header["arrays"]


def _nested(leaves) -> dict:
    """Nested dicts of leaves whose names are paths."""
    tree = {}
    for name, leaf in leaves:
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"it holds an array {name} and others inside its path")
        node[last] = leaf
    return tree


def _on_host(name: str, leaf):
    """A leaf as it is written."""
    dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
    if str(dtype) not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which cannot be saved (known: {', '.join(DTYPES)})")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} is {dtype}, which could be loaded only with jax_enable_x64")
    return np.asarray(leaf, order="C")


def _on_device(name: str, tensor):
    array = jnp.asarray(tensor)
    if array.dtype != tensor.dtype:
        raise ValueError(f"{name} in the file is {tensor.dtype}, which needs jax_enable_x64")
    return array


def _is_name(key) -> bool:
    name = getattr(key, "key", None)
    return isinstance(name, str) and bool(name) and "/" not in name


def _fields(cls, is_static: bool):
    return [field.name for field in dataclasses.fields(cls) if _is_static(field) == is_static]


def _is_static(field) -> bool:
    return field.metadata.get("static", False)


def _describe(leaf) -> dict:
    statics = {name: getattr(leaf, name) for name in _fields(type(leaf), True)}
    return {"format": leaf.NAME, "dtype": str(leaf.dtype), **statics}


def _rebuild(name: str, about: dict, tensors: dict):
    """The packed array `name`, whose leaves are taken out of `tensors`."""
    if not isinstance(about, dict):
        raise ValueError(f"its metadata must say what {name} is in an object, got {about!r}")
    cls = choose(f"format of {name}", about.get("format"), KINDS)
    needed = [f"{name}/{field}" for field in _fields(cls, False)]
    missing = [field for field in needed if field not in tensors]
    missing += [field for field in ("dtype", *_fields(cls, True)) if field not in about]
    if missing:
        raise ValueError(f"{name} in the file lacks {', '.join(missing)}")
    leaves = [tensors.pop(field) for field in needed]
    statics = [
        _static(name, field, about[field.name]) for field in dataclasses.fields(cls) if _is_static(field)
    ]
    array = cls(*leaves, *statics)
    if str(array.dtype) != about["dtype"]:
        raise ValueError(
            f"{name} in the file should be {about['dtype']}, but its {cls.DATA} are {array.dtype}"
        )
    array.check(name)
    return array


def _static(name: str, field, value):
    """A value of the metadata as the field of a format has it: an integer or a tuple of them."""
    numbers = [value] if field.type is int else value
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        wanted = "an integer" if field.type is int else "a list of integers"
        raise ValueError(f"{field.name} of {name} must be {wanted}, got {value!r}")
    return value if field.type is int else tuple(value)
