"""Runs that start from others, distillation, extra collections and losses, parameterizations, metrics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from sparsejax import parameterizations, training, transforms
from sparsejax.masks import get_masks
from sparsejax.parameterizations import Parameterized
from sparsejax.training import step as step_lib

BATCH = {"x": np.array([[1.0, 3.0], [2.0, -1.0]], np.float32), "y": np.array([0, 1], np.int32)}


def states(tx, params, collections=None):
    return step_lib.new_state(params, collections or {}, tx.init(params))


class Linear(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return linen.Dense(2, use_bias=False)(x)


def test_a_run_starts_from_the_pretrained_weights_and_shares_them(tiny, tmp_path):
    config = tiny(method={"name": "one_shot", "at": 59, "sparsity": 0.5}).to_dict()
    config["pretrained"] = {"steps": 40}
    config["optimizer"] = {"name": "sgd", "learning_rate": 0.0}
    config["pretrained"]["optimizer"] = {"name": "sgd", "learning_rate": 0.1}
    training.run(
        {**config, "method": {"name": "dense"}}, tmp_path / "a", progress=False, runs=tmp_path / "runs"
    )
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    before = (folder / "summary.json").stat().st_mtime_ns
    pretrained = json.loads((folder / "summary.json").read_text())
    still = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert pretrained["steps"] == 40 and still["params_sha256"] == pretrained["params_sha256"]
    summary = training.run(config, tmp_path / "b", progress=False, runs=tmp_path / "runs")
    assert summary["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (folder / "summary.json").stat().st_mtime_ns == before, "trained a second time"


def test_masks_of_the_pretrained_run_are_kept(tiny, tmp_path):
    config = tiny(method={"name": "fixed", "score": "pretrained"}).to_dict()
    method = {"name": "rigl", "sparsity": 0.8, "update_every": 10}
    config["pretrained"] = {"method": method}
    summary = training.run(config, tmp_path / "a", progress=False)
    (folder,) = [path for path in (tmp_path / "a" / "pretrained").iterdir() if path.is_dir()]
    assert summary["masks_sha256"] == json.loads((folder / "summary.json").read_text())["masks_sha256"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective": {"distill": 0.5}}, "distill needs config.pretrained"),
        ({"objective": {"distill": 2.0}, "pretrained": {"steps": 5}}, "distill must be in"),
        ({"objective": {"distil": 0.5}, "pretrained": {"steps": 5}}, "did you mean 'distill'"),
        ({"objective": {"temperature": 0.0}}, "temperature must be positive, got 0.0"),
        ({"pretrained": {"stpes": 5}}, "did you mean 'steps'"),
        (
            {"pretrained": {"steps": 5, "model": {"name": "mlp", "hidden": [8]}}},
            "do not fit the model: dense_0",
        ),
        ({"method": {"name": "fixed", "score": "pretrained"}}, "needs config.pretrained"),
        ({"parameterization": {"name": "monarhc"}}, "unknown parameterization 'monarhc'"),
    ],
)
def test_mistakes_are_named(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        training.run({**tiny().to_dict(), **change}, tmp_path / "run", progress=False)


def test_distillation_against_the_closed_form():
    params = {"Dense_0": {"kernel": jnp.array([[0.5, -0.2], [0.1, 0.3]])}}
    taught = {"Dense_0": {"kernel": jnp.array([[1.5, 0.2], [-0.4, 0.8]])}}
    tx = transforms.build("dense", optax.sgd(0.0))
    teacher = step_lib.Teacher(Linear(), {"params": taught}, weight=0.75, temperature=2.0)
    step = step_lib.make_train_step(Linear(), tx, 2, seed=0, teacher=teacher)
    loss = step(states(tx, jax.tree.map(jnp.copy, params)), BATCH).meters["loss"]
    student, target = (
        BATCH["x"] @ np.asarray(tree["Dense_0"]["kernel"], np.float64) for tree in (params, taught)
    )

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    entropy = -np.log(softmax(student)[[0, 1], BATCH["y"]]).mean()
    p, q = softmax(target / 2), softmax(student / 2)
    expected = 0.25 * entropy + 0.75 * 4.0 * (p * np.log(p / q)).sum(1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_collections_are_carried_and_sown_losses_added():
    class Counter(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            calls = self.variable("counter", "calls", lambda: jnp.zeros([], jnp.int32))
            self.variable("constants", "support", lambda: jnp.arange(3))
            if train:
                calls.value += 1
                self.sow("losses", "one", 10.0)
                self.sow("losses", "two", 5.0)
            return linen.Dense(2, use_bias=False)(x)

    model, tx = Counter(), transforms.build("dense", optax.sgd(0.0))
    variables = model.init(jax.random.key(0), BATCH["x"])
    params, collections = variables["params"], {k: variables[k] for k in ("counter", "constants")}
    plain = step_lib.make_train_step(Linear(), tx, 2, seed=0)
    base = float(plain(states(tx, jax.tree.map(jnp.copy, params)), BATCH).meters["loss"])
    state = states(tx, params, collections)
    step = step_lib.make_train_step(model, tx, 2, seed=0)
    state = step(step(state, BATCH), BATCH)
    np.testing.assert_allclose(state.meters["loss"], 2 * (base + 15.0), rtol=1e-6)
    assert int(state.collections["counter"]["calls"]) == 2
    np.testing.assert_array_equal(state.collections["constants"]["support"], [0, 1, 2])


class Doubled:
    """Weights are twice the latent ones plus noise; counts its calls and asks for a penalty."""

    def init(self, key, params):
        return {"params": jax.tree.map(lambda w: w / 2, params)}, {"calls": jnp.zeros([], jnp.int32)}

    def materialize(self, latent, state, key=None):
        params = jax.tree.map(lambda w: 2 * w, latent["params"])
        if key is None:
            return params, state, 0.0
        return params, {"calls": state["calls"] + 1}, 7.0

    def masks(self, latent, state):
        return None


def test_a_parameterized_model_trains_like_a_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(parameterizations.PARAMETERIZATIONS, "doubled", Doubled)
    config = tiny(method={"name": "rigl", "sparsity": 0.8, "update_every": 10}).to_dict()
    config["optimizer"] = {"name": "sgd", "learning_rate": 0.1}
    config["parameterization"] = {"name": "doubled"}
    summary = training.run(config, tmp_path / "run", progress=False)
    assert summary["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert summary["inference_flops_ratio"] == pytest.approx(0.2, abs=0.05)
    assert summary["test_accuracy"] > 0.5


def test_adapter_calls_the_model_and_passes_state_and_penalty():
    model = Parameterized(Linear(), Doubled())
    variables = model.init(jax.random.key(0), BATCH["x"])
    plain = Linear().init(jax.random.key(0), BATCH["x"])
    np.testing.assert_allclose(
        model.apply(variables, BATCH["x"]), Linear().apply(plain, BATCH["x"]), rtol=1e-6
    )
    _, updated = model.apply(
        variables, BATCH["x"], train=True, mutable=["losses"], rngs={"sample": jax.random.key(1)}
    )
    assert updated["losses"]["parameterization"] == 7.0 and int(updated["parameterization"]["calls"]) == 1


def test_models_that_read_masks_get_them_unapplied():
    class Reader(linen.Module):
        reads_masks = True

        @linen.compact
        def __call__(self, x, train=False):
            return x @ self.param("kernel", linen.initializers.ones, (2, 2))

    params = {"kernel": jnp.ones((2, 2))}
    tx = transforms.build("fixed", optax.sgd(0.1), masks={"kernel": jnp.eye(2, dtype=bool)})
    found = step_lib.model_variables(Reader(), params, {}, tx.init(params))
    np.testing.assert_array_equal(found["params"]["kernel"], 1.0)
    assert found["masks"] is get_masks(tx.init(params)) or found["masks"]["kernel"].sum() == 2
    applied = step_lib.model_variables(Linear(), params, {}, tx.init(params))
    np.testing.assert_array_equal(applied["params"]["kernel"], np.eye(2))


def test_calibration_error_against_the_definition():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 2
    labels = np.random.default_rng(1).integers(0, 4, 50).astype(np.int32)

    class Identity(linen.Module):
        def __call__(self, x, train=False):
            return x

    tx = transforms.build("dense", optax.sgd(0.1))
    parts = list(step_lib.padded_batches(logits, labels, 16))
    found = step_lib.evaluate(step_lib.make_eval_step(Identity(), 4), states(tx, {"w": jnp.ones(1)}), parts)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found["ece"] == pytest.approx(expected, abs=1e-6)
    assert found["accuracy"] == pytest.approx(right.mean())


def test_sequences_are_averaged_over_positions():
    outputs, targets = np.random.default_rng(0).normal(size=(2, 3, 5)), np.array([[0, 1, 2], [3, 4, 0]])
    loss, correct = step_lib.objective(jnp.asarray(outputs), jnp.asarray(targets), 5)
    log = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    picked = np.take_along_axis(log, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -picked.mean(1), rtol=1e-5)
    np.testing.assert_allclose(correct, (outputs.argmax(-1) == targets).mean(1), rtol=1e-6)
