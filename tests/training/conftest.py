"""A small configuration, and a way to run one as a command."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import pytest

from sparsejax.training.problem import Problem

ROOT = Path(__file__).parents[2]


def tiny_config(**fields):
    """Digits and a narrow MLP with RigL: a run of 60 steps takes a second, most of it compilation."""
    config = {
        "data": {"name": "digits"},
        "model": {"name": "mlp", "hidden": (32, 16)},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "schedule": "cosine"},
        "method": {"name": "rigl", "sparsity": 0.8, "update_every": 10, "update_end": 45},
        "batch_size": 64,
        "eval_batch_size": 400,
        "steps": 60,
        "log_every": 15,
        "eval_every": 30,
        "checkpoint_every": 20,
        "curves": False,
    }
    config = ml_collections.ConfigDict(config)
    for name, value in fields.items():
        setattr(config, name, ml_collections.ConfigDict(value) if isinstance(value, dict) else value)
    return config


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Every run compiles its own functions anew; on disk they are found again, also by subprocesses."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    folder = str(tmp_path_factory.mktemp("compiled"))
    values = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    before = {name: getattr(jax.config, name.lower()) for name in values}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
            jax.config.update(name.lower(), float(value) if value == "0" else value)
        yield
    for name, value in before.items():
        jax.config.update(name.lower(), value)


@pytest.fixture(scope="session")
def tiny():
    """The function `tiny_config(**fields)`, whose keywords replace fields of the configuration."""
    return tiny_config


class Crash(Exception):
    """Stands in for a kill, inside one process."""


@pytest.fixture
def crash_after(monkeypatch):
    """`with crash_after(n): ...` expects the run inside to crash after `n` more batches, of any phase."""
    original = Problem.batches

    @contextlib.contextmanager
    def crash(count):
        left = iter(range(count))

        def batches(self, steps, start=0):
            for batch in original(self, steps, start):
                if next(left, None) is None:
                    raise Crash
                yield batch

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Problem, "batches", batches)
            yield

    return crash


@pytest.fixture
def command():
    """Starts `python -m experiments.run` ; returns the process."""
    started = []

    def start(workdir, *arguments, devices=1, config="configs/quickstart.py"):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        base = [sys.executable, "-m", "experiments.run", f"--config={config}", f"--workdir={workdir}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*base, *arguments], cwd=ROOT, env=environment, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
