"""Distillation of features: the distance and the loss of a step by hand, and models that sow none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import models
from sparsejax.training import run
from sparsejax.training.step import Teacher, distance, make_train_step, new_state
from sparsejax.transforms import dense

VIT = {"patch": 4, "width": 8, "depth": 2, "heads": 2, "mlp_ratio": 1}


def test_distance_is_the_mean_over_arrays_of_mean_squares():
    ours = {"block": (jnp.array([1.0, 3.0]), jnp.zeros((2, 2)))}
    theirs = {"block": (jnp.array([0.0, 1.0]), jnp.full((2, 2), 3.0))}
    np.testing.assert_allclose(distance(theirs, ours), ((1 + 4) / 2 + 9) / 2)


@pytest.mark.slow
def test_loss_of_a_step_by_hand():
    model = models.build("vit", classes=3, **VIT)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 8, 8, 1)).astype(np.float32), rng.integers(3, size=5)
    student, teacher = (model.init(jax.random.key(seed), x) for seed in (0, 1))
    (logits, ours), (target, theirs) = (
        model.apply(variables, x, mutable=["features"]) for variables in (student, teacher)
    )
    log_p, log_q, log_t = (
        np.asarray(jax.nn.log_softmax(values)) for values in (logits, logits / 2, target / 2)
    )
    labels = -np.mean(log_p[np.arange(5), y])
    divergence = 4 * np.mean(np.sum(np.exp(log_t) * (log_t - log_q), -1))
    pairs = zip(ours["features"]["block"], theirs["features"]["block"], strict=True)
    blocks = [np.mean((np.asarray(a) - b) ** 2) for a, b in pairs]
    assert len(blocks) == 2

    tx = dense(optax.sgd(0.1))
    step = make_train_step(model, tx, 3, 0, teacher=Teacher(model, teacher, 0.25, 2.0, 3.0))
    state = new_state(student["params"], {}, tx.init(student["params"]))
    found = step(state, {"x": x, "y": y}).meters["loss"]
    np.testing.assert_allclose(found, 0.75 * labels + 0.25 * divergence + 3 * np.mean(blocks), rtol=1e-5)


def test_a_model_without_features_is_refused(tmp_path):
    config = {
        "data": {"name": "digits"},
        "model": {"name": "mlp", "hidden": (8,)},
        "method": {"name": "dense"},
        "pretrained": {"steps": 2},
        "objective": {"features": 1.0},
        "steps": 2,
        "curves": False,
    }
    with pytest.raises(ValueError, match="needs a model that sows `features`"):
        run(config, tmp_path, progress=False)
