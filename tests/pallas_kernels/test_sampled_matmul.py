"""Sampled products against numpy, their kernels interpreted and lowered, their gradients against autodiff."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from kernel_checks import assert_close, assert_lowers, running

from pallas_kernels import block_sampled_matmul, sampled_matmul
from pallas_kernels.block_sparse_matmul import xla as block_xla
from pallas_kernels.sampled_matmul import reference, xla

KERNELS = {
    name: importlib.import_module(f"pallas_kernels.sampled_matmul.{name}")
    for name in ("pallas_gpu", "pallas_tpu")
}
INDICES = jnp.asarray([[0, 2, -1], [-1, -1, -1], [0, 1, 2]], jnp.int32)


def factors(rows, inner, columns, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, inner)), dtype), jnp.asarray(
        rng.normal(size=(inner, columns)), dtype
    )


def positions(rows, columns, count, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, rows, count)), jnp.asarray(rng.integers(0, columns, count))


def blocks_of(product, indices, block):
    """The stored blocks of a matrix, one at a time."""
    (height, width), product = block, np.asarray(product, np.float64)
    found = np.zeros((*indices.shape, height, width))
    for column, row_blocks in enumerate(np.asarray(indices)):
        for slot, row in enumerate(row_blocks):
            if row >= 0:
                found[column, slot] = product[row * height :, column * width :][:height, :width]
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("count", "chunk"), [(0, 2**19), (3, 2**19), (40, 64), (900, 2**19)])
def test_entries(count, chunk, dtype, monkeypatch):
    """From none, over several chunks, to so many that the whole product is computed, with repetitions."""
    monkeypatch.setattr(block_xla, "CHUNK", chunk)
    a, b = factors(40, 6, 50, dtype)
    rows, cols = positions(40, 50, count)
    whole = np.asarray(a, float) @ np.asarray(b, float)
    for implementation in ("xla", "reference"):
        found = sampled_matmul(a, b, rows, cols, implementation=implementation)
        assert found.dtype == dtype
        assert_close(found, whole[np.asarray(rows), np.asarray(cols)], dtype)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(0, 20))
def test_any_shape(rows, inner, columns, count):
    a, b = factors(rows, inner, columns)
    at = positions(rows, columns, count)
    assert_close(jax.jit(sampled_matmul)(a, b, *at), (np.asarray(a) @ np.asarray(b))[at], "float32")


@pytest.mark.parametrize(("count", "chunk"), [(30, 2**19), (30, 24), (900, 2**19)])
def test_gradients_of_entries(count, chunk, monkeypatch):
    monkeypatch.setattr(block_xla, "CHUNK", chunk)
    a, b = factors(40, 6, 50)
    rows, cols = positions(40, 50, count)

    def loss(function, a, b):
        return jnp.sum(jnp.sin(function(a, b, rows, cols)))

    found, expected = (jax.grad(loss, (1, 2))(f, a, b) for f in (sampled_matmul, reference.sampled))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float32", 4)


def test_gradients_have_gradients():
    a, b = factors(20, 2, 30)
    rows, cols = positions(20, 30, 4)
    function = lambda a, b: jnp.tanh(sampled_matmul(a, b, rows, cols))  # noqa: E731
    check_grads(function, (a, b), order=2, modes=["rev"], atol=0.05, rtol=0.05)
    a, b = factors(4, 2, 3)
    function = lambda a, b: jnp.tanh(block_sampled_matmul(a, b, jnp.asarray([[1]]), (2, 3)))  # noqa: E731
    check_grads(function, (a, b), order=2, modes=["rev"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2**19])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_blocks(implementation, chunk, dtype, monkeypatch):
    monkeypatch.setattr(block_xla, "CHUNK", chunk)
    a, b = factors(12, 7, 15, dtype)
    found = block_sampled_matmul(a, b, INDICES, (4, 5), implementation=implementation)
    assert found.dtype == dtype
    assert_close(found, blocks_of(np.asarray(a, float) @ np.asarray(b, float), INDICES, (4, 5)), dtype)


def test_gradients_of_blocks():
    a, b = factors(12, 7, 15)

    def loss(function, a, b):
        return jnp.sum(jnp.sin(function(a, b)))

    ours = lambda a, b: block_sampled_matmul(a, b, INDICES, (4, 5))  # noqa: E731
    theirs = lambda a, b: reference.block_sampled(a.T, b, INDICES, (4, 5))  # noqa: E731
    found, expected = (jax.grad(loss, (1, 2))(function, a, b) for function in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float32", 4)


def test_vmap():
    pairs = [factors(20, 6, 30, seed=seed) for seed in range(3)]
    a, b = (jnp.stack(each) for each in zip(*pairs, strict=True))
    rows, cols = positions(20, 30, 8)
    found = jax.vmap(sampled_matmul, (0, 0, None, None))(a, b, rows, cols)
    assert_close(found, (np.asarray(a) @ np.asarray(b))[:, rows, cols], "float32")
    found = jax.vmap(lambda a, b: block_sampled_matmul(a, b, jnp.asarray([[1], [0]]), (10, 15)))(a, b)
    expected = [blocks_of(np.asarray(x) @ np.asarray(y), np.asarray([[1], [0]]), (10, 15)) for x, y in pairs]
    assert_close(found, np.stack(expected), "float32")


BLOCK_SHAPES = {
    "pallas_gpu": [(50, (64, 64)), (1, (64, 48)), (70, (128, 80))],
    "pallas_tpu": [(20, (128, 128)), (1, (128, 256)), (530, (128, 128))],
}
BLOCK_CASES = [(name, inner, block) for name, shapes in BLOCK_SHAPES.items() for inner, block in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "inner", "block"), BLOCK_CASES)
def test_block_kernels_equal_the_reference(name, inner, block, dtype):
    a, b = factors(3 * block[0], inner, 3 * block[1], dtype)
    assert KERNELS[name].block_reason(block, dtype) is None
    with running(name):
        found = KERNELS[name].block_sampled(a.T, b, INDICES, block)
    assert_close(found, reference.block_sampled(a.T, b, INDICES, block), dtype, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "inner", "block"), BLOCK_CASES)
def test_block_kernels_lower_without_a_device(name, inner, block, dtype):
    assert_lowers(
        name,
        lambda x, g, indices: KERNELS[name].block_sampled(x, g, indices, block),
        ((inner, 3 * block[0]), dtype),
        ((inner, 3 * block[1]), dtype),
        (INDICES.shape, jnp.int32),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "inner"), [("pallas_gpu", 128), ("pallas_tpu", 256)])
@pytest.mark.parametrize("count", [1, 130])
def test_entry_kernels_equal_the_reference(name, inner, count, dtype):
    a, b = factors(20, inner, 30, dtype)
    rows, cols = positions(20, 30, count)
    assert KERNELS[name].reason(a.shape, b.shape, dtype) is None
    with running(name):
        found = KERNELS[name].sampled(a, b, rows, cols)
    assert_close(found, reference.sampled(a, b, rows, cols), dtype, 4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_entry_kernels_lower_without_a_device(name, dtype):
    arrays = ((20, 256), dtype), ((256, 30), dtype), ((130,), jnp.int32), ((130,), jnp.int32)
    assert_lowers(name, KERNELS[name].sampled, *arrays)


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_gradients_of_kernels(name, monkeypatch):
    a, b = factors(10, 128, 20)
    rows, cols = positions(10, 20, 12)
    with running(name, monkeypatch):
        y, backward = jax.vjp(lambda a, b: sampled_matmul(a, b, rows, cols, implementation=name), a, b)
    expected_y, expected = jax.vjp(lambda a, b: reference.sampled(a, b, rows, cols), a, b)
    assert_close(y, expected_y, "float32", 4)
    for one, other in zip(backward(y), expected(y), strict=True):
        assert_close(one, other, "float32", 8)


@pytest.mark.parametrize(
    ("name", "inner", "dtype", "message"),
    [
        ("pallas_gpu", 100, jnp.float32, "the inner size must be a multiple of 64, got 100"),
        ("pallas_tpu", 64, jnp.float32, "the inner size must be a multiple of 128, got 64"),
        ("pallas_tpu", 128, jnp.float16, "its operands must be bfloat16 or float32, got float16"),
    ],
)
def test_entries_that_kernels_cannot_sample(name, inner, dtype, message):
    assert KERNELS[name].reason((8, inner), (inner, 8), dtype) == message


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("pallas_gpu", (32, 32), "the block rows must be a multiple of 64, got 32"),
        ("pallas_gpu", (256, 64), "the block rows must be at most 128, got 256"),
        ("pallas_gpu", (64, 512), "the block width must be at most 256, got 512"),
        ("pallas_gpu", (64, 12), "the block width must be a multiple of 16, got 12"),
        ("pallas_tpu", (128, 64), "the block width must be a multiple of 128, got 64"),
    ],
)
def test_blocks_that_kernels_cannot_sample(name, block, message):
    assert KERNELS[name].block_reason(block, jnp.bfloat16) == message


def test_bad_input():
    a, b = factors(12, 7, 15)
    rows, cols = positions(12, 15, 4)

    def message(function, *args, **keywords):
        with pytest.raises(ValueError) as error:
            function(*args, **keywords)
        return str(error.value)

    assert message(sampled_matmul, a, b.T, rows, cols) == (
        "a and b must be matrices with a common inner size, got shapes (12, 7) and (15, 7)"
    )
    assert (
        message(sampled_matmul, a.astype(int), b, rows, cols)
        == "a and b must be floats, got int32 and float32"
    )
    assert message(sampled_matmul, a, b, rows, cols[:3]) == (
        "rows and cols must be two vectors of one length, got shapes (4,) and (3,)"
    )
    assert (
        message(sampled_matmul, a, b, rows, cols * 1.0)
        == "rows and cols must be integers, got int32 and float32"
    )
    assert message(block_sampled_matmul, a, b, INDICES, (5, 5)) == (
        "the block's sides must divide the product's shape (12, 15), got (5, 5)"
    )
    assert message(block_sampled_matmul, a, b, INDICES[:2], (4, 5)) == (
        "indices must have a row of at least one for each of the 3 block columns, at least one, got shape (2, 3)"
    )
    assert message(block_sampled_matmul, a, b, INDICES[:, :0], (4, 5)).startswith(
        "indices must have a row of"
    )
    assert (
        message(block_sampled_matmul, a, b, INDICES * 1.0, (4, 5)) == "indices must be integers, got float32"
    )
    for function, args in ((sampled_matmul, (rows, cols)), (block_sampled_matmul, (INDICES, (4, 5)))):
        text = message(function, a, b, *args, implementation="pallas_gpu")
        assert re.match(
            f"{function.__name__} cannot run 'pallas_gpu' here: it needs an NVIDIA GPU, and JAX runs on", text
        )
        assert "no implementation 'triton'" in message(function, a, b, *args, implementation="triton")


def test_many_entries_take_the_whole_product():
    few, many = (
        (rows.size * xla.DENSE > 40 * 50) for rows, _ in (positions(40, 50, 40), positions(40, 50, 900))
    )
    assert not few and many
