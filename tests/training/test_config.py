"""Resolving configurations: defaults, hashes, and one sentence for every mistake."""

import json

import jax.numpy as jnp
import ml_collections
import optax
import pytest

from sparsejax import training
from sparsejax.training.config import DEFAULTS, differences
from sparsejax.training.optimizers import build_optimizer


def test_resolved_config_is_plain_json(tiny):
    resolved = training.resolve(tiny())
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["model"]["hidden"] == [32, 16]
    assert resolved["optimizer"]["warmup_steps"] == DEFAULTS["optimizer"]["warmup_steps"]
    assert resolved["method"]["seed"] == resolved["seed"]


def test_references_follow_an_override():
    steps = ml_collections.FieldReference(100)
    config = ml_collections.ConfigDict({"steps": steps, "method": {"name": "rigl"}})
    config.method.update_end = steps * 3 // 4
    config.steps = 500
    assert training.resolve(config)["method"]["update_end"] == 375


def test_hash_depends_on_values_only(tiny):
    reversed_fields = dict(reversed(list(tiny().to_dict().items())))
    assert training.config_hash(tiny()) == training.config_hash(reversed_fields)
    assert training.config_hash(tiny()) == training.config_hash(tiny(seed=0))
    assert training.config_hash(tiny()) != training.config_hash(tiny(seed=1))
    assert len(training.config_hash(tiny())) == 12


def test_differences_name_the_fields():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    assert differences(old, {"a": 1, "b": {"c": 5}}) == ["b.c: 2 -> 5", "b.d: 3 -> 'unset'"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, "unknown configuration field 'stepz'; did you mean 'steps'?"),
        ({"steps": 0}, "config.steps must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "config.batch_size must be an integer of at least 1, got 1.5"),
        ({"seed": -1}, "config.seed must be a non-negative integer, got -1"),
        ({"data": {"augment": "none"}}, "config.data must be a mapping with a 'name'"),
    ],
)
def test_mistakes_get_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        training.resolve(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {"name": "digit"}}, "'digit'; did you mean 'digits'"),
        ({"model": {"name": "mlpp"}}, "'mlpp'; did you mean 'mlp'"),
        ({"method": {"name": "rigll"}}, "'rigll'; did you mean 'rigl'"),
        (
            {"method": {"name": "rigl", "sparsity": 0.5, "update_evry": 3}},
            "'update_evry'; did you mean 'update_every'",
        ),
        (
            {"method": {"name": "fixed", "sparsity": 0.5, "score": "snap"}},
            "unknown score 'snap'; did you mean 'snip'",
        ),
        ({"optimizer": {"name": "sdg", "learning_rate": 1.0}}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ({"optimizer": {"name": "sgd", "momentun": 0.9}}, "'momentun'; did you mean 'momentum'"),
        ({"optimizer": {"name": "sgd", "schedule": "cosin"}}, "'cosin'; did you mean 'cosine'"),
        ({"optimizer": {"name": "sgd", "warmup_steps": 60}}, r"warmup_steps=60 must lie in \[0, steps=60\)"),
        ({"procedure": {"name": "omp"}}, "unknown procedure 'omp'"),
        ({"procedure": {"name": "imp", "round": 3}}, "'round'; did you mean 'rounds'"),
    ],
)
def test_unknown_names_are_listed(tiny, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        training.run(tiny(**fields), tmp_path / "w", progress=False)


def test_every_optax_optimizer_with_a_learning_rate_is_known():
    for name in ("sgd", "adam", "adamw", "lion", "rmsprop", "adafactor", "lamb"):
        config = {"name": name, "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0}
        tx, schedule = build_optimizer(config, 10)
        params = {"w": jnp.ones((4, 4))}
        updates, _ = tx.update(params, tx.init(params), params)
        assert float(schedule(9)) == pytest.approx(0.1) and float(updates["w"].max()) < 0, name


def test_weight_decay_is_the_l2_penalty_for_sgd():
    config = {
        "name": "sgd",
        "learning_rate": 0.5,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.1,
    }
    tx, _ = build_optimizer(config, 10)
    gradient, weight = jnp.array(1.0), jnp.array(4.0)
    updates, _ = tx.update(gradient, tx.init(weight), weight)
    assert float(updates) == pytest.approx(-0.5 * (1.0 + 0.1 * 4.0))


def test_schedules_match_optax():
    config = {
        "learning_rate": 0.3,
        "warmup_steps": 10,
        "schedule": "cosine",
        "final_factor": 0.1,
        "name": "sgd",
    }
    _, schedule = build_optimizer(config, 110)
    expected = optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 110, end_value=0.03)
    for step in (0, 5, 10, 60, 109):
        assert float(schedule(step)) == pytest.approx(float(expected(step)), rel=1e-5)
