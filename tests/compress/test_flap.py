"""FLAP: the scores are exact errors, and the bias keeps the mean of what a layer gives."""

import jax
import numpy as np
import pytest

from sparsejax.compress.flap import ALLOCATIONS, flap, scores, unit_scores
from sparsejax.compress.groups import Units, protect, units_of
from sparsejax.compress.shrink import linear_weights
from sparsejax.models import Transformer

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 31, (6, 12))
GPT = Transformer(classes=31, depth=2, width=16, heads=4, max_length=12, activation="relu")


def noisy(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


PARAMS = noisy(GPT)


@jax.jit
def states(params):
    return GPT.apply({"params": params}, TOKENS, method="start")


def outputs(model, params, **changes):
    """The mean over the tokens of what the first block, or a part of it, gives."""
    block = model.block(0).clone(parent=None, **changes)
    found = jax.jit(block.apply)({"params": params["block_0"]}, states(PARAMS))
    return np.asarray(found, np.float64).mean((0, 1))


def test_the_score_is_the_error_that_the_mean_leaves():
    x, kernel = RANDOM.normal(size=(50, 7)) * 3 + 1, RANDOM.normal(size=(7, 4))
    stats = {"variance": x.var(0), "square": (x**2).mean(0)}
    found = scores(kernel, stats)
    for i in range(7):
        replaced = x.copy()
        replaced[:, i] = x[:, i].mean()
        left = ((x @ kernel - replaced @ kernel) ** 2).sum(1).mean()
        assert found[i] == pytest.approx(left, rel=1e-12)
    np.testing.assert_allclose(scores(kernel, stats, "IFV"), x.var(0))
    wanda = np.abs(kernel * np.sqrt((x**2).mean(0))[:, None]).mean(1)
    np.testing.assert_allclose(scores(kernel, stats, "WIFN"), wanda)


def test_attention_is_squared_once_more_and_layers_are_standardised():
    inputs = RANDOM.uniform(size=12)
    squared = inputs**2
    expected = ((squared - squared.mean()) / squared.std(ddof=1)).reshape(3, 4).mean(1)
    np.testing.assert_allclose(unit_scores(inputs, Units(3, 1, 4), "attention"), expected)
    expected = (inputs - inputs.mean()) / inputs.std(ddof=1)
    np.testing.assert_allclose(unit_scores(inputs, Units(12, 1, 1), "mlp"), expected)
    assert not unit_scores(np.ones(4), Units(4, 1, 1), "mlp").any()


def test_the_mean_of_the_output_is_kept_with_the_bias_only():
    expected = outputs(GPT, PARAMS)
    for compensate in (True, False):
        method = flap(structures=("channels",), compensate=compensate)
        found = method.run(GPT, PARAMS, TOKENS, 0.4, progress=False)
        assert found.report["layers"]["block_0/mlp"]["kept"] < 50
        error = np.abs(outputs(found.model, found.params) - expected).max()
        assert error < 1e-5 if compensate else error > 1e-2


def test_heads_that_go_leave_their_mean_too():
    expected = outputs(GPT, PARAMS, hidden_width=0)
    for compensate in (True, False):
        method = flap(structures=("heads",), allocation="UL-UM", compensate=compensate)
        found = method.run(GPT, PARAMS, TOKENS, 0.1, progress=False)
        assert found.report["layers"]["block_0/attention"]["kept"] == 3
        error = np.abs(outputs(found.model, found.params, hidden_width=0) - expected).max()
        assert error < 1e-5 if compensate else error > 1e-2


def test_constant_channels_go_first_and_nothing_changes():
    params = jax.tree.map(np.copy, PARAMS)
    for i in (0, 1):
        params[f"block_{i}"]["mlp"]["up"]["kernel"][:, :40] = 0
        params[f"block_{i}"]["mlp"]["up"]["bias"][:40] = np.abs(RANDOM.normal(size=40)) + 0.5
    found = flap(structures=("channels",), allocation="UL-UM").run(
        GPT, params, TOKENS, 80 * 32 / linear_weights(params, 2), progress=False
    )
    assert found.model.layers[0]["hidden"] == found.model.layers[1]["hidden"] == 24
    np.testing.assert_allclose(
        jax.jit(found.model.apply)({"params": found.params}, TOKENS),
        jax.jit(GPT.apply)({"params": params}, TOKENS),
        rtol=1e-4,
        atol=1e-4,
    )


def test_separate_pools_remove_as_many_heads_as_asked():
    found = flap(allocation="AL-MM", heads=3).run(GPT, PARAMS, TOKENS, 0.3, progress=False)
    kept = [found.report["layers"][f"block_{i}/attention"]["kept"] for i in (0, 1)]
    assert sum(kept) == 5 and abs(found.report["sparsity"] - 0.3) * found.report["weights"] <= 16


LLAMA = GPT.clone(norm="rms", positions="rotary", bias=(), tied=True, kv_heads=2)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.8, 0.99])
def test_almost_everything_may_go_but_what_a_bias_needs(allocation, sparsity):
    found = flap(allocation=allocation).run(LLAMA, noisy(LLAMA), TOKENS, sparsity, progress=False)
    assert found.report["layers"]["block_0/attention"]["kept"] >= 1
    one = units_of(LLAMA, ("heads",))[0, "attention"].weight
    least = max((1 - sparsity) * found.report["weights"], one)  # the head group that stays may be too much
    assert abs(found.report["kept"] - least) <= 16


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("structures", [("heads", "channels"), ("channels",)])
def test_which_sub_blocks_cannot_go(sliced, structures):
    model = LLAMA.clone(layers=({}, {"stream": (16, 16, 16)})) if sliced else LLAMA
    scores = {key: np.arange(entry.count, dtype=float) for key, entry in units_of(model, structures).items()}
    protect(model, scores, compensated=True)
    stay = {key for key, values in scores.items() if values[-1] == np.inf}
    expected = {(0, "attention")} | ({(1, "attention"), (1, "mlp")} if sliced else set())
    assert stay == expected & set(scores)
    own = {key: np.zeros(entry.count) for key, entry in units_of(model, structures).items()}
    protect(model, own)
    assert not any(values.any() for values in own.values())  # no biases


@pytest.mark.slow
def test_a_bias_without_a_place_keeps_a_head_of_the_first_block():
    model = LLAMA.clone(depth=1, kv_heads=None, activation="gelu_tanh")
    params = noisy(model)
    params["block_0"]["attention"]["value"]["kernel"][:] = 0  # so that all head groups score alike
    found = flap().run(model, params, TOKENS, 0.5, progress=False)
    assert found.report["layers"]["block_0/attention"]["kept"] >= 1
    assert found.report["biases"] in (16, 32) and "bias" in found.params["block_0"]["mlp"]["down"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"metric": "wifv"}, "unknown metric 'wifv'"),
        ({"allocation": "AL"}, "unknown allocation 'AL'"),
        ({"heads": 2}, "heads must be a number from 0 and needs allocation='AL-MM', got 2 with AL-AM"),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        flap(**keywords)


def test_more_heads_than_there_are():
    with pytest.raises(ValueError, match="flap can remove at most 8 of 8 head groups, got heads=9"):
        flap(allocation="AL-MM", heads=9).run(GPT, PARAMS, TOKENS, 0.3, progress=False)
    with pytest.raises(ValueError, match="flap cannot reach sparsity 0.1 when it removes 8 head groups"):
        flap(allocation="AL-MM", heads=8).run(GPT, PARAMS, TOKENS, 0.1, progress=False)
