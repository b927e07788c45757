"""Unstructured products against scipy and numpy, and their gradients against autodiff of the reference."""

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
from pallas_kernels.csr_matmul import xla

IMPLEMENTATIONS = ["xla", "reference"]


def make(rows, columns, density=0.3, seed=0, dtype=np.float32):
    """A random matrix in scipy's CSR, with an empty row and an empty column where there is room."""
    rng = np.random.default_rng(seed)
    keep = rng.random((rows, columns)) < density
    keep[rows // 2 : rows // 2 + (rows > 1)] = False
    keep[:, : columns > 1] = False
    return scipy.sparse.csr_array(np.where(keep, rng.normal(size=keep.shape), 0).astype(dtype))


def parts(csr, dtype=jnp.float32):
    """The arrays of `csr_matmul`: the CSR of the transposed matrix."""
    turned = csr.T.tocsr()
    return jnp.asarray(turned.data, dtype), jnp.asarray(turned.indices), jnp.asarray(turned.indptr)


def inputs(batch, rows, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, rows)), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 40, 300), (130, 64, 65), (2, 1, 1), (0, 4, 5)])
def test_products_equal_scipys(implementation, dtype, shape):
    batch, rows, columns = shape
    csr, x = make(rows, columns), inputs(batch, rows, dtype=dtype)
    weights = parts(csr, dtype)
    y = pallas_kernels.csr_matmul(x, *weights, implementation=implementation)
    rounded = scipy.sparse.csc_array((np.asarray(weights[0], float), *weights[1:]), csr.shape)
    assert y.dtype == dtype
    assert_close(y, np.asarray(x, float) @ rounded.toarray(), dtype, 2)


@pytest.mark.slow
def test_cpus_multiply_in_jaxlibs_kernel_and_others_by_the_size(monkeypatch):
    csr = make(40, 30)

    def text(batch):
        return jax.jit(xla.matmul).lower(inputs(batch, 40), *parts(csr)).as_text()

    assert "cpu_csr_sparse_dense" in text(1) and "cpu_csr_sparse_dense" in text(64)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()
    assert "dot_general" not in text(1) and "dot_general" in text(64)
    for batch in (1, 64):
        x = inputs(batch, 40)
        assert_close(xla.matmul(x, *parts(csr)), np.asarray(x) @ csr.toarray(), "float32")
    jax.clear_caches()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0, 1),
)
def test_any_shape_and_pattern(batch, rows, columns, density):
    csr, x = make(rows, columns, density), inputs(batch, rows)
    y = pallas_kernels.csr_matmul(x, *parts(csr))
    assert_close(y, np.asarray(x) @ csr.toarray(), "float32")


@pytest.mark.parametrize("batch", [2, 70])
def test_gradients_equal_autodiff_of_the_reference(batch):
    csr, x = make(12, 30), inputs(batch, 12)
    data, *pattern = parts(csr)

    def loss(implementation):
        product = lambda x, data: pallas_kernels.csr_matmul(  # noqa: E731
            x, data, *pattern, implementation=implementation
        )
        return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(product(*args))), (0, 1)))

    for found, expected in zip(loss("xla")(x, data), loss("reference")(x, data), strict=True):
        assert_close(found, expected, "float32", 4)
    dense = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(jnp.asarray(csr.toarray()))
    assert_close(loss("reference")(x, data)[1], dense.T[csr.T.tocsr().nonzero()], "float32", 4)


def test_gradients_of_gradients():
    csr, x = make(6, 9), inputs(3, 6)
    data, *pattern = parts(csr)

    def loss(x, data):
        y = pallas_kernels.csr_matmul(x, data, *pattern)
        return jnp.sum(jnp.sin(y))

    check_grads(loss, (x, data), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_vmap_over_inputs_and_over_weights():
    csr, x = make(12, 30), jnp.stack([inputs(4, 12, seed) for seed in range(3)])
    data, *pattern = parts(csr)
    many = jnp.stack([data, 2 * data, -data])

    def product(x, data):
        return pallas_kernels.csr_matmul(x, data, *pattern)

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
product = lambda x: pallas_kernels.csr_matmul(x, *cases.parts(csr))
cases.assert_close(jax.jit(product)(sharded), np.asarray(x) @ csr.toarray(), "float32")
assert "all-gather" not in jax.jit(product).lower(sharded).compile().as_text()
gradient = jax.jit(jax.grad(lambda x: (product(x) ** 2).sum()))
cases.assert_close(gradient(sharded), gradient(x), "float32", 4)
print("same")
"""


def test_on_a_mesh(assert_prints_same):
    assert_prints_same(SHARDED)


def test_an_input_beyond_the_last_reads_no_foreign_memory():
    data, indices, indptr = parts(make(5, 7))
    y = pallas_kernels.csr_matmul(jnp.ones((2, 5)), data, indices + 10**6, indptr)
    assert_close(
        y,
        np.add.reduceat(np.append(data, 0), indptr[:-1]) * (np.diff(indptr) > 0) * np.ones((2, 1)),
        "float32",
    )


def test_leading_axes_and_mixed_dtypes():
    csr, x = make(12, 30), inputs(6, 12)
    product = jax.jit(pallas_kernels.csr_matmul, static_argnames="implementation")
    y = np.asarray(x) @ csr.toarray()
    assert_close(product(x.reshape(2, 3, 12), *parts(csr)), y.reshape(2, 3, 30), "float32")
    assert_close(product(x[0], *parts(csr)), y[0], "float32")
    assert product(x.astype(jnp.bfloat16), *parts(csr)).dtype == jnp.float32
    data, indices, indptr = parts(csr)
    assert_close(product(x, data, indices.astype(jnp.uint16), indptr), y, "float32")


def test_integers_are_promoted():
    csr = make(5, 7)
    x = jnp.arange(10).reshape(2, 5)
    y = pallas_kernels.csr_matmul(x, *parts(csr))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, pallas_kernels.csr_matmul(x.astype(jnp.float32), *parts(csr)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinities_and_nan_stay(implementation):
    csr = scipy.sparse.csr_array(np.eye(4, dtype=np.float32))
    x = jnp.asarray([[jnp.inf, 1, 1, 1], [1, jnp.nan, 1, 1]])
    y = pallas_kernels.csr_matmul(x, *parts(csr), implementation=implementation)
    assert y[0, 0] == jnp.inf and jnp.isnan(y[1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 0))}, r"x must end with at least one input, but its shape is \(2, 0\)"),
        ({"x": jnp.ones((2, 5), complex)}, "x must be floating, got complex64"),
        ({"data": jnp.ones(6, int)}, "data must be floating, got int32"),
        ({"indices": jnp.zeros(3)}, r"data and indices must be two vectors of one length, got shapes"),
        (
            {"indptr": jnp.zeros(())},
            r"indptr must be a vector of one more than W has outputs, got shape \(\)",
        ),
        ({"implementation": "cuda"}, r"csr_matmul has no implementation 'cuda' \(known: xla, reference\)"),
    ],
)
def test_bad_input(change, message):
    data, indices, indptr = parts(make(5, 7))
    args = {"x": inputs(2, 5), "data": data, "indices": indices, "indptr": indptr} | change
    with pytest.raises(ValueError, match=message):
        pallas_kernels.csr_matmul(**args)
