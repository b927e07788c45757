"""PAT against its definition: hidden states with explicit modules, the schedule in NumPy, the small and the full model."""

import importlib
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from sparsejax.compress import CompressionWarning
from sparsejax.compress.pat import (
    budget_loss,
    fixed_mask_at,
    identity_loss,
    init,
    mask_at,
    materialize,
    merge,
    objective,
    pat,
    separation_loss,
    untied,
)
from sparsejax.compress.shrink import shrink
from sparsejax.masks import flatten
from sparsejax.models import Transformer

TOKENS = np.random.default_rng(0).integers(0, 11, (8, 6))
RMS = {
    "norm": "rms",
    "positions": "rotary",
    "gated": True,
    "activation": "silu",
    "bias": ("query", "out", "down"),
}


def model_of(seed=0, **keywords):
    model = Transformer(11, depth=2, width=12, heads=2, hidden=10, max_length=6).clone(**{**RMS, **keywords})
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1])["params"]
    ones = jax.tree.map(lambda x: np.ones(x.shape) if len(x.shape) == 1 else np.zeros(x.shape), shapes)
    return model, disturbed(ones, seed)


def start(model, params, rank=3, lora_rank=2):
    """Trained parameters at their first values."""
    return jax.jit(lambda key: init(key, model, params, rank, lora_rank))(jax.random.key(1))


@pytest.fixture(scope="module")
def dense():
    return model_of()


def disturbed(trained, seed=1):
    """Parameters that are nowhere at their first values."""
    rng = np.random.default_rng(seed)

    def move(x):
        return jnp.asarray(np.asarray(x, np.float32) + 0.3 * rng.normal(size=x.shape).astype(np.float32))

    return jax.tree.map(move, trained)


def logits(model, params):
    return jax.jit(lambda params: model.apply({"params": params}, TOKENS))(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keywords",
    [{}, {"experts": 3}, {"positions": "learned", "gated": False}, {"layers": ({"heads": 0}, {"hidden": 0})}],
)
def test_at_the_start_the_network_is_the_base_model(keywords):
    model, params = model_of(**keywords)
    trained = start(model, params)
    same = jax.jit(materialize)(params, trained, mask_at(trained["theta"], 0, 50), 0.2)
    chex.assert_trees_all_close(same, params, atol=1e-6)
    for gains in trained["modules"].values():
        assert 0.1 < float(jnp.abs(gains["a"]).max()) * math.sqrt(12) <= 1


def test_merged_weights_are_modules_behind_the_layers(dense):
    """The same model with LoRA and h = v * m * (y + B A y) applied to activations, by intercepting its layers."""
    model, params = dense
    trained = disturbed(start(model, params))
    mask = jnp.linspace(0, 1, 12)

    def tap(call, args, kwargs, about):
        y = call(*args, **kwargs)
        path = "/".join(about.module.path)
        if about.method_name != "__call__" or type(about.module).__name__ not in ("Dense", "Embed"):
            return y
        if f"{path}/kernel" in trained["lora"]:
            own = trained["lora"][f"{path}/kernel"]
            y = y + 0.7 * (args[0] @ own["a"]) @ own["b"]
        if path in trained["modules"]:
            own = trained["modules"][path]
            y = own["v"] * mask * (y + jnp.einsum("dr,rc,...c->...d", own["b"], own["a"], y))
        return y

    assert set(trained["modules"]) == {
        "embed",
        *(f"block_{i}/{x}" for i in range(2) for x in ("attention/out", "mlp/down")),
    }
    assert len(trained["lora"]) == 14
    outer = []

    def once(call, args, kwargs, about):
        """A layer's call goes on to that of its base class: only the outer one counts."""
        if about.module.path in outer:
            return call(*args, **kwargs)
        outer.append(about.module.path)
        y = tap(call, args, kwargs, about)
        outer.remove(about.module.path)
        return y

    with linen.intercept_methods(once):
        expected = logits(model, params)
    found = logits(model, jax.jit(materialize)(params, trained, mask, 0.7))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert float(jnp.abs(found - logits(model, params)).max()) > 0.1


