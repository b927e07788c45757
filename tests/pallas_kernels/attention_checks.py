"""What the tests of attention kernels share."""

import contextlib
import os

import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest

from pallas_kernels import batching, flash_gpu
from pallas_kernels.sparse_decode_attention import pallas_gpu as decode_gpu


@contextlib.contextmanager
def running(implementation, monkeypatch):
    """As `kernel_checks.running`, and anywhere what needs no device.

    JAX's interpreter of Mosaic GPU kernels knows neither matrix products with an operand in registers nor inline
    MLIR; the functions that hold these, one each, have stand-ins in `jax.numpy`. Nor may interpreters'
    callbacks be partitioned.
    """
    if implementation not in kernel_checks.PLATFORMS:
        yield
        return
    if implementation == "pallas_gpu" and jax.default_backend() != "gpu" and "NPROC" not in os.environ:
        pytest.skip("interpreted in a process of its own, see test_gpu_interpreted")
    with kernel_checks.running(implementation, monkeypatch):
        if jax.default_backend() != kernel_checks.BACKENDS[implementation]:
            monkeypatch.setattr(batching, "_partitioner_asks", lambda: False)
        if implementation == "pallas_gpu" and jax.default_backend() != "gpu":
            monkeypatch.setattr(flash_gpu, "accumulate", _accumulate)
            monkeypatch.setattr(decode_gpu, "expand", _expand)
        yield


def _accumulate(acc, a, b):
    return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)


def _expand(bits_ref, values_ref, channels):
    values, channel = values_ref[...], jnp.arange(channels)
    words = bits_ref[...].reshape(values.shape[0], -1)
    bits = (words[:, channel // 32] >> (channel % 32)) & 1
    place = jnp.maximum(jnp.cumsum(bits, axis=1) - 1, 0)
    return jnp.where(bits == 1, jnp.take_along_axis(values, place, axis=1), 0)


def assert_close(found, expected, dtype):
    """Equal trees up to the rounding of the dtype at the size of the largest entry, -inf where the other is."""
    tolerance = 2e-5 if dtype == jnp.float32 else 4e-2
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        size = np.max(np.abs(other), where=np.isfinite(other), initial=1e-3)
        np.testing.assert_allclose(
            one.reshape(other.shape), other, rtol=tolerance, atol=tolerance * min(size, 1.0)
        )
