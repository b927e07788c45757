"""What the tests of kernels share: running them without their device, and lowering them for it."""

import contextlib

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

PLATFORMS = {"pallas_gpu": "cuda", "pallas_tpu": "tpu"}
BACKENDS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
CUSTOM_CALLS = {"pallas_gpu": "mosaic_gpu", "pallas_tpu": "tpu_custom_call"}


@contextlib.contextmanager
def running(implementation, monkeypatch=None):
    """Kernels of an implementation run here: compiled where the device is, else interpreted.

    With `monkeypatch` the device also counts as present when an operation picks its implementation.
    """
    if jax.default_backend() == BACKENDS[implementation]:
        yield
        return
    if implementation == "pallas_gpu" and not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("JAX before 0.11 has no interpreter of Mosaic GPU kernels")
    if monkeypatch is not None:
        reasons = {"pallas_gpu": "gpu_reason", "pallas_tpu": "tpu_reason"}
        monkeypatch.setattr(dispatch, reasons[implementation], lambda *generations, **at: None)
    interpreter = (
        plgpu.force_gpu_interpret_mode if implementation == "pallas_gpu" else pltpu.force_tpu_interpret_mode
    )
    with interpreter():
        yield


def assert_lowers(implementation, function, *arrays):
    """Fails unless `function` lowers to the implementation's kernels for a device that need not be here.

    Args:
      *arrays: pairs of a shape and a dtype.
    """
    shapes = [jax.ShapeDtypeStruct(*pair) for pair in arrays]
    exported = jax.export.export(jax.jit(function), platforms=[PLATFORMS[implementation]])(*shapes)
    assert CUSTOM_CALLS[implementation] in exported.mlir_module()


def assert_close(found, expected, dtype, scale: float = 1.0):
    """Equal up to the rounding of a sum of `dtype` products whose size is `scale`."""
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}[np.dtype(dtype).name] * scale
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=4 * tolerance
    )


class InMemory:
    """What Triton's interpreter asks of a PyTorch tensor, for a numpy array that it reads and writes in place."""

    def __init__(self, array):
        self.array = array
        self.dtype = f"torch.{array.dtype.name}"

    def data_ptr(self):
        return self.array.ctypes.data

    untyped_storage = cpu = new_empty = lambda self, *args, **kwargs: self
    storage_offset = size = stride = set_ = copy_ = lambda self, *args: None
