"""Meshes: layouts and mistakes here; whole runs on 8 virtual devices and in two processes as commands."""

import json
import socket

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sparsejax.training.mesh import build_mesh, check_batch, param_spec, state_shardings
from sparsejax.transforms import build

SHORT = (
    "--config.steps=45",
    "--config.eval_batch_size=800",
    "--config.checkpoint_every=20",
    "--config.curves=False",
    "--config.model.hidden=(32,16)",
)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("data:x", "must look like 'data:4,model:2'"),
        ("data", "must look like 'data:4,model:2'"),
        ("dat:2", "unknown mesh axis 'dat'; did you mean 'data'"),
        ("data:3,model:5", "needs 15 devices, which does not divide"),
    ],
)
def test_bad_meshes_get_one_sentence(description, message):
    with pytest.raises(ValueError, match=message):
        build_mesh(description)


def test_no_mesh_and_one_device():
    assert build_mesh(None) is None
    assert dict(build_mesh("data:1,model:1").shape) == {"data": 1, "model": 1}
    mesh = build_mesh("model:1")
    assert build_mesh(mesh) is mesh


def test_batch_must_divide():
    check_batch(None, batch_size=7)
    with pytest.raises(ValueError, match="config.batch_size=7 is not divisible by the 8 devices"):
        check_batch(AbstractMesh((4, 2), ("data", "model")), batch_size=7)


@pytest.mark.parametrize(
    ("shape", "size", "spec"),
    [
        ((300, 100), 2, PartitionSpec("model")),
        ((3, 100), 2, PartitionSpec(None, "model")),
        ((3, 3, 16, 32), 4, PartitionSpec(None, None, None, "model")),
        ((7, 5), 2, PartitionSpec()),
        ((), 2, PartitionSpec()),
        ((8,), 1, PartitionSpec()),
    ],
)
def test_the_largest_divisible_axis_is_sharded(shape, size, spec):
    assert param_spec(shape, size) == spec


def test_moments_and_masks_are_laid_out_as_their_parameter():
    params = {"dense": {"kernel": np.zeros((6, 4), np.float32), "bias": np.zeros(4, np.float32)}}
    state = build("rigl", optax.adam(0.1), sparsity=0.5, allocation="uniform").init(params)
    mesh = AbstractMesh((1, 2), ("data", "model"))
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(state_shardings(mesh, state, params))
    }
    kernels = [spec for name, spec in specs.items() if name.endswith("dense/kernel")]
    assert len(kernels) == 4 and set(kernels) == {PartitionSpec("model")}  # mask, fired, two moments
    assert specs["masks/dense/bias"] == PartitionSpec()  # the scalar True of a dense leaf
    assert all(spec == PartitionSpec() for name, spec in specs.items() if name.endswith("count"))


def summary(process, workdir):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.slow
def test_same_masks_on_eight_devices_and_in_two_processes(command, tmp_path):
    one, eight, two = (tmp_path / name for name in ("one", "eight", "two"))
    alone = summary(command(one, *SHORT), one)
    spread = summary(command(eight, *SHORT, "--mesh=data:4,model:2", devices=8), eight)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = (*SHORT, "--mesh=data:2,model:2", f"--coordinator=localhost:{port}", "--num_processes=2")
    processes = [command(two, *job, f"--process_id={number}", devices=2) for number in (0, 1)]
    joint = summary(processes[0], two)
    output, _ = processes[1].communicate()
    assert processes[1].returncode == 0 and "test accuracy" not in output
    assert alone["exploration_rate"] > 1 - alone["sparsity"]  # the masks did move
    for other in (spread, joint):
        assert other["masks_sha256"] == alone["masks_sha256"]
        assert other["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-3)
