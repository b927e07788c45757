"""N:M products against numpy, their kernels interpreted and lowered, their gradients against autodiff."""

import importlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from kernel_checks import assert_close, assert_lowers, running

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.nm_matmul import layout, reference, xla

KERNELS = {
    name: importlib.import_module(f"pallas_kernels.nm_matmul.{name}") for name in ("pallas_gpu", "pallas_tpu")
}
# Positions of 1, 2, 3, 4, 5 and 8 bits; with 3 and 5 they straddle bytes.
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (3, 8), (4, 16), (5, 32), (17, 32), (3, 256)]


def make(n, m, groups, columns, seed=0):
    """A random weight: dense, values and packed indices, the latter bit by bit from their definition."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((groups * m, columns), np.float32)
    values, bits = [], [[] for _ in range(columns)]
    for column in range(columns):
        kept = []
        for group in range(groups):
            for position in sorted(rng.choice(m, n, replace=False)):
                kept.append(rng.normal())
                weight[group * m + position, column] = kept[-1]
                bits[column] += [position >> bit & 1 for bit in range(m.bit_length() - 1)]
        values.append(kept)
    packed = np.zeros((-(-len(bits[0]) // 8), columns), np.uint8)
    for column, stream in enumerate(bits):
        for at, bit in enumerate(stream):
            packed[at // 8, column] |= bit << at % 8
    return weight, jnp.asarray(np.asarray(values, np.float32).T), jnp.asarray(packed)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_decompression(n, m):
    weight, values, indices = make(n, m, 3, 5)
    np.testing.assert_array_equal(reference.dense(values, indices, n, m), weight)
    np.testing.assert_array_equal(xla.decompress(values, indices, n, m), weight)
    codes = layout.unpack(indices, values.shape[0], m)
    rows = np.arange(values.shape[0])[:, None] // n * m + np.asarray(codes)
    np.testing.assert_array_equal(np.take_along_axis(weight, rows, axis=0), values)
    np.testing.assert_array_equal(xla.sample(jnp.asarray(weight), indices, n, m), values)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_period_has_whole_groups_and_bytes(n, m, multiple):
    whole = layout.period(n, m, multiple)
    assert whole.entries % n == 0 and whole.rows == whole.entries // n * m
    assert whole.entries * layout.index_bits(m) == 8 * whole.bytes and whole.bytes % multiple == 0
    shorter = range(n, whole.entries, n)
    assert not any(entries * layout.index_bits(m) % (8 * multiple) == 0 for entries in shorter)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(PATTERNS[:7]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
)
def test_any_shape(pattern, groups, columns, leading):
    n, m = pattern
    weight, values, indices = make(n, m, groups, columns)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*leading, groups * m)), jnp.float32)
    assert_close(pallas_kernels.nm_matmul(x, values, indices, n=n, m=m), x @ weight, "float32")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_dtypes_and_jit(implementation):
    weight, values, indices = make(2, 4, 8, 16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 32)), jnp.bfloat16)
    product = jax.jit(pallas_kernels.nm_matmul, static_argnames=("n", "m", "implementation"))
    y = product(x, values.astype(jnp.bfloat16), indices, n=2, m=4, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert_close(y, np.asarray(x, float) @ weight, "bfloat16", 2)
    assert product(x, values, indices, n=2, m=4, implementation=implementation).dtype == jnp.float32
    assert_close(product(x[0], values, indices, n=2, m=4), np.asarray(x[0], float) @ weight, "float32")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (17, 32)])
def test_gradients_equal_autodiff_of_the_reference(n, m):
    _, values, indices = make(n, m, 3, 6)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 3 * m)), jnp.float32)

    def loss(product, x, values):
        return jnp.sum(jnp.sin(product(x, values)))

    ours = lambda x, v: pallas_kernels.nm_matmul(x, v, indices, n=n, m=m)  # noqa: E731
    theirs = lambda x, v: reference.matmul(x.reshape(-1, 3 * m), v, indices, n, m)  # noqa: E731
    found, expected = (jax.grad(loss, (1, 2))(product, x, values) for product in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float32", 4)


def test_gradients_have_gradients():
    _, values, indices = make(2, 4, 1, 3)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)
    product = lambda x, v: jnp.tanh(pallas_kernels.nm_matmul(x, v, indices, n=2, m=4))  # noqa: E731
    check_grads(product, (x, values), order=2, modes=["rev"], atol=0.05, rtol=0.05)


def test_vmap_over_inputs_and_over_weights():
    made = [make(2, 4, 2, 5, seed) for seed in range(3)]
    weights, values, indices = (jnp.stack([each[i] for each in made]) for i in range(3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 8)), jnp.float32)
    product = lambda x, v, i: pallas_kernels.nm_matmul(x, v, i, n=2, m=4)  # noqa: E731
    assert_close(jax.vmap(product)(x, values, indices), np.einsum("bik,bkn->bin", x, weights), "float32")
    slopes = jax.vmap(jax.grad(lambda v, x: product(x, v, indices[0]).sum()), (None, 0))(values[0], x)
    whole = jax.grad(lambda v: product(x, v, indices[0]).sum())(values[0])
    assert_close(slopes.sum(0), whole, "float32")


# Sizes that do not divide a tile, one row, several tiles, a batch of either kernel; patterns whose positions straddle bytes.
SHAPES = {
    "pallas_gpu": [(3, 2, 4, 50, 144), (70, 2, 4, 34, 128), (1, 4, 8, 35, 16), (33, 1, 4, 10, 48)],
    "pallas_tpu": [(3, 2, 4, 50, 128), (17, 4, 8, 35, 256), (1, 3, 4, 10, 128), (9, 1, 2, 33, 128)],
}
DTYPES = {"pallas_gpu": (jnp.bfloat16, jnp.float16), "pallas_tpu": (jnp.bfloat16, jnp.float32)}
CASES = [
    (name, dtype, *shape) for name, shapes in SHAPES.items() for shape in shapes for dtype in DTYPES[name]
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "batch", "n", "m", "groups", "columns"), CASES)
def test_kernels_equal_the_reference(name, dtype, batch, n, m, groups, columns):
    _, values, indices = make(n, m, groups, columns)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, groups * m)), dtype)
    values = values.astype(dtype)
    assert KERNELS[name].reason(x.shape, values.shape, dtype, n, m) is None
    with running(name):
        y = KERNELS[name].matmul(x, values, indices, n, m)
    assert_close(y, reference.matmul(x, values, indices, n, m), dtype, 2)


@pytest.mark.parametrize(
    ("name", "dtype", "batch", "n", "m", "groups", "columns"),
    [
        *CASES,
        ("pallas_gpu", jnp.bfloat16, 300, 2, 4, 256, 512),
        ("pallas_gpu", jnp.bfloat16, 16, 8, 16, 64, 512),
    ],
)
def test_kernels_lower_without_a_device(name, dtype, batch, n, m, groups, columns):
    entries = groups * n
    indices = (layout.index_bytes(entries, m), columns)
    assert_lowers(
        name,
        lambda *args: KERNELS[name].matmul(*args, n, m),
        ((batch, groups * m), dtype),
        ((entries, columns), dtype),
        (indices, jnp.uint8),
    )


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_gradients_of_kernels(name, monkeypatch):
    _, values, indices = make(2, 4, 16, 128)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 64)), jnp.bfloat16)
    values = values.astype(jnp.bfloat16)
    with running(name, monkeypatch):
        product = lambda x, v: pallas_kernels.nm_matmul(x, v, indices, n=2, m=4, implementation=name)  # noqa: E731
        y, backward = jax.vjp(product, x, values)
    expected_y, expected = jax.vjp(lambda x, v: reference.matmul(x, v, indices, 2, 4), x, values)
    assert_close(y, expected_y, "bfloat16", 2)
    for one, other in zip(backward(y), expected(y), strict=True):
        assert_close(one, other, "bfloat16", 8)


def test_kernels_under_vmap(monkeypatch):
    made = [make(2, 4, 8, 128, seed) for seed in range(2)]
    weights, values, indices = (jnp.stack([each[i] for each in made]) for i in range(3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 32)), jnp.bfloat16)
    values = values.astype(jnp.bfloat16)

    def product(x, values, indices):
        return pallas_kernels.nm_matmul(x, values, indices, n=2, m=4, implementation="pallas_gpu")

    with running("pallas_gpu", monkeypatch):
        shared = jax.vmap(product, (0, None, None))(x, values[0], indices[0])
        own = jax.vmap(product)(x, values, indices)
    assert_close(shared, np.einsum("bik,kn->bin", np.asarray(x, float), weights[0]), "bfloat16", 4)
    assert_close(own, np.einsum("bik,bkn->bin", np.asarray(x, float), weights), "bfloat16", 4)


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("weights", [(), (3,)])
def test_kernels_lower_under_vmap(name, weights, monkeypatch):
    # JAX's interpreter of TPU kernels has no mapped ones.
    monkeypatch.setattr(dispatch, "gpu_reason", lambda *generations, **at: None)
    monkeypatch.setattr(dispatch, "tpu_reason", lambda **at: None)

    def product(x, values, indices):
        return pallas_kernels.nm_matmul(x, values, indices, n=2, m=4, implementation=name)

    axes = (0, 0, 0) if weights else (0, None, None)
    shapes = (3, 5, 64), (*weights, 32, 128), (*weights, 8, 128)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.uint8
    assert_lowers(name, jax.vmap(product, axes), *zip(shapes, dtypes, strict=True))


@pytest.mark.parametrize("batch", [3, 100])
def test_blackwells_sparse_tensor_cores_lower(batch, monkeypatch):
    from jax.experimental.mosaic.gpu import core, utils

    blackwell = importlib.import_module("pallas_kernels.nm_matmul.blackwell")
    if reason := blackwell.reason((batch, 256), (128, 256), jnp.bfloat16, 2, 4):
        pytest.skip(reason)
    # Without a device JAX lowers for Hopper, and has no option for another one.
    monkeypatch.setattr(utils if hasattr(utils, "_infer_arch") else core, "_infer_arch", lambda: (10, 0))
    shapes = ((batch, 256), jnp.bfloat16), ((128, 256), jnp.bfloat16), ((32, 256), jnp.uint8)
    assert_lowers("pallas_gpu", lambda *args: blackwell.matmul(*args, 2, 4), *shapes)


def test_blackwells_kernel_must_be_named(monkeypatch):
    package = sys.modules["pallas_kernels.nm_matmul"]
    monkeypatch.setattr(dispatch, "gpu_reason", lambda *generations, **at: None)
    monkeypatch.setattr(
        dispatch, "module", lambda *_: types.SimpleNamespace(reason=lambda *_: None, is_blackwell=here.pop)
    )
    arrays = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16), jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    for is_blackwell, first in ((True, "xla"), (False, "pallas_gpu")):
        here = [is_blackwell]
        assert dispatch.pick("nm_matmul", None, package._reasons(*arrays, 2, 4)) == first


def test_blackwells_sparse_tensor_cores_interpreted():
    blackwell = importlib.import_module("pallas_kernels.nm_matmul.blackwell")
    _, values, indices = make(2, 4, 32, 128)
    x, values = jnp.ones((3, 128), jnp.bfloat16), values.astype(jnp.bfloat16)
    if reason := blackwell.reason(x.shape, values.shape, x.dtype, 2, 4):
        pytest.skip(reason)
    with running("pallas_gpu"):
        try:
            y = jax.block_until_ready(blackwell.matmul(x, values, indices, 2, 4))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            pytest.skip("JAX's interpreter of GPU kernels does not know sparse metadata")
    assert_close(y, reference.matmul(x, values, indices, 2, 4), "bfloat16", 2)


def test_metadata_of_sparse_tensor_cores():
    blackwell = importlib.import_module("pallas_kernels.nm_matmul.blackwell")
    if reason := blackwell.reason((1, 128), (64, 128), jnp.bfloat16, 2, 4):
        pytest.skip(reason)
    weight, values, indices = make(2, 4, 32, 128)
    found = np.asarray(blackwell.metadata(indices, 64, jnp.bfloat16).astype(jnp.uint8)).reshape(-1)
    # The order is a permutation of the positions of all groups, so that counts must agree.
    positions = np.nonzero(weight.T.reshape(-1, 4))[1]
    np.testing.assert_array_equal(np.bincount(found), np.bincount(positions))


@pytest.mark.parametrize(
    ("name", "n", "m", "columns", "dtype", "message"),
    [
        ("pallas_gpu", 2, 4, 128, jnp.float32, "its operands must be bfloat16 or float16, got float32"),
        ("pallas_gpu", 2, 4, 100, jnp.bfloat16, "the weight's columns must be a multiple of 16, got 100"),
        (
            "pallas_gpu",
            3,
            8,
            128,
            jnp.bfloat16,
            "a period of the pattern may have at most 16 rows, 3:8 has 64",
        ),
        ("pallas_tpu", 2, 4, 100, jnp.bfloat16, "the weight's columns must be a multiple of 128, got 100"),
        (
            "pallas_tpu",
            127,
            256,
            128,
            jnp.float32,
            "a period of the pattern may have at most 256 entries, 127:256 has 1016",
        ),
    ],
)
def test_shapes_that_kernels_cannot_tile(name, n, m, columns, dtype, message):
    assert KERNELS[name].reason((4, 4 * m), (4 * n, columns), dtype, n, m) == message


@pytest.mark.parametrize(
    ("n", "m", "batch"), [(3, 4, 33), (10, 16, 600), (12, 16, 33), (14, 16, 17), (16, 16, 1)]
)
def test_tiles_that_do_not_fit_into_shared_memory(n, m, batch):
    reason = KERNELS["pallas_gpu"].reason
    shapes = (32 * m, 32 * n)
    assert reason((batch, shapes[0]), (shapes[1], 128), jnp.bfloat16, n, m).startswith(
        f"its tiles must fit into 232448 bytes of shared memory, and {n}:{m} needs "
    )
    if batch > 1:
        assert reason((batch // 2, shapes[0]), (shapes[1], 128), jnp.bfloat16, n, m) is None or batch > 64


TRITON = """
import sys
import jax.numpy as jnp, numpy as np
sys.path[:0] = ["tests/pallas_kernels", "."]
from kernel_checks import InMemory, assert_close
from test_nm_matmul import make
from pallas_kernels.nm_matmul import triton
from pallas_kernels.nm_matmul.triton_kernel import nm_kernel

