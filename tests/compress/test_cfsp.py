"""CFSP: importance by angles, exact mean densities, and the criterion in which the weights cancel."""

import jax
import numpy as np
import pytest

from sparsejax.compress.cfsp import adapter_ranks, cfsp, channel_scores, densities, importance
from sparsejax.models import Transformer

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 31, (6, 12))
MODEL = Transformer(classes=31, depth=2, width=16, heads=4, max_length=12, gated=True, hidden=32)


def noisy(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


def test_importance():
    x = RANDOM.normal(size=(3, 5, 4)).astype(np.float32)
    y = RANDOM.normal(size=(3, 5, 4)).astype(np.float32)
    cosines = [
        float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in zip(x.reshape(-1, 4), y.reshape(-1, 4), strict=True)
    ]
    assert importance(x, y) == pytest.approx(np.mean(np.arccos(cosines)) / np.pi, rel=1e-5)
    assert importance(x, y, "cosine") == pytest.approx(1 - np.mean(cosines), rel=1e-5)
    assert importance(x, y, "mse") == pytest.approx(np.mean((x - y) ** 2), rel=1e-5)
    assert importance(x, y, "mae") == pytest.approx(np.mean(np.abs(x - y)), rel=1e-5)
    assert importance(x, x) == 0 and importance(x, -x) == 1
    assert importance(x * 0, x * 0) == 0
    turned = np.stack([-x[..., 1], x[..., 0]], -1)
    assert importance(x[..., :2], turned) == pytest.approx(0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_densities_have_the_mean_that_was_asked(sparsity):
    for values in ([0.02, 0.05, 0.01, 0.1], [0.3, 0.3, 0.3], [0.0, 1.0], [0.4]):
        found = densities(values, sparsity)
        assert np.mean(found) == pytest.approx(1 - sparsity, abs=1e-12)
        assert (found > 0).all() and (found <= 1 + 1e-12).all()
        assert (
            np.argsort(found, kind="stable").tolist() == np.argsort(values, kind="stable").tolist()
            or not sparsity
        )
        sizes = np.arange(1, len(values) + 1)
        assert np.average(densities(values, sparsity, sizes=sizes), weights=sizes) == pytest.approx(
            1 - sparsity
        )
    np.testing.assert_allclose(densities([0.2, 0.2], sparsity), 1 - sparsity)
    np.testing.assert_allclose(densities([0.1, 0.9], sparsity, alpha=0.0), 1 - sparsity)


def test_densities_follow_the_sigmoid_of_summed_angles():
    values, tokens = np.array([0.02, 0.05, 0.03]), 128 * 2048
    sums = tokens * values  # as in the paper: sums over 128 sequences of 2048 tokens, divided by 10^4
    z = 1 / (1 + np.exp(-(sums - sums.mean()) / 1e4))
    np.testing.assert_allclose(densities(values, 0.6), z / z.mean() * 0.4)


def test_densities_that_would_exceed_one_shrink_towards_their_mean():
    found = densities([0.0, 1.0], 0.1)
    assert found.max() == pytest.approx(0.9 + 0.1 / 1.05) and found.mean() == pytest.approx(0.9)


def test_in_the_released_criterion_the_weights_cancel():
    down, up, gate = RANDOM.normal(size=(9, 5)), RANDOM.normal(size=(5, 9)), RANDOM.normal(size=(5, 9))
    square = RANDOM.uniform(size=9)
    np.testing.assert_allclose(channel_scores(down, up, gate, square), 3 * np.sqrt(square) / 5)
    np.testing.assert_allclose(channel_scores(down, up, None, square, c=2.0), 2 * square / 5)
    expected = np.zeros(9)
    for j in range(9):
        for i in range(5):
            active = abs(down[j, i]) * square[j] / sum(abs(down[k, i]) * square[k] for k in range(9))
            others = abs(up[i, j]) / np.abs(up[i]).sum() + abs(gate[i, j]) / np.abs(gate[i]).sum()
            expected[j] += (active + others) * np.sqrt(square[j]) / 5
    np.testing.assert_allclose(channel_scores(down, up, gate, square, normalise="row", b=2.0), expected)


def test_ranks_are_proportional_and_exact_in_all():
    assert adapter_ranks([0.1, 0.2, 0.1], 8) == [1 + 21 * 1 // 4, 1 + 21 * 2 // 4 + 1, 1 + 21 // 4]
    assert sum(adapter_ranks(RANDOM.uniform(size=7), 5)) == 35
    assert adapter_ranks([0.0, 0.0], 4) == [4, 4]
    with pytest.raises(ValueError, match="the mean rank of adapters must be at least 1, got 0"):
        adapter_ranks([1.0], 0)


def test_blocks_that_turn_their_states_more_keep_more_channels():
    params = noisy(MODEL)
    for part in (params["block_0"]["attention"]["out"], params["block_0"]["mlp"]["down"]):
        part["kernel"], part["bias"] = part["kernel"] * 1e-3, part["bias"] * 1e-3
    found = cfsp(multiple=8).run(MODEL, params, TOKENS, 0.3, progress=False)
    kept = [found.report["layers"][f"block_{i}/mlp"]["kept"] for i in (0, 1)]
    assert found.report["importance"][0] < 0.01 < found.report["importance"][1]
    assert kept[0] < kept[1] and all(count % 8 == 0 for count in kept)
    p = 0.3 * (4 * 16 * 16 + 3 * 16 * 32) / (3 * 16 * 32)
    assert found.report["channel_sparsity"] == pytest.approx(p)
    assert abs(sum(kept) - 64 * (1 - p)) <= 4
    assert found.params["block_0"]["attention"]["query"]["kernel"].shape == (16, 16)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown coarse 'angle'"):
        cfsp(coarse="angle")
    with pytest.raises(ValueError, match="unknown normalise 'rows'; did you mean 'row'"):
        cfsp(normalise="rows")
    with pytest.raises(ValueError, match="multiple=5 must divide the hidden width 32 of every block"):
        cfsp(multiple=5).run(MODEL, noisy(MODEL), TOKENS, 0.3)
    with pytest.raises(ValueError, match="cfsp can remove a share of 0.6 of the blocks' weights, got 0.7"):
        cfsp().run(MODEL, noisy(MODEL), TOKENS, 0.7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_outputs_that_are_not_finite():
    params = noisy(MODEL)
    params["block_1"]["mlp"]["down"]["bias"][:] = np.inf
    with pytest.raises(ValueError, match="the outputs of block_1 are not finite; the model's activations"):
        cfsp().run(MODEL, params, TOKENS, 0.2, progress=False)
