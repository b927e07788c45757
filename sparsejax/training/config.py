"""The configuration of a run: defaults, checks, the resolved form and its hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sparsejax.masks import choose

DEFAULTS = {
    "seed": 0,
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0},
    "method": {"name": "dense"},
    "procedure": {"name": "single"},
    "batch_size": 128,
    "eval_batch_size": 1000,
    "steps": 1000,
    "log_every": 100,
    "eval_every": 500,
    "checkpoint_every": 500,
    "keep_checkpoints": 2,
    "curves": True,
}
# Fields that a run has only if they are given.
OPTIONAL = ("pretrained", "objective", "parameterization")
OBJECTIVE = {"distill": 0.0, "temperature": 1.0, "features": 0.0}
SECTIONS = tuple(name for name, value in DEFAULTS.items() if isinstance(value, dict))
POSITIVE = ("batch_size", "eval_batch_size", "steps", "log_every", "keep_checkpoints")
NON_NEGATIVE = ("eval_every", "checkpoint_every")


def resolve(config) -> dict[str, Any]:
    """The complete configuration as plain, JSON-able values.

    Missing fields get their defaults (`DEFAULTS`); lazy `ml_collections.FieldReference`s are evaluated;
    tuples become lists. Two configs that resolve to the same dictionary describe the same run.

    Args:
      config: an `ml_collections.ConfigDict` or any mapping.

    Raises:
      ValueError: one sentence, for an unknown field, a missing name, or a count out of range.
    """
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    for field in given:
        choose("configuration field", field, (*DEFAULTS, *OPTIONAL))
    given = {field: value for field, value in given.items() if field not in OPTIONAL or value}
    resolved = {}
    for field, default in DEFAULTS.items():
        value = given.get(field, default)
        if field in SECTIONS:
            value = _section(field, value, default, given)
        resolved[field] = value
    _check_counts(resolved)
    if "parameterization" in given:
        resolved["parameterization"] = _section("parameterization", given["parameterization"], {}, given)
    if "pretrained" in given:
        resolved["pretrained"] = _pretrained(given)
    if "objective" in given:
        resolved["objective"] = _objective(given)
    try:
        return json.loads(json.dumps(resolved, sort_keys=True))
    except TypeError as error:
        raise ValueError(f"the configuration holds a value that JSON cannot store: {error}") from None


def _section(field: str, value, default: dict, given: Mapping) -> dict:
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"config.{field} must be a mapping with a 'name', got {value!r}")
    value = dict(value)
    if field == "optimizer":
        value = {**default, **value}
    if field == "method":
        value.setdefault("seed", given.get("seed", DEFAULTS["seed"]))
    return value


def _pretrained(given: Mapping) -> dict:
    """The run whose weights this one starts from: this configuration, dense, with the overrides given."""
    overrides = given["pretrained"]
    if not isinstance(overrides, Mapping):
        raise ValueError(f"config.pretrained must be a mapping of fields to override, got {overrides!r}")
    inherited = {key: value for key, value in given.items() if key not in (*OPTIONAL, "method", "procedure")}
    # Only its last checkpoint is needed, and nothing is drawn or evaluated on the way.
    quiet = {"checkpoint_every": 0, "keep_checkpoints": 1, "eval_every": 0, "curves": False}
    config = resolve({**inherited, **quiet, **overrides})
    return config | {"checkpoint_every": config["steps"]}


def _objective(given: Mapping) -> dict:
    objective = dict(given["objective"])
    for key in objective:
        choose("field of config.objective", key, OBJECTIVE)
    objective = {**OBJECTIVE, **objective}
    if not 0 <= objective["distill"] <= 1:
        raise ValueError(f"config.objective.distill must be in [0, 1], got {objective['distill']}")
    if objective["temperature"] <= 0:
        raise ValueError(f"config.objective.temperature must be positive, got {objective['temperature']}")
    if objective["features"] < 0:
        raise ValueError(f"config.objective.features must be at least 0, got {objective['features']}")
    used = next((key for key in ("distill", "features") if objective[key]), None)
    if used and "pretrained" not in given:
        raise ValueError(f"config.objective.{used} needs config.pretrained, the run that gives the teacher")
    return objective


def _check_counts(resolved: Mapping) -> None:
    for names, least in ((POSITIVE, 1), (NON_NEGATIVE, 0)):
        for name in names:
            value = resolved[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"config.{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(resolved["seed"], int) or resolved["seed"] < 0:
        raise ValueError(f"config.seed must be a non-negative integer, got {resolved['seed']!r}")


def canonical(resolved: Mapping) -> str:
    """The resolved configuration as JSON with sorted keys and no spaces: equal runs, equal text."""
    return json.dumps(resolved, sort_keys=True, separators=(",", ":"))


def config_hash(config) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the canonical, resolved configuration."""
    return hashlib.sha256(canonical(resolve(config)).encode()).hexdigest()[:12]


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """The fields in which two resolved configurations differ, each as `path: old -> new`."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, "unset"), new.get(key, "unset")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return found