for batch, n, m, groups, columns in [(3, 2, 4, 37, 130), (1, 1, 2, 5, 7), (16, 4, 16, 9, 128), (5, 8, 256, 2, 20), (2, 4, 4, 4, 3)]:
    weight, values, indices = make(n, m, groups, columns)
    x = np.random.default_rng(1).normal(size=(batch, groups * m)).astype(np.float32)
    known = triton.constants(x.shape, values.shape, n, m)
    programs = triton.grid(known)
    y = np.full((programs[1], batch, columns), np.nan, np.float32)
    nm_kernel[programs](*map(InMemory, (x, np.array(values), np.array(indices), y)), **known)
    assert_close(y.sum(0), x @ weight, "float32")
print("same")
"""


def test_the_triton_kernel_equals_the_reference(assert_prints_same):
    pytest.importorskip("triton")
    assert_prints_same(TRITON, devices=1, TRITON_INTERPRET="1")  # read when Triton is imported


def test_triton_says_why_it_cannot_run():
    triton = importlib.import_module("pallas_kernels.nm_matmul.triton")
    shape = (2, 8), (4, 3), jnp.bfloat16
    assert triton.reason((17, 8), *shape[1:], 2, 4) == "it multiplies from 1 to 16 rows, got 17"
    assert triton.reason(*shape, 3, 4).startswith(
        "n must be a power of two and m one of 2, 4, 16 and 256, got 3:4"
    )
    if jax.__version_info__ >= (0, 12):
        assert "jax-triton" in triton.reason(*shape, 2, 4)


def test_bad_input():
    _, values, indices = make(2, 4, 3, 5)
    x = jnp.zeros((2, 12))

    def message(x=x, values=values, indices=indices, n=2, m=4, **keywords):
        with pytest.raises(ValueError) as error:
            pallas_kernels.nm_matmul(x, values, indices, n=n, m=m, **keywords)
        return str(error.value)

    assert message(m=6) == "n:m must have 0 < n <= m and m a power of two from 2 to 256, got 2:6"
    assert message(n=5) == "n:m must have 0 < n <= m and m a power of two from 2 to 256, got 5:4"
    assert message(x=x[:, :8]) == "x must end with the weight's 12 rows, but its shape is (2, 8)"
    assert message(values=values[:5]).startswith(
        "values must be floats of shape (groups * 2, columns), neither of them 0, got float32"
    )
    assert message(values=values[:, :0], indices=indices[:, :0]).startswith("values must be floats of shape")
    assert message(x=x[:, :0], values=values[:0], indices=indices[:0]).startswith("values must be floats of")
    assert (
        message(indices=indices[:1])
        == "the packed indices must be uint8 of shape (2, 5), got uint8 of shape (1, 5)"
    )
    assert message(indices=indices.astype(jnp.int32)).startswith(
        "the packed indices must be uint8 of shape (2, 5)"
    )
    for name in ("pallas_gpu", "triton", "pallas_tpu"):
        assert re.match(f"nm_matmul cannot run '{name}' here: it needs a", message(implementation=name))
    assert message(implementation="cuda").startswith("nm_matmul has no implementation 'cuda' (known: ")