def test_the_schedule_of_the_mask():
    theta, steps = np.linspace(-0.6, 0.6, 7), 10_000
    for t in (0, 1, 3000, 5000, 7999, 8000, 9999):
        at = min(max(t, 1), 8000)
        tau = 1 / (1 - math.log(at) / math.log(steps) + 1e-6)
        expected = 1 / (1 + np.exp(-tau * theta)) + max(0.5 - t / steps, 0)
        np.testing.assert_allclose(mask_at(jnp.asarray(theta), t, steps), expected, rtol=1e-4)
    assert tau == pytest.approx(41, abs=1)
    np.testing.assert_array_equal(mask_at(jnp.zeros(3), 0, steps), 1)
    fixed = [fixed_mask_at(5, 3, t, 100) for t in (0, 50, 100)]
    np.testing.assert_allclose(fixed[0], 1)
    np.testing.assert_allclose(fixed[1], [1, 1, 1, *[math.exp(-1.385)] * 2], rtol=1e-6)
    np.testing.assert_allclose(fixed[2][3:], math.exp(-2.77), rtol=1e-6)


def test_the_mask_stops_following_theta(dense):
    """From 0.8 T on the gradient of theta is that of the budget and the separation alone."""
    model, params = dense
    trained = disturbed(start(model, params))
    settings = (8, 50, 0.2, True, "learned")

    @jax.jit
    def gradient(step):
        return jax.grad(lambda x: objective(x, params, TOKENS, step, model, settings)[0])(trained)["theta"]

    alone = jax.grad(lambda theta: budget_loss(theta, 8) + separation_loss(theta))(trained["theta"])
    np.testing.assert_allclose(gradient(40), alone, rtol=1e-5)
    np.testing.assert_allclose(gradient(49), alone, rtol=1e-5)
    assert float(jnp.abs(gradient(39) - alone).max()) > 1e-4


def test_the_losses():
    theta = jnp.array([0.4, -0.3, 0.0, 0.9, -1.0])
    assert budget_loss(theta, 3) == 0  # zero counts as kept here
    assert budget_loss(theta, 2) == pytest.approx(5) and budget_loss(theta, 4) == pytest.approx(2.5)
    np.testing.assert_allclose(jax.grad(budget_loss)(theta, 2), np.full(5, 5.0))
    np.testing.assert_allclose(jax.grad(budget_loss)(theta, 4), np.full(5, -2.5))
    np.testing.assert_array_equal(jax.grad(budget_loss)(theta, 3), np.zeros(5))
    expected = np.mean([0.1**2, 0.4**2]) + np.mean([0.2**2, 0.5**2, 0.5**2])
    assert separation_loss(theta) == pytest.approx(expected)
    assert separation_loss(jnp.zeros(4)) == pytest.approx(0.25)
    a = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = sum(((x @ x.T - np.eye(3)) ** 2).mean() for x in a)
    assert identity_loss({"x": {"a": a[0]}, "y": {"a": a[1]}}) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keywords",
    [
        {"qk_norm": True},
        {"tied": True, "kv_heads": 1},
        {"positions": "learned"},
        {"experts": 3},
        {"layers": ({"heads": 0}, {"hidden": 0})},
    ],
)
def test_the_small_model_is_the_masked_one(keywords):
    model, params = untied(*model_of(**keywords))
    trained = disturbed(start(model, params))
    kept = [1, 2, 5, 6, 7, 10, 11]
    mask = jnp.zeros(12).at[np.array(kept)].set(1)
    expected = logits(model, jax.jit(materialize)(params, trained, mask, 0.3))
    small, small_params = merge(model, params, trained, kept, 0.3)
    np.testing.assert_allclose(logits(small, small_params), expected, rtol=1e-4, atol=1e-4)
    assert (small.width, small.norm_width, small.tied) == (7, None, False)
    assert small.epsilon == pytest.approx(1e-6 * 12 / 7)
    assert all(
        12 not in x.shape
        for name, x in flatten(small_params).items()
        if not any(part in name for part in ("query", "key", "value", "attention/out"))
    )
    full = jax.eval_shape(small.init, jax.random.key(0), TOKENS[:1])["params"]
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, small_params)


def test_untied_is_the_same_function():
    model, params = model_of(tied=True)
    other, other_params = untied(model, params)
    np.testing.assert_allclose(logits(other, other_params), logits(model, params), rtol=1e-5, atol=1e-5)
    assert "head" in other_params and not other.tied


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["learned", "fixed"])
def test_a_run_removes_the_asked_channels(dense, mask):
    model, params = dense
    options = {"steps": 12, "batch": 4, "learning_rate": 1e-3, "rank": 2, "lora_rank": 2, "mask": mask}
    found = pat(**options).run(model, params, TOKENS, 0.3)
    assert found.model.width == 12 - 3 == len(found.report["kept"])
    assert found.report["sparsity"] == pytest.approx(0.25) and found.masks is None
    if mask == "fixed":
        assert found.report["kept"] == list(range(9))
    before, after = (
        sum(x.size for n, x in flatten(p).items() if n.endswith("kernel")) for p in (params, found.params)
    )
    assert after == 0.75 * before
    again = pat(**options).run(model, params, TOKENS, 0.3)
    chex.assert_trees_all_equal(again.params, found.params)
    assert again.report == found.report
    assert logits(found.model, found.params).shape == (8, 6, 11)


