"""Folders of our own for models that no Hugging Face family can express: `config.json` and `model.safetensors`.

`config.json` holds `{"model_type": "sparsejax", "name": NAME, "attributes": {...}}`, what `sparsejax.models.build` takes;
the safetensors file the parameters by their paths, packed ones too (see `sparsejax.formats.files`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsejax import formats, models
from sparsejax.interop.writing import to_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MODEL_TYPE = "sparsejax"


def save(folder: str | os.PathLike, model, params: Mapping[str, Any]) -> None:
    """Writes a model and its parameters into an existing folder.

    Args:
      folder: where to.
      model: an instance of one of `sparsejax.models.MODELS`.
      params: nested dicts of dense or packed arrays.

    Raises:
      ValueError: for a model that is not in `MODELS`, or parameters that `sparsejax.formats.save` cannot keep.
    """
    names = {kind: name for name, kind in models.MODELS.items()}
    if type(model) not in names:
        raise ValueError(f"{type(model).__name__} is not one of the models {', '.join(models.MODELS)}")
    attributes = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    config = {"model_type": MODEL_TYPE, "name": names[type(model)], "attributes": attributes}
    text = to_json(config)  # first, so that what it cannot hold is found out before the work
    folder = Path(folder)
    formats.save(folder / WEIGHTS, dict(params))
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(text)
    os.replace(partial, folder / CONFIG)


def load(folder: str | os.PathLike):
    """The model and the parameters of a folder that `save` wrote.

    Returns:
      (model, params).

    Raises:
      ValueError: if the folder is another kind of folder, or its files are damaged.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{str(folder)!r} was not written by sparsejax.interop.native")
    attributes = config.get("attributes")
    if not isinstance(attributes, dict) or "classes" not in attributes:
        raise ValueError(f"{str(path)!r} must hold attributes with classes, got {attributes!r}")
    model = models.build(config.get("name"), attributes.pop("classes"), **attributes)
    return model, formats.load(Path(folder) / WEIGHTS)
