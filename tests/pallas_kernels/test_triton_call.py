"""What is passed to jax-triton, of which a stand-in is imported: the package needs JAX's own part for GPUs."""

import sys
import types

import jax
import pytest

from pallas_kernels import triton_call


def stand_in(monkeypatch, triton_call_of_package, version=(0, 4, 2)):
    text = ".".join(map(str, version))
    package = types.SimpleNamespace(
        triton_call=triton_call_of_package, __version_info__=version, __version__=text
    )
    monkeypatch.setitem(sys.modules, "jax_triton", package)
    triton_call.reason.cache_clear()
    monkeypatch.setattr(triton_call, "reason", triton_call.reason.__wrapped__)


def before(*args, kernel, out_shape, grid, num_warps=None, compute_capability=None, **constants):
    return "before", args, kernel, out_shape, grid, num_warps, compute_capability, constants


def since(*args, kernel, out_type=None, grid, num_warps=None, compute_capability=None, **constants):
    return "since", args, kernel, out_type, grid, num_warps, compute_capability, constants


@pytest.mark.parametrize("release", [before, since])
def test_results_are_named_as_the_release_wants(release, monkeypatch):
    stand_in(monkeypatch, release)
    found = triton_call.call("kernel", 1, 2, out="out", grid=(3,), constants={"m": 4}, compute_capability=90)
    assert found == (release.__name__, (1, 2), "kernel", "out", (3,), 4, 90, {"m": 4})


def test_releases_that_do_not_fit_together_are_refused(monkeypatch):
    stand_in(monkeypatch, since, (0, 4, 1))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert triton_call.reason() is None
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert "jax-triton 0.4.1 does not work with JAX" in triton_call.reason()
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert "jax-triton cannot be imported" in triton_call.reason()
