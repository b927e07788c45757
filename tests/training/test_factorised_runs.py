"""Runs of factorised layers: supports travel with the weights, and pretrained layers of one kind become another."""

import json

import pytest

from sparsejax import training

FROZEN = {"name": "sgd", "learning_rate": 0.0}
MONARCH, DENSE = {"name": "monarch", "blocks": 2}, {"name": "dense"}
FULL_RANK = {"name": "low_rank", "rank": 16}
SLTRAIN = {"name": "sparse_low_rank", "rank": 4, "density": 0.2}


def losses(config, before, after, tmp_path, **fields):
    """Test losses of a network pretrained with layers `before`, there and where it starts with layers `after`."""
    model = {"name": "mlp", "hidden": (16, 16)}
    config = config(
        method={"name": "dense"}, optimizer=FROZEN, steps=1, checkpoint_every=0, **fields
    ).to_dict()
    config["model"] = {**model, "linear": after}
    config["pretrained"] = {
        "model": {**model, "linear": before}, "steps": 40, "seed": 0,
        "optimizer": {"name": "adam", "learning_rate": 5e-3},
    }  # fmt: skip
    found = training.run(config, tmp_path / "run", progress=False)
    (folder,) = [path for path in (tmp_path / "run" / "pretrained").iterdir() if path.is_dir()]
    trained = json.loads((folder / "summary.json").read_text())
    assert trained["test_loss"] < 1.6  # 2.3 by chance
    return trained["test_loss"], found["test_loss"]


@pytest.mark.slow
def test_a_support_is_saved_and_not_drawn_again(tiny, tmp_path):
    trained, found = losses(tiny, SLTRAIN, SLTRAIN, tmp_path, seed=1)
    assert found == trained


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(MONARCH, DENSE), (DENSE, FULL_RANK), (SLTRAIN, FULL_RANK)])
def test_pretrained_layers_are_converted(before, after, tiny, tmp_path):
    trained, found = losses(tiny, before, after, tmp_path)
    assert found == pytest.approx(trained, rel=1e-4)


def test_what_cannot_be_converted_says_so(tiny, tmp_path):
    with pytest.raises(
        ValueError, match="dense_0 cannot be made from a dense layer: SparseLowRank has no from_dense"
    ):
        losses(tiny, DENSE, SLTRAIN, tmp_path)
