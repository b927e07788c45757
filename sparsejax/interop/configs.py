"""Between a family's `config.json` and the attributes of our models."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from sparsejax.interop.families import FAMILIES
from sparsejax.interop.family import Bias, Family, Key, Same, Variant
from sparsejax.masks import choose

FULL, SLIDING = "full_attention", "sliding_attention"
IRRELEVANT = ("linear", "dtype", "layers", "mlp_ratio", "parent", "name")


def family_of(config: Mapping) -> Family:
    """The family that a config's `model_type` names.

    Raises:
      ValueError: if it is not supported; the supported ones are listed.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported (supported: {', '.join(sorted(FAMILIES))})")
    return FAMILIES[name]


# --- reading -----------------------------------------------------------------------------------------


def attributes(family: Family, variant: Variant, config: Mapping) -> dict[str, Any]:
    """The attributes of our model that the config of a variant describes.

    Raises:
      ValueError: for a value of the wrong type, or one that our models cannot follow.
    """
    for name, wanted in {**family.requires, **variant.requires}.items():
        wanted = config.get(wanted.name) if isinstance(wanted, Same) else wanted
        if config.get(name) not in (None, wanted):
            raise ValueError(
                f"{variant.architecture} with {name}={config[name]!r} is not supported (only {wanted!r})"
            )
    if config.get("quantization_config"):
        raise ValueError(
            "checkpoints with a quantization_config are not supported; save one in float32 or bfloat16"
        )
    found = {attribute: _value(config, key) for attribute, key in family.keys.items()}
    found |= {**family.fixed, **variant.attributes}
    found["bias"] = tuple(name for bias in family.bias if _has_bias(config, bias) for name in bias.names)
    if variant.classes is not None:
        classes = {"none": 0, "vocabulary": found.get("vocabulary"), "labels": _labels(config)}
        found["classes"] = classes[variant.classes]
    if family.theta is not None:
        found |= _read_rotary(config, family.theta)
    if family.layered_window:
        found["window"] = _read_window(config, found["depth"])
    return found


def _value(config: Mapping, key: Key):
    """What an entry says, in our words."""
    value = config.get(key.name, key.default)
    if key.values is not None:
        return choose(key.name, value, key.values)
    if value is None and (key.default is None or key.is_optional):
        return None
    if isinstance(key.default, bool):
        return _switch(config, key.name, key.default)
    if isinstance(key.default, float):
        return _number(key.name, value, "a number", numbers.Real, 0)
    return _whole(key.name, value, key.least + key.extra) - key.extra


def _switch(config: Mapping, name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} in the config must be true or false, got {value!r}")
    return value


def _whole(name: str, value, least: int = 1) -> int:
    return _number(name, value, "a whole number", numbers.Integral, least)


def _number(name: str, value, what: str, kind: type, least: int):
    if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
        raise ValueError(f"{name} in the config must be {what} of at least {least}, got {value!r}")
    return value


def _labels(config: Mapping) -> int:
    """How many labels a classifier has; transformers takes 2 if the config does not say it."""
    labels = config.get("id2label") or {}
    if not isinstance(labels, Mapping):
        raise ValueError(f"id2label in the config must map numbers to labels, got {labels!r}")
    return len(labels) or _whole("num_labels", config.get("num_labels") or 2)


def _has_bias(config: Mapping, bias: Bias) -> bool:
    return bias.switch is None or _switch(config, bias.switch, bias.default)


