"""`training.run` end to end: what it leaves, what it prints, and what it refuses."""

import dataclasses
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen

from sparsejax import masks, training
from sparsejax.training import step as step_lib
from sparsejax.training.config import resolve
from sparsejax.training.curves import draw
from sparsejax.training.problem import load_problem
from sparsejax.training.session import Session
from sparsejax.transforms import build

KEYS = {
    "test_accuracy", "test_loss", "test_ece", "sparsity", "steps", "seconds", "train_flops_ratio",
    "inference_flops_ratio", "params", "nonzeros", "params_sha256", "masks_sha256", "config_hash",
    "exploration_rate",
}  # fmt: skip


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_everything_and_returns_when_finished(tiny, tmp_path, capsys):
    summary = training.run(tiny(curves=True), tmp_path)
    assert set(summary) == KEYS
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "config.json").read_text()) == training.resolve(tiny(curves=True))
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert summary["test_accuracy"] > 0.5  # chance is 0.1
    assert 0.8 > summary["exploration_rate"] > 0.2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    assert "test accuracy" in capsys.readouterr().out
    entries = metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [15, 30, 45, 60]
    assert [entry["step"] for entry in entries if "test_loss" in entry] == [30, 60]
    # Training under the mask keeps every weight outside it at zero: churn is what RigL moved.
    assert entries[0]["churn"] > 0 and entries[-1]["churn"] == 0
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    assert training.run(tiny(curves=True), tmp_path) == summary
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before
    assert "test accuracy" in capsys.readouterr().out


def test_metrics_hold_no_clock_and_repeat_exactly(tiny, tmp_path):
    first = training.run(tiny(), tmp_path / "a", progress=False)
    second = training.run(tiny(), tmp_path / "b", progress=False)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert {key for key in first if first[key] != second[key]} <= {"seconds"}


def test_dense_training_costs_one(tiny, tmp_path):
    summary = training.run(tiny(method={"name": "dense"}, checkpoint_every=0), tmp_path, progress=False)
    assert summary["train_flops_ratio"] == summary["inference_flops_ratio"] == 1.0
    assert summary["nonzeros"] == summary["params"] == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "magnitude"])
def test_pruning_at_initialisation(tiny, tmp_path, score):
    method = {"name": "fixed", "sparsity": 0.7, "score": score}
    if score == "synflow":
        method["rounds"] = 5
    summary = training.run(tiny(method=method, steps=20, checkpoint_every=0), tmp_path, progress=False)
    assert summary["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert summary["train_flops_ratio"] == pytest.approx(summary["inference_flops_ratio"])


def test_random_masks_with_the_densities_of_a_score(tiny, tmp_path):
    method = {"name": "fixed", "sparsity": 0.7}
    common = {"steps": 5, "checkpoint_every": 0}
    training.run(tiny(method={**method, "score": "snip"}, **common), tmp_path / "a", progress=False)
    training.run(tiny(method={**method, "allocation": "snip"}, **common), tmp_path / "b", progress=False)
    scored, shuffled = metrics(tmp_path / "a")[-1]["density"], metrics(tmp_path / "b")[-1]["density"]
    for name, density in scored.items():
        assert shuffled[name] == pytest.approx(density, abs=0.01)


def test_gradual_cost_is_integrated_over_the_run(tiny, tmp_path):
    method = {"name": "gradual", "sparsity": 0.8, "end": 40, "update_every": 1}
    summary = training.run(tiny(method=method, checkpoint_every=0), tmp_path, progress=False)
    assert summary["inference_flops_ratio"] < summary["train_flops_ratio"] < 1.0


def test_regression_has_a_loss_and_no_accuracy(tiny, tmp_path):
    config = tiny(data={"name": "diabetes"}, method={"name": "dense"}, curves=True)
    config.optimizer.learning_rate = 0.01
    summary = training.run(config, tmp_path, progress=False)
    assert "test_accuracy" not in summary and 0 < summary["test_loss"] < 1.5
    assert not any("accuracy" in key for entry in metrics(tmp_path) for key in entry)


def test_batch_statistics_are_trained(tiny):
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            x = x.reshape(len(x), -1)
            return linen.Dense(10)(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))

    problem = load_problem(resolve(tiny(method={"name": "dense"})), None)
    session = Session(dataclasses.replace(problem, model=Normed()))
    carry = session.start(0, None)
    batch = next(iter(session.problem.batches(1)))
    state = session.train_step(problem.phases[0], carry.state)(carry.state, batch)
    expected = 0.1 * batch["x"].reshape(64, -1).mean(axis=0)
    np.testing.assert_allclose(state.collections["batch_stats"]["BatchNorm_0"]["mean"], expected, atol=1e-6)


