"""ZipLM: what is chosen is what is built, budgets of weights and of time are met, and the distillation loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress import latency
from sparsejax.compress.evaluate import perplexity
from sparsejax.compress.latency import measure_latency, time_models, time_of
from sparsejax.compress.ziplm import distillation_loss, grid, ziplm
from sparsejax.models import Transformer

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 31, (6, 12))
MODEL = Transformer(classes=31, depth=2, width=16, heads=4, max_length=12, hidden=32)
FAST = dict(evaluations=12, starts=8, patience=4, sequences=6, ratio=0.7)


def noisy(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


PARAMS = noisy(MODEL)


def table(attention=(0.0, 1.0, 2.0, 3.0, 4.0), channel=0.25, rest=2.0):
    """Times that grow linearly: 1 per head and 0.25 per channel."""
    times = {}
    for i in (0, 1):
        times[f"block_{i}/attention"] = {str(size): float(time) for size, time in enumerate(attention)}
        times[f"block_{i}/mlp"] = {"0": 0.0, "32": 32 * channel}
    return {"times": times, "rest": rest, "dense": rest + 2 * (attention[-1] + 32 * channel)}


def test_sizes_of_the_database():
    assert grid(4, "attention") == [4, 3, 2, 1, 0]
    assert grid(10, "mlp") == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    sizes = grid(1000, "mlp")
    assert sizes[:4] == [1000, 900, 810, 729] and sizes[-2:] == [1, 0] and sorted({*sizes})[::-1] == sizes


def test_the_loss_is_that_of_the_sizes_that_weights_ask_for():
    found = ziplm(**FAST).run(MODEL, PARAMS, TOKENS, 0.37, progress=False)
    assert not {found.report["choice"][f"block_{i}/mlp"] for i in (0, 1)} <= {*grid(32, "mlp", 0.7)}  # moved
    loss = perplexity(found.model, found.params, TOKENS, progress=False)["loss"]
    assert found.report["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_sliced_model_loses_as_many_weights_as_asked():
    model = MODEL.clone(norm="rms", norm_width=16, layers=({"stream": (16, 16, 16)},) * 2)
    found = ziplm(**FAST).run(model, noisy(model), TOKENS, 0.3, progress=False)
    assert abs(found.report["sparsity"] - 0.3) * found.report["weights"] <= 16
    assert min(found.report["choice"].values()) > 0  # biases have no other place


def test_the_shrunk_model_is_the_stitched_one():
    found = ziplm(speedup=1.5, latency=table(), repeats=1, **FAST).run(
        MODEL, PARAMS, TOKENS, None, progress=False
    )
    loss = perplexity(found.model, found.params, TOKENS, progress=False)["loss"]
    assert found.report["loss"] == pytest.approx(loss, rel=1e-5)
    sizes = found.report["choice"]
    assert sizes == {key: entry["kept"] for key, entry in found.report["layers"].items()}
    spent = 2 + sum(size * (1 if "attention" in key else 0.25) for key, size in sizes.items())
    assert found.report["predicted"] == pytest.approx(26 / spent) and found.report["speedup"] > 0
    assert found.report["predicted"] >= 1.5 * (1 - 4 * 0.5e-4) and spent > 26 / 1.5 - 1.5
    json.dumps(found.report)


def test_a_speedup_of_one_changes_nothing():
    same = ziplm(speedup=1, latency=table(), repeats=1, **FAST).run(
        MODEL, PARAMS, TOKENS, None, progress=False
    )
    assert same.model == MODEL and same.report["predicted"] == 1 and same.report["evaluations"] == 1
    jax.tree.map(np.testing.assert_array_equal, same.params, PARAMS)


@pytest.mark.slow
def test_times_decide_what_goes():
    free = ziplm(speedup=1.5, latency=table(attention=(0.0,) * 5), repeats=1, **FAST)
    found = free.run(MODEL, PARAMS, TOKENS, None, progress=False).report["choice"]
    assert found["block_0/attention"] == found["block_1/attention"] == 4  # removing heads would save no time


def test_times_between_the_measured_ones():
    assert time_of(table(), (0, "mlp"), 8) == 2.0 and time_of(table(), (1, "attention"), 3) == 3.0


@pytest.fixture
def watched(monkeypatch):
    """The outputs of what would be measured, by name; each then takes one millisecond more than the one before."""
    seen = []

    def measure(functions, repeats):
        seen.append({name: function() for name, function in functions.items()})
        return {name: float(time + 1) for time, name in enumerate(functions)}

    monkeypatch.setattr(latency, "measure", measure)
    return seen


@pytest.mark.slow
def test_times_are_those_of_the_dtype_of_the_parameters(watched):
    model = MODEL.clone(depth=1, heads=1, hidden=2, norm="rms", bias=())
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), noisy(model))
    ziplm(speedup=1, **FAST).run(model, params, TOKENS, None, progress=False)
    blocks = [output for outputs in watched for name, output in outputs.items() if name.isdigit()]
    assert len(blocks) == 3 and {output.dtype for output in blocks} == {jnp.bfloat16.dtype}


def test_shortcuts_take_their_time_once_and_whatever_goes(watched):
    model = MODEL.clone(depth=1, norm="rms", norm_width=16, layers=({"stream": (16, 16, 16)},))
    found = measure_latency(model, {(0, "attention"): [4, 2], (0, "mlp"): [32, 8]}, 1, 4)
    assert found["times"] == {
        "block_0/attention": {"0": 0, "2": 0, "4": 1},
        "block_0/mlp": {"0": 0, "8": 0, "32": 1},
    }
    assert found["rest"] == 2 and found["dense"] == 4  # a millisecond of the shortcuts


@pytest.mark.slow
def test_measured_times():
    found = measure_latency(
        MODEL, {(i, sub): grid(4, sub) for i in (0, 1) for sub in ("attention", "mlp")}, 2, 8, repeats=3
    )
    assert found["times"]["block_0/attention"] == found["times"]["block_1/attention"]  # measured once
    assert sorted(found["times"]["block_0/mlp"]) == ["0", "1", "2", "3", "32", "4"]
    assert all(time > 0 for size, time in found["times"]["block_0/mlp"].items() if size != "0")
    dense = found["rest"] + 2 * (
        found["times"]["block_0/attention"]["4"] + found["times"]["block_0/mlp"]["32"]
    )
    assert found["dense"] == pytest.approx(dense)
    assert time_models({"a": MODEL}, 1, 4, repeats=1)["a"] > 0
    done = ziplm(speedup=1.01, repeats=3, **FAST).run(MODEL, PARAMS, TOKENS, None, progress=False)
    assert done.report["predicted"] >= 1.01 * 0.999 and done.report["latency"]["sequences"] == 6


def test_distillation_loss():
    logits, teacher = RANDOM.normal(size=(2, 3, 5)), RANDOM.normal(size=(2, 3, 5))
    states, others = RANDOM.normal(size=(2, 2, 3, 4)), RANDOM.normal(size=(2, 2, 3, 4))
    labels, chosen = RANDOM.integers(0, 5, (2, 3)), np.array([[1, 1, 0], [1, 0, 0]], bool)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    own, theirs = log_softmax(logits), log_softmax(teacher)
    task = -np.take_along_axis(own, labels[..., None], -1)[..., 0]
    divergence = (np.exp(theirs) * (theirs - own)).sum(-1)
    distance = np.linalg.norm(states - others, axis=-1).mean(0)
    expected = sum(
        weight * value[chosen].mean() for weight, value in ((0.5, task), (2, divergence), (3, distance))
    )
    found = distillation_loss(
        logits, teacher, list(states), list(others), labels, weights=(0.5, 2, 3), chosen=chosen
    )
    assert found == pytest.approx(expected, rel=1e-5)
    same = distillation_loss(logits, logits, list(states), list(states), labels, weights=(0, 1, 1))
    assert same == pytest.approx(0, abs=1e-6)
    towards = jax.grad(
        lambda t, h: distillation_loss(logits, t, [states[0]], [h], labels),
        (0, 1),
    )(teacher, others[0])
    assert not any(np.any(gradient) for gradient in towards)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ziplm(speedup=0.5), "speedup must be at least 1, got 0.5"),
        (lambda: ziplm(ratio=1.0), r"ratio must be in \(0, 1\), got 1.0"),
        (lambda: ziplm().run(MODEL, PARAMS, TOKENS, None), "needs a speedup or a sparsity, got speedup=None"),
        (lambda: ziplm(speedup=2).run(MODEL, PARAMS, TOKENS, 0.5), "got speedup=2 and sparsity=0.5"),
        (
            lambda: ziplm(speedup=20, latency=table(), **FAST).run(
                MODEL, PARAMS, TOKENS, None, progress=False
            ),
            "a speed-up of 20 leaves no time for the blocks, because the rest takes 2 of 26 milliseconds",
        ),
        (
            lambda: distillation_loss(
                np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), [], [1], np.zeros((1, 1), int)
            ),
            "student and teacher need a state of every block, got 0 and 1",
        ),
        (lambda: measure_latency(MODEL, {}, 1, 13), "one sequence of 1 to 12 tokens, got 1 of 13"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