def _read_rotary(config: Mapping, theta: float) -> dict[str, Any]:
    """`rope_parameters` as of transformers 5, or `rope_theta` and `rope_scaling` as before, which it prefers."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError(
            f"rope_parameters or rope_scaling in the config must be one mapping for all layers, got {scaling!r}"
        )
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", config.get("rope_theta", theta))
    share = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor={share} is not supported (only 1.0)")
    is_default = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    return {"rotary_theta": theta, "rotary_scaling": None if is_default else scaling}


def _read_window(config: Mapping, depth: int) -> int | None:
    """The sliding window of all blocks, None if no block has one."""
    window = config.get("sliding_window", 4096) if _switch(config, "use_sliding_window", False) else None
    if window is None:
        return None
    _whole("sliding_window", window)
    kinds = config.get("layer_types")
    if kinds is None:
        first = _whole("max_window_layers", config.get("max_window_layers", 28), 0)
        kinds = [SLIDING if i >= first else FULL for i in range(depth)]
    if not isinstance(kinds, list) or len(kinds) != depth:
        raise ValueError(f"layer_types in the config must be a list of {depth} names, got {kinds!r}")
    for kind in kinds:
        choose("entry of layer_types in the config:", kind, (FULL, SLIDING))
    if set(kinds) == {FULL}:
        return None
    if set(kinds) != {SLIDING}:
        raise ValueError(
            "a sliding window in only some of the blocks (layer_types, max_window_layers) is not supported"
        )
    return window


# --- writing -----------------------------------------------------------------------------------------


def resolved(model) -> dict[str, Any]:
    """The attributes of a model that say what it computes, each in one way only."""
    found = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    found = {name: value for name, value in found.items() if name not in IRRELEVANT}
    if found.get("head_width", 0) is None:
        found["head_width"] = model.width // model.heads
    if found.get("kv_heads", 0) is None:
        found["kv_heads"] = model.heads
    if found.get("hidden", 0) is None:
        found["hidden"] = model.mlp_ratio * model.width
    if found.get("rotary_scaling") is not None:
        scaling = dict(found["rotary_scaling"])
        is_default = scaling.get("rope_type", scaling.get("type")) == "default"
        found["rotary_scaling"] = None if is_default else scaling
    if found.get("vocabulary", 0) is None:
        found["vocabulary"] = model.classes
    if not found.get("experts", 0):
        found.pop("experts_per_token", None)
    unused = () if found.get("gated", False) else ("gate",)
    found["bias"] = frozenset(found.get("bias", ())).difference(unused)
    return found


def with_biases(family: Family, model, names) -> tuple[str, ...]:
    """The projections that have a bias in the narrowest checkpoint of the family that gives `names` one.

    Raises:
      ValueError: if no checkpoint of the family does.
    """
    groups = [bias.names for bias in family.bias if bias.switch is None or set(bias.names) & set(names)]
    found = tuple(name for group in groups for name in group)
    unused = () if getattr(model, "gated", False) else ("gate",)
    extra = sorted(set(names).difference(found, unused))
    if extra:
        raise ValueError(
            f"a checkpoint of {family.variants[0].architecture} has no bias of {', '.join(extra)}"
        )
    return found


def describe(family: Family, variant: Variant, model, config: Mapping, dtype: str) -> dict[str, Any]:
    """`config` with the entries that a checkpoint of `model` needs; those that fit already stay as they are.

    Args:
      model: of the family's class, without overrides for single layers.
      config: of the checkpoint that the model comes from, or only a `model_type`.
      dtype: of the parameters.

    Raises:
      ValueError: if the family's config cannot express an attribute of the model.
    """
    wanted = resolved(model)
    same = [name for name, value in family.requires.items() if isinstance(value, Same) and name in config]
    found = {**config, "architectures": [variant.architecture], **dict.fromkeys(same, wanted["width"])}
    found |= dict.fromkeys({"dtype", "torch_dtype"} & set(config) or {"dtype"}, dtype)
    implied = {"hidden": 4 * wanted["width"], "kv_heads": wanted.get("heads")}
    implied["head_width"] = wanted["width"] // wanted["heads"]
    for attribute, key in family.keys.items():
        now = _value(found, key)
        if (implied.get(attribute) if now is None else now) != wanted[attribute]:
            found[key.name] = _theirs(key, wanted[attribute])
    for bias in family.bias:
        if bias.switch is not None and _has_bias(found, bias) != bool(set(bias.names) & wanted["bias"]):
            found[bias.switch] = not _has_bias(found, bias)
    if variant.classes == "labels" and _labels(found) != wanted["classes"]:
        found["id2label"] = {str(i): f"LABEL_{i}" for i in range(wanted["classes"])}
        found["label2id"] = {label: int(i) for i, label in found["id2label"].items()}
    if family.theta is not None:
        _write_rotary(family, found, wanted["rotary_theta"], wanted["rotary_scaling"])
    if family.layered_window:
        _write_window(found, wanted["window"], wanted["depth"])
    _check(variant, wanted, resolved(family.model(**attributes(family, variant, found))))
    return found


def _theirs(key: Key, value):
    if key.values is None:
        return value + key.extra if key.extra else value
    return next((theirs for theirs, ours in key.values.items() if ours == value), value)


def _write_rotary(family: Family, config: dict, theta: float, scaling: Mapping | None) -> None:
    if _read_rotary(config, family.theta) == {"rotary_theta": theta, "rotary_scaling": scaling}:
        return
    config |= {"rope_theta": theta, "rope_scaling": scaling}  # all that transformers 4 reads
    config["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}


def _write_window(config: dict, window: int | None, depth: int) -> None:
    kinds = [FULL if window is None else SLIDING] * depth
    if "layer_types" in config and config["layer_types"] != kinds:
        config["layer_types"] = kinds
    if _read_window(config, depth) != window:
        config |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}


def _check(variant: Variant, wanted: Mapping, found: Mapping) -> None:
    for name, value in wanted.items():
        if found[name] == value:
            continue
        raise ValueError(
            f"a checkpoint of {variant.architecture} cannot express {name}={value!r} (it would mean {found[name]!r})"
        )