def test_gradient_is_that_of_the_masked_weights():
    """One SGD step on a linear model against the closed form, with the growth gradient dense."""
    seen = []

    class Linear(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            return linen.Dense(1, use_bias=False)(x)

    class Recorder:
        @staticmethod
        def update(grads, state, params, **extra):
            jax.debug.callback(lambda g: seen.append(np.asarray(g)), grads["Dense_0"]["kernel"])
            return jax.tree.map(jnp.zeros_like, grads), state

    params = {"Dense_0": {"kernel": jnp.array([[1.0], [2.0]])}}
    mask = {"Dense_0": {"kernel": jnp.array([[True], [False]])}}
    opt_state = build("fixed", optax.sgd(0.1), masks=mask).init(params)
    step = step_lib.make_train_step(Linear(), Recorder, None, seed=0)
    batch = {"x": np.array([[1.0, 3.0]], np.float32), "y": np.array([[5.0]], np.float32)}
    jax.block_until_ready(step(step_lib.new_state(params, {}, opt_state), batch))
    jax.effects_barrier()
    # loss (w1 x1 - y)^2 with the second weight masked: gradient 2 (1 - 5) x, also for the masked weight
    np.testing.assert_allclose(seen[0], [[-8.0], [-24.0]])


def test_evaluation_counts_every_sample_once():
    x, y = np.arange(10.0, dtype=np.float32)[:, None], np.arange(10, dtype=np.int32)
    parts = list(step_lib.padded_batches(x, y, 4))
    assert [len(part["x"]) for part in parts] == [4, 4, 4]
    weights = np.concatenate([part["weight"] for part in parts])
    assert weights.sum() == 10
    np.testing.assert_array_equal(np.concatenate([part["y"] for part in parts])[weights > 0], y)


def test_measure_masks_agrees_with_the_library():
    old = {"kernel": jnp.array([[1, 1, 0], [0, 1, 0]], bool), "bias": jnp.asarray(True)}
    new = {"kernel": jnp.array([[1, 0, 1], [0, 1, 1]], bool), "bias": jnp.asarray(True)}
    found = step_lib.measure_masks(new, old, old)
    assert found["sparsity"] == masks.sparsity(new)
    assert found["churn"] == masks.churn(old, new)
    assert found["density"] == masks.densities(new)
    assert found["exploration_rate"] == 0.5


def test_non_finite_loss_stops_with_the_step(tiny, tmp_path):
    config = tiny(method={"name": "dense"}, steps=200, eval_every=0, log_every=1, checkpoint_every=1)
    config.optimizer.learning_rate = 1e12
    with pytest.raises(FloatingPointError, match=r"finite.* at step \d+; the last good checkpoint, of step"):
        training.run(config, tmp_path, progress=False)
    assert not (tmp_path / "summary.json").exists()
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        arguments = ocp.args.Composite(tree=ocp.args.StandardRestore())
        kept = manager.restore(manager.latest_step(), args=arguments).tree
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept["state"]["params"]))
    assert all(np.isfinite(entry["train_loss"]) for entry in metrics(tmp_path))


def test_other_config_in_workdir_is_named(tiny, tmp_path):
    training.run(tiny(steps=5, checkpoint_every=0), tmp_path, progress=False)
    other = tiny(steps=6, checkpoint_every=0)
    other.optimizer.learning_rate = 0.2
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.1 -> 0.2; steps: 5 -> 6"):
        training.run(other, tmp_path, progress=False)


def test_unwritable_workdir_is_one_sentence(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="file/w' is not writable"):
        training.run(tiny(), tmp_path / "file" / "w", progress=False)


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw(tmp_path, {"sparsity": 0.5, "train_flops_ratio": 1.0})
    assert os.listdir(tmp_path) == []