def test_sparsity_zero_leaves_the_model_as_it_is(dense):
    found = pat().run(*dense, TOKENS, 0.0)
    assert found.model == dense[0]
    chex.assert_trees_all_equal(found.params, dense[1])


@pytest.mark.slow
def test_bfloat16_stays():
    model, params = model_of(kv_heads=1, tied=True)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), params)
    found = pat(steps=3, batch=4, rank=2, lora_rank=2).run(model, params, TOKENS, 0.5)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_tree_all_finite(found.params)


def test_the_default_trains_for_long_enough(dense, monkeypatch):
    """Of 8 sequences 3 epochs are 3 steps; the defaults have 1000, of the rates that the paper's give 10^4 steps."""
    found = []

    def stop(steps, *rates):
        found.append((steps, *rates))
        raise RuntimeError("stop")

    monkeypatch.setattr(importlib.import_module("sparsejax.compress.pat"), "_optimizer", stop)
    for keywords in ({}, {"steps": 10_000}):
        with pytest.raises(RuntimeError, match="stop"):
            pat(**keywords).run(*dense, TOKENS, 0.5)
    assert found == [(1000, 5e-4, 5e-4, 100, 0.3), (10_000, 5e-5, 5e-5, 100, 0.3)]


@pytest.mark.parametrize(
    ("keywords", "arguments", "message"),
    [
        ({"mask": "soft"}, {}, "unknown mask 'soft'"),
        ({"steps": 1}, {}, "steps of pat must be at least 2, got 1"),
        ({"lora_rank": 0}, {}, "lora_rank of pat must be at least 1, got 0"),
        ({"warmup": 10, "steps": 10}, {}, r"warmup=10 of pat must lie in \[0, steps=10\)"),
        ({}, {"pattern": "2:4"}, "pat cannot do the pattern 2:4"),
        ({}, {"sparsity": 1.0}, "sparsity"),
        ({}, {"model": Transformer(11)}, "norm='rms', got Transformer with norm='layer'"),
        (
            {},
            {"model": model_of()[0].clone(layers=({"stream": (12, 12, 12)}, {}))},
            "a Transformer without shortcuts",
        ),
        ({}, {"tokens": TOKENS[:, :1]}, r"at least two tokens, got tokens of shape \(8, 1\)"),
    ],
)
def test_bad_input(dense, keywords, arguments, message):
    model, params = dense
    arguments = {"model": model, "params": params, "tokens": TOKENS, "sparsity": 0.5, **arguments}
    if arguments["model"] is not model:
        arguments["params"] = dict.fromkeys(arguments["model"].parts())
    with pytest.raises(ValueError, match=message):
        pat(**keywords).run(**arguments)


@pytest.mark.slow
def test_it_loses_less_than_a_cut():
    """A model of a sequence that repeats loses 8 of its 24 channels; that its mask has not settled is said."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 11, (64, 1))
    tokens = (starts + np.arange(6) * 3) % 11
    model = Transformer(11, depth=2, width=24, heads=2, hidden=32, max_length=6).clone(**RMS)
    params = model.init(jax.random.key(0), tokens[:1])["params"]
    optimizer = optax.adam(1e-2)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply({"params": params}, tokens)[:, :-1], tokens[:, 1:]
        ).mean()

    @jax.jit
    def advance(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(150):
        params, state = advance(params, state)
    with pytest.warns(CompressionWarning, match="mask has not settled"):
        found = pat(steps=300, batch=32, learning_rate=3e-3, rank=8, lora_rank=8).run(
            model, params, tokens, 1 / 3
        )
    naive, naive_params = shrink(model, params, width=range(16))
    tuned, cut = (
        float(
            optax.softmax_cross_entropy_with_integer_labels(
                m.apply({"params": p}, tokens)[:, :-1], tokens[:, 1:]
            ).mean()
        )
        for m, p in ((found.model, found.params), (naive, naive_params))
    )
    assert tuned < cut / 2
    assert found.report["loss"]["last"] < 0.01
