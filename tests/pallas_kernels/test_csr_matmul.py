"""Unstructured products against scipy and numpy, and their gradients against autodiff of the reference."""

import builtins
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from kernel_checks import assert_close

import pallas_kernels
from pallas_kernels.csr_matmul import numba as kernels
from pallas_kernels.csr_matmul import reasons, xla

IMPLEMENTATIONS = ["numba", "xla", "reference"]


def make(rows, columns, density=0.3, seed=0, dtype=np.float32):
    """A random matrix in scipy's CSR, with an empty row and an empty column where there is room."""
    rng = np.random.default_rng(seed)
    keep = rng.random((rows, columns)) < density
    keep[rows // 2 : rows // 2 + (rows > 1)] = False
    keep[:, : columns > 1] = False
    return scipy.sparse.csr_array(np.where(keep, rng.normal(size=keep.shape), 0).astype(dtype))


def parts(csr, dtype=jnp.float32):
    return jnp.asarray(csr.data, dtype), jnp.asarray(csr.indices), jnp.asarray(csr.indptr)


def inputs(batch, rows, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, rows)), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 40, 300), (130, 64, 65), (2, 1, 1), (0, 4, 5)])
def test_products_equal_scipys(implementation, dtype, shape):
    batch, rows, columns = shape
    csr, x = make(rows, columns), inputs(batch, rows, dtype=dtype)
    weights = parts(csr, dtype)
    y = pallas_kernels.csr_matmul(x, *weights, columns=columns, implementation=implementation)
    rounded = scipy.sparse.csr_array((np.asarray(weights[0], float), csr.indices, csr.indptr), csr.shape)
    assert y.dtype == dtype
    assert_close(y, np.asarray(x, float) @ rounded.toarray(), dtype, 2)


@pytest.mark.parametrize("panel", [1, 100])
def test_columns_in_several_panels(panel, monkeypatch):
    monkeypatch.setattr(kernels, "PANEL", panel)
    csr, x = make(40, 90), inputs(9, 40)
    y = pallas_kernels.csr_matmul(x, *parts(csr), columns=90, implementation="numba")
    assert_close(y, np.asarray(x) @ csr.toarray(), "float32")


@pytest.mark.parametrize(("batch", "dense"), [(1, False), (64, True)])
def test_xla_multiplies_densely_where_that_needs_less_memory(batch, dense):
    csr = make(40, 30)
    text = (
        jax.jit(lambda x, *weights: xla.matmul(x, *weights, 30))
        .lower(inputs(batch, 40), *parts(csr))
        .as_text()
    )
    assert ("dot_general" in text) == (batch * csr.nnz > 40 * 30) == dense


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0, 1),
    st.sampled_from(["numba", "xla"]),
)
def test_any_shape_and_pattern(batch, rows, columns, density, implementation):
    csr, x = make(rows, columns, density), inputs(batch, rows)
    y = pallas_kernels.csr_matmul(x, *parts(csr), columns=columns, implementation=implementation)
    assert_close(y, np.asarray(x) @ csr.toarray(), "float32")


@pytest.mark.parametrize("implementation", ["numba", "xla"])
@pytest.mark.parametrize("batch", [2, 70])
def test_gradients_equal_autodiff_of_the_reference(implementation, batch):
    csr, x = make(12, 30), inputs(batch, 12)
    data, *pattern = parts(csr)

    def loss(implementation):
        product = lambda x, data: pallas_kernels.csr_matmul(  # noqa: E731
            x, data, *pattern, columns=30, implementation=implementation
        )
        return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(product(*args))), (0, 1)))

    for found, expected in zip(loss(implementation)(x, data), loss("reference")(x, data), strict=True):
        assert_close(found, expected, "float32", 4)
    dense = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(jnp.asarray(csr.toarray()))
    assert_close(loss("reference")(x, data)[1], dense[csr.nonzero()], "float32", 4)


