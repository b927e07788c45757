"""What all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tests compile thousands of small programs and run each a few times, so that LLVM's optimisations cost more than they
# gain. Set before JAX is imported; flags of your own replace this one.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture
def assert_prints_same():
    """The function `check(program, devices=8, **environment)`, which fails unless a Python program prints "same"; it runs
    in a process of its own, from the repository's root, with so many CPU devices."""

    def check(program: str, devices: int = 8, **environment):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]

    return check
