"""Finished runs, packed: the files, what they say, and what cannot be deployed."""

import json

import jax
import numpy as np
import pytest

from sparsejax import formats, training
from sparsejax.training import deploy as deployment
from sparsejax.training.deploy import deploy


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a finished run of RigL at 80 %."""
    workdir = tmp_path_factory.mktemp("finished")
    training.run(tiny(), workdir, progress=False)
    return workdir


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(deployment, "SWEEP", (0.5, 0.75))
    monkeypatch.setattr(deployment, "REPEATS", 2)


def test_a_run_is_packed_compared_and_measured(finished, capsys):
    found = deploy(finished)
    assert found == json.loads((finished / "deploy.json").read_text())
    assert found["max_error"] < 1e-5 and found["test_agreement"] == 1
    summary = json.loads((finished / "summary.json").read_text())
    assert found["sparsity"] == pytest.approx(summary["sparsity"], abs=1e-6)
    assert found["flops"]["packed"] == pytest.approx(
        summary["inference_flops_ratio"] * found["flops"]["dense"]
    )
    assert set(found["latency_ms"]) == {"1", "400"}
    assert all(time > 0 for times in found["latency_ms"].values() for time in times.values())
    assert [(round(p["sparsity"], 2), p["batch"]) for p in found["sweep"]] == [
        (0.5, 1), (0.5, 400), (0.75, 1), (0.75, 400)
    ]  # fmt: skip
    packed = formats.load(finished / "packed.safetensors")
    kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(packed, is_leaf=formats.is_packed)}
    assert "BitmapArray" in kinds
    nonzeros = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(formats.unpack(packed)))
    assert nonzeros <= summary["nonzeros"]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == found["bytes"]["packed"]
    assert (finished / "deploy.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "dense_0/kernel  bitmap" in shown and "latency, batch of 400" in shown


@pytest.mark.parametrize("format", ["csr", "dense", "bitmap"])
def test_a_format_can_be_named(finished, format):
    assert deploy(finished, format, progress=False)["max_error"] < 1e-5


def test_a_run_with_n_of_m_keeps_its_pattern_in_the_sweep(tiny, tmp_path, capsys):
    method = {"name": "sr_ste", "pattern": "2:4", "exclude": ["head/*"]}
    training.run(tiny(method=method), tmp_path, progress=False)
    found = deploy(tmp_path, "2:4")
    assert [point["sparsity"] for point in found["sweep"][::2]] == [0.5, 0.75]
    assert "dense_0/kernel  2:4" in capsys.readouterr().out


@pytest.mark.slow
def test_a_parameterization_is_deployed_as_its_weights(tiny, tmp_path):
    config = tiny(
        method={"name": "dense"},
        parameterization={"name": "maskllm", "pattern": "2:4"},
        pretrained={"steps": 30, "method": {"name": "dense"}},
    )
    training.run(config, tmp_path, progress=False)
    assert deploy(tmp_path, progress=False)["sparsity"] == pytest.approx(0.5, abs=0.2)


def test_outputs_that_differ_are_an_error(finished, monkeypatch):
    pack = deployment._pack

    def damaged(network, format):
        found = pack(network, format)
        worse = jax.tree.map(lambda leaf: leaf * 1.01 if leaf.dtype == np.float32 else leaf, found.packed)
        return found._replace(packed=worse)

    monkeypatch.setattr(deployment, "_pack", damaged)
    with pytest.raises(
        ArithmeticError, match="outputs of the packed network differ from those of the dense one by"
    ):
        deploy(finished, progress=False)


def test_what_cannot_be_deployed(finished, tiny, tmp_path):
    with pytest.raises(ValueError, match="holds no finished run; train it first, without --mode=deploy"):
        deploy(tmp_path / "none")
    with pytest.raises(ValueError, match="unknown format 'zip' for dense_0/kernel"):
        deploy(finished, "zip")
    training.run(tiny(method={"name": "dense"}), tmp_path / "dense", progress=False)
    with pytest.raises(ValueError, match="the run is dense: there is nothing to pack"):
        deploy(tmp_path / "dense")


@pytest.mark.slow
def test_the_command(command, finished):
    process = command(finished, "--mode=deploy", "--noprogress")
    assert process.wait(300) == 0, process.stderr.read()
    process = command(finished / "none", "--mode=deploy")
    assert process.wait(300) == 2
    assert "holds no finished run" in process.stderr.read()
