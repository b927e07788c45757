"""OWL against its definition on a tiny model, and what its allocations must sum up to."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.calibration import Observed, observe, prune_layers
from sparsejax.compress.owl import (
    Outliers,
    _of_block,
    block_sparsities,
    group_sparsities,
    outliers,
    owl,
)
from sparsejax.compress.wanda import wanda
from sparsejax.masks import flatten
from sparsejax.models import Transformer
from sparsejax.patterns import NM

MODEL = Transformer(classes=11, depth=3, width=16, heads=2, mlp_ratio=2, max_length=8)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 8))


@pytest.fixture(scope="module")
def params():
    found = MODEL.init(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    # a few inputs of one block are much larger than the others
    scale = found["block_1"]["norm_0"]["scale"]
    found["block_1"]["norm_0"]["scale"] = scale.at[:2].set(30.0)
    return found


def blocks(ratios, sizes=None):
    sizes = sizes or [1] * len(ratios)
    return {
        f"b{i}": Outliers(d, size, (f"b{i}/x",))
        for i, (d, size) in enumerate(zip(ratios, sizes, strict=True))
    }


def test_densities_spend_the_budget_over_a_range_of_twice_the_width():
    found = block_sparsities(blocks([0.01, 0.05, 0.02, 0.04]), 0.7, 0.08)
    densities = 1 - np.array(list(found.values()))
    assert densities.mean() == pytest.approx(0.3)
    assert np.ptp(densities) == pytest.approx(0.16)
    np.testing.assert_array_equal(np.argsort(densities), [0, 2, 3, 1])
    np.testing.assert_allclose(densities - densities[0], 0.16 * np.array([0, 1, 0.25, 0.75]))
    uneven = block_sparsities(blocks([0.01, 0.05, 0.02], [1, 2, 5]), 0.7, 0.08)
    assert np.average(list(uneven.values()), weights=[1, 2, 5]) == pytest.approx(0.7)
    assert set(block_sparsities(blocks([0.3, 0.3]), 0.5).values()) == {0.5}
    swapped = block_sparsities(blocks([0.05, 0.01, 0.02, 0.04]), 0.7, 0.08)
    assert swapped["b0"] == pytest.approx(found["b1"]) and swapped["b1"] == pytest.approx(found["b0"])


def test_edges():
    assert min(block_sparsities(blocks([0.0, 1.0]), 0.05, 0.08).values()) == 0.01
    assert set(block_sparsities(blocks([0.0, 1.0]), 0.0).values()) == {0.0}
    assert set(block_sparsities(blocks([0.3, 0.3]), 0.005).values()) == {0.005}
    assert min(block_sparsities(blocks([0.0, 1.0]), 0.005).values()) == 0.005
    with pytest.raises(ValueError, match="owl with width=0.2 would drop all of b0 at sparsity=0.9"):
        block_sparsities(blocks([0.0, 1.0]), 0.9, 0.2)
    with pytest.raises(ValueError, match="width of owl must be at least 0, got -1"):
        block_sparsities(blocks([0.0, 1.0]), 0.5, -1)


def test_n_of_m():
    # mean(r) = 1: the four blocks drop 4 + 1, 4 - 1, 4 + 0 and 4 + 0 of 8
    found = group_sparsities(blocks([0.0, 1.0, 0.4, 0.6]), NM(4, 8))
    assert found == {"b0": 5 / 8, "b1": 3 / 8, "b2": 0.5, "b3": 0.5}
    with pytest.raises(ValueError, match="would drop all of b0 with 1:4"):
        group_sparsities(blocks([0.0, 1.0]), NM(1, 4), 2.0)


def test_outliers_are_those_of_the_definition(params):
    found = outliers(MODEL, params, TOKENS, multiple=3.0, batch=3)
    for block in observe(MODEL, params, TOKENS, ("square",)):
        scores = [
            (np.abs(flatten(block.params)[path]) * np.sqrt(stats["square"])[:, None]).ravel()
            for path, stats in block.stats.items()
        ]
        scores = np.concatenate(scores)
        assert len(block.stats) == 6 and found[block.name].size == scores.size
        assert found[block.name].ratio == pytest.approx(np.mean(scores > 3 * scores.mean()))
    ratios = {name: block.ratio for name, block in found.items()}
    assert max(ratios, key=ratios.get) == "block_1"


def test_an_expert_without_tokens_counts_by_magnitude():
    kernel = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    stats = {"count": np.array([4.0, 0.0]), "square": np.array([[4.0, 4.0, 9.0], [0.0, 0.0, 0.0]])}
    stats = {name: jnp.asarray(value) for name, value in stats.items()}
    layers = {"mlp/up/kernel": None}
    block = Observed("b", {"mlp": {"up": {"kernel": kernel}}}, layers, {"mlp/up/kernel": stats}, None, None)
    scores = np.concatenate([(kernel[0] * [[2], [2], [3]]).ravel(), kernel[1].ravel()])
    assert _of_block(block, 1.0).ratio == np.mean(scores > scores.mean())


def test_blocks_without_linear_layers(params, monkeypatch):
    def observed(*_, **__):
        yield Observed("block_0", {}, {}, {}, None, None)

    monkeypatch.setattr(sys.modules["sparsejax.compress.owl"], "observe", observed)
    with pytest.raises(ValueError, match="Transformer has no linear layer in its blocks"):
        outliers(MODEL, params, TOKENS)


def test_it_is_an_allocation(params):
    allocation = owl(MODEL, params, TOKENS, 0.5, multiple=3.0)
    result = prune_layers(wanda(), MODEL, params, TOKENS, 0.5, allocation=allocation, progress=False)
    layers = result.report["layers"]
    assert set(allocation) == set(layers)
    for name, sparsity in allocation.items():
        assert layers[name]["sparsity"] == pytest.approx(sparsity, abs=1 / 16)
    assert allocation["block_1/mlp/up/kernel"] < 0.5 < allocation["block_0/mlp/up/kernel"]
    grouped = owl(MODEL, params, TOKENS, None, pattern="4:8", multiple=3.0)
    assert all(round(8 * value) == pytest.approx(8 * value) for value in grouped.values())
    assert grouped["block_1/mlp/up/kernel"] == 3 / 8


def test_bad_input(params):
    with pytest.raises(ValueError, match="owl cannot do the pattern block:4x4"):
        owl(MODEL, params, TOKENS, 0.5, pattern="block:4x4")
    with pytest.raises(ValueError, match="multiple of owl must be at least 0, got -1"):
        owl(MODEL, params, TOKENS, 0.5, multiple=-1)