@pytest.mark.parametrize("implementation", ["numba", "xla"])
def test_gradients_of_gradients(implementation):
    csr, x = make(6, 9), inputs(3, 6)
    data, *pattern = parts(csr)

    def loss(x, data):
        y = pallas_kernels.csr_matmul(x, data, *pattern, columns=9, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    check_grads(loss, (x, data), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("implementation", ["numba", "xla"])
def test_vmap_over_inputs_and_over_weights(implementation):
    csr, x = make(12, 30), jnp.stack([inputs(4, 12, seed) for seed in range(3)])
    data, *pattern = parts(csr)
    many = jnp.stack([data, 2 * data, -data])

    def product(x, data):
        return pallas_kernels.csr_matmul(x, data, *pattern, columns=30, implementation=implementation)

    dense = csr.toarray()
    assert_close(jax.vmap(product, (0, None))(x, data), np.asarray(x) @ dense, "float32")
    both = jax.jit(jax.vmap(product))(x, many)
    assert_close(both, np.stack([x[0] @ dense, x[1] @ (2 * dense), x[2] @ -dense]), "float32", 2)


SHARDED = """
import jax, sys
sys.path.insert(0, "tests/pallas_kernels")
import numpy as np
import pallas_kernels, test_csr_matmul as cases
from jax.sharding import Mesh, NamedSharding, PartitionSpec

csr, x = cases.make(12, 30), cases.inputs(16, 12)
sharded = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")))
for implementation in ("numba", "xla"):
    product = lambda x: pallas_kernels.csr_matmul(x, *cases.parts(csr), columns=30, implementation=implementation)
    cases.assert_close(jax.jit(product)(sharded), np.asarray(x) @ csr.toarray(), "float32")
    gradient = jax.jit(jax.grad(lambda x: (product(x) ** 2).sum()))
    cases.assert_close(gradient(sharded), gradient(x), "float32", 4)
print("same")
"""


def test_on_a_mesh():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_callbacks_of_large_arrays_in_a_loop_end():
    csr, x = make(1024, 1024, 0.05), inputs(256, 1024)
    weights = parts(csr)

    def step(x, _):
        return jnp.tanh(pallas_kernels.csr_matmul(x, *weights, columns=1024, implementation="numba")), None

    y = jax.jit(lambda x: jax.lax.scan(step, x, None, length=20)[0])(x)
    assert np.isfinite(y).all() and np.abs(y).max() <= 1


def test_leading_axes_and_mixed_dtypes():
    csr, x = make(12, 30), inputs(6, 12)
    product = jax.jit(pallas_kernels.csr_matmul, static_argnames="columns")
    y = np.asarray(x) @ csr.toarray()
    assert_close(product(x.reshape(2, 3, 12), *parts(csr), columns=30), y.reshape(2, 3, 30), "float32")
    assert_close(product(x[0], *parts(csr), columns=30), y[0], "float32")
    assert product(x.astype(jnp.bfloat16), *parts(csr), columns=30).dtype == jnp.float32
    data, indices, indptr = parts(csr)
    assert_close(product(x, data, indices.astype(jnp.uint16), indptr, columns=30), y, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinities_and_nan_stay(implementation):
    csr = scipy.sparse.csr_array(np.eye(4, dtype=np.float32))
    x = jnp.asarray([[jnp.inf, 1, 1, 1], [1, jnp.nan, 1, 1]])
    y = pallas_kernels.csr_matmul(x, *parts(csr), columns=4, implementation=implementation)
    assert y[0, 0] == jnp.inf and jnp.isnan(y[1, 1])


def test_without_numba_xla_stands_in(monkeypatch):
    assert reasons(1)["numba"] is None
    assert list(reasons(2**20)) == ["numba", "xla", "reference"] and next(iter(reasons(100))) == "xla"

    def refuse(name, *args, **kwargs):
        if name == "numba":
            raise ImportError("No module named 'numba'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(sys.modules["pallas_kernels.csr_matmul"], "SMALL", 0)
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    csr, x = make(5, 7), inputs(2, 5)
    y = pallas_kernels.csr_matmul(x, *parts(csr), columns=7)
    assert_close(y, np.asarray(x) @ csr.toarray(), "float32")
    with pytest.raises(
        ValueError, match=r"csr_matmul cannot run 'numba' here: numba cannot be imported .*sparsejax\[cpu\]"
    ):
        pallas_kernels.csr_matmul(x, *parts(csr), columns=7, implementation="numba")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 6))}, r"x must end with the weight's 5 rows, but its shape is \(2, 6\)"),
        ({"x": jnp.ones((2, 5), int)}, "x must be floating, got int32"),
        ({"indices": jnp.zeros(3)}, r"data and indices must be two vectors of one length, got shapes"),
        (
            {"indptr": jnp.zeros(())},
            r"indptr must be a vector of one entry more than W has rows, got shape \(\)",
        ),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        (
            {"implementation": "cuda"},
            r"csr_matmul has no implementation 'cuda' \(known: xla, numba, reference\)",
        ),
    ],
)
def test_bad_input(change, message):
    data, indices, indptr = parts(make(5, 7))
    args = {"x": inputs(2, 5), "data": data, "indices": indices, "indptr": indptr, "columns": 7} | change
    with pytest.raises(ValueError, match=message):
        pallas_kernels.csr_matmul(**args)
