"""A small configuration, and a way to run one as a command."""

import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

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


@pytest.fixture
def tiny():
    """The function `tiny_config(**fields)`, whose keywords replace fields of the configuration."""
    return tiny_config


@pytest.fixture
def command():
    """Starts `python -m experiments.run` on the quickstart configuration; returns the process."""
    started = []

    def start(workdir, *arguments, devices=1):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        base = [sys.executable, "-m", "experiments.run", "--config=configs/quickstart.py", f"--workdir={workdir}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*base, *arguments], cwd=ROOT, env=environment, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
