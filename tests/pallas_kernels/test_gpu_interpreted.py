"""The tests of Mosaic GPU kernels of attention and softmax, interpreted in a process of their own."""

import os
import subprocess
import sys

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

FILES = ("test_block_sparse_attention.py", "test_sparse_decode_attention.py", "test_two_pass_softmax.py")


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here they run compiled")
@pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason="JAX before 0.11 has no interpreter of Mosaic GPU kernels",
)
def test_gpu_kernels_interpreted():
    """Interpreted warpgroups hold a thread of XLA each while they wait for each other.

    XLA has as many threads as the machine has cores, or as NPROC says when the process starts; with too few, all of
    them wait for ever.
    """
    paths = [os.path.join(os.path.dirname(__file__), name) for name in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        "pallas_gpu and not lowered",
    ]
    done = subprocess.run(
        [*command, *paths], env=os.environ | {"NPROC": "8"}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-3000:]
