"""The two-pass softmax against float64, for every implementation."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from attention_checks import running
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_lowers

from pallas_kernels import dispatch, softmax
from pallas_kernels.softmax import pairs, pallas_gpu, pallas_tpu, xla

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")


def run(implementation, monkeypatch, function, *args):
    """`function(softmax of an implementation)(*args)`, compiled where it can be."""
    with running(implementation, monkeypatch):
        compiled = jax.jit(function(functools.partial(softmax, implementation=implementation)))
        return jax.block_until_ready(compiled(*args))


def numbers(shape, scale, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-scale, scale, size=shape), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "scale", "dtype"),
    [((3, 1000), 1000, jnp.float32), ((5, 256), 8, jnp.bfloat16), ((1, 1), 3, jnp.float32)],
)
def test_equals_float64(implementation, shape, scale, dtype, monkeypatch):
    x = numbers(shape, scale, dtype)
    found = run(implementation, monkeypatch, lambda softmax: softmax, x)
    assert found.dtype == dtype and found.shape == shape
    expected = scipy.special.softmax(np.asarray(x, np.float64), axis=-1)
    rtol, atol = (2e-6, 1e-30) if dtype == jnp.float32 else (1e-2, 1e-30)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_an_ordinary_number(implementation, monkeypatch):
    inf, nan = jnp.inf, jnp.nan
    rows = {
        (-inf, 1.0, -inf, 1.0): (0, 0.5, 0, 0.5),
        (-inf, -inf, -inf, -inf): (0, 0, 0, 0),
        (0.0, 0.0, -1e9, float(np.finfo(np.float32).min)): (0.5, 0.5, 0, 0),
        (-1e9, -1e9, -1e9, -1e9): (0.25, 0.25, 0.25, 0.25),
        (30000.0, 30000.0, 29000.0, -30000.0): (0.5, 0.5, 0, 0),
        (40000.0, 40001.0, -inf, -inf): (1 / (1 + math.e), 1 / (1 + 1 / math.e), 0, 0),
        (-1e6, -1e6 - 1, -2e6, -inf): (1 / (1 + 1 / math.e), 1 / (1 + math.e), 0, 0),
        (8e6, 8e6 - 2, 8e6 - 200, 0.0): (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0, 0),
        (1.0, nan, 2.0, 0.0): (nan,) * 4,
        (1.0, inf, 2.0, 0.0): (nan,) * 4,
    }
    x = jnp.asarray(np.pad(np.array(list(rows)), ((0, 0), (0, 300)), constant_values=-np.inf), jnp.float32)
    found = run(implementation, monkeypatch, lambda softmax: softmax, x)[:, :4]
    np.testing.assert_allclose(found, np.array(list(rows.values())), rtol=1e-6)


def test_long_rows_are_taken_in_slices():
    x = numbers((2, 40001), 50)
    assert x.shape[1] > 4 * max(128, xla._WIDTH // 2)
    found = softmax(x, implementation="xla")
    expected = scipy.special.softmax(np.asarray(x, np.float64), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-30)
    text = jax.jit(lambda x: softmax(x, implementation="xla")).lower(x).as_text()
    assert "stablehlo.while" in text


@pytest.mark.parametrize("module", [pallas_gpu, pallas_tpu])
def test_kernels_take_long_rows_in_slices(module, monkeypatch):
    monkeypatch.setattr(module, "_COLUMNS", 256)
    x = numbers((20, 700), 50)
    expected = scipy.special.softmax(np.asarray(x, np.float64), axis=-1)
    found = run(module.__name__.split(".")[-1], monkeypatch, lambda softmax: softmax, x)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients(implementation, dtype, monkeypatch):
    x, g = numbers((2, 3, 50), 5, dtype), numbers((2, 3, 50), 1, dtype, seed=1)
    (expected,) = jax.vjp(lambda x: jax.nn.softmax(x.astype(jnp.float32)).astype(dtype), x)[1](g)
    (found,) = run(implementation, monkeypatch, lambda softmax: lambda x, g: jax.vjp(softmax, x)[1](g), x, g)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(
        *(np.asarray(v, np.float32) for v in (found, expected)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8), st.floats(-80, 80, width=32))
def test_pairs_are_exponentials(values, shift):
    x = np.array(values, np.float32)
    m, n = pairs.exponential(jnp.asarray(x))
    assert ((0.7 < m) & (m < 1.5)).all() and (n == np.round(n)).all()
    exact = np.exp(np.asarray(x, np.float64))
    np.testing.assert_allclose(np.ldexp(np.asarray(m, np.float64), np.asarray(n, int)), exact, rtol=5e-7)
    mantissa, exponent = pairs.total((m, n))
    whole = np.ldexp(np.float64(mantissa[0]), int(exponent[0]))
    np.testing.assert_allclose(whole, exact.sum(), rtol=2e-6)
    folded = jnp.zeros(()), jnp.float32(pairs.NOTHING)
    for one in zip(m, n, strict=True):
        folded = pairs.add(folded, one)
    np.testing.assert_allclose(np.ldexp(np.float64(folded[0]), int(folded[1])), whole, rtol=2e-6)


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(st.integers(1, 5), st.integers(1, 400), st.floats(0.1, 1000))
def test_any_shape(rows, columns, scale):
    x = numbers((rows, columns), scale)
    expected = scipy.special.softmax(np.asarray(x, np.float64), axis=-1)
    np.testing.assert_allclose(softmax(x, implementation="xla"), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("module", [pallas_gpu, pallas_tpu])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 5000), jnp.float32), ((64, 4096), jnp.bfloat16)])
def test_kernels_are_lowered_without_the_device(module, shape, dtype):
    assert_lowers(module.__name__.split(".")[-1], module.softmax, (shape, dtype))


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_kernels_are_mapped(implementation, monkeypatch):
    x = numbers((2, 3, 10), 5)
    found = run(implementation, monkeypatch, lambda softmax: jax.vmap(softmax, 1, 1), x)
    np.testing.assert_allclose(found, jax.nn.softmax(x, axis=-1), rtol=1e-6)


def test_what_kernels_do_not_take_xla_does(monkeypatch):
    monkeypatch.setattr(dispatch, "tpu_reason", lambda **at: None)
    with pytest.raises(ValueError, match="must be bfloat16 or float32, got float16"):
        softmax(jnp.zeros((2, 3), jnp.float16), implementation="pallas_tpu")
    np.testing.assert_allclose(softmax(jnp.zeros((2, 4), jnp.float16)), 0.25)


def test_mapped():
    x = numbers((2, 3, 4, 10), 5)
    expected = jax.nn.softmax(x, axis=-1)
    np.testing.assert_allclose(jax.vmap(softmax)(x), expected, rtol=1e-6)
    found = jax.vmap(jax.vmap(softmax, 1, 1), 0)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(softmax, -1, -1)(x[0, 0]), jax.nn.softmax(x[0, 0], axis=0), rtol=1e-6)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels import softmax

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
x = jax.random.normal(jax.random.key(0), (8, 6, 64))
for spec in (P("data", "model"), P(("data", "model")), P(None, None, "model")):
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    step = jax.jit(jax.value_and_grad(lambda x: jnp.sin(9 * softmax(x)).sum()))
    for one, other in zip(step(sharded), step(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    gathers = "all-gather" in jax.jit(softmax).lower(sharded).compile().as_text()
    assert gathers == (spec == P(None, None, "model")), f"rows are independent, but not for {spec}"
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SHARDED)


@pytest.mark.parametrize(
    ("x", "implementation", "message"),
    [
        (np.float32(1), None, "x has shape (); it must be (..., K) with no empty axis"),
        (np.zeros((2, 0), np.float32), None, "x has shape (2, 0); it must be (..., K) with no empty axis"),
        (np.zeros((2, 3), np.int32), None, "x is int32; it must be bfloat16, float16 or float32"),
        (
            np.zeros((2, 3), np.float32),
            "pallas_tpu",
            "softmax cannot run 'pallas_tpu' here: it needs a TPU, and JAX runs on",
        ),
        (np.zeros((2, 3), np.float32), "triton", "softmax has no implementation 'triton'"),
    ],
)
def test_bad_input_is_told_in_one_sentence(x, implementation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        softmax(x, implementation=implementation)
