"""Block-sparse products against numpy, their kernels interpreted and lowered, their gradients against autodiff."""

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

import pallas_kernels
from pallas_kernels.block_sparse_matmul import bench, reference, xla
from pallas_kernels.block_sparse_matmul.schedule import schedule

KERNELS = {
    name: importlib.import_module(f"pallas_kernels.block_sparse_matmul.{name}")
    for name in ("pallas_gpu", "pallas_tpu")
}
# Row blocks of each block column: one is empty, one holds every row block.
PATTERN = [[0, 2], [], [0, 1, 2], [1]]
ROW_BLOCKS = 3


def make(pattern, block, dtype=jnp.float32, seed=0):
    """Random blocks and indices with a pattern, padded to its longest column."""
    rng = np.random.default_rng(seed)
    length = max(1, *map(len, pattern))
    indices = np.full((len(pattern), length), -1, np.int32)
    for column, rows in enumerate(pattern):
        indices[column, : len(rows)] = rows
    blocks = rng.normal(size=(*indices.shape, *block)) * (indices >= 0)[..., None, None]
    return jnp.asarray(blocks, dtype), jnp.asarray(indices)


def dense(blocks, indices, rows):
    """The dense weight, one block at a time."""
    (columns, _), (height, width) = indices.shape, blocks.shape[2:]
    weight = np.zeros((rows, columns * width))
    for column, row_blocks in enumerate(np.asarray(indices)):
        for slot, row in enumerate(row_blocks):
            if row >= 0:
                at = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
                weight[at] = np.asarray(blocks[column, slot], np.float64)
    return weight


def operands(batch, block, dtype, pattern=PATTERN, row_blocks=ROW_BLOCKS):
    blocks, indices = make(pattern, block, dtype)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(batch, row_blocks * block[0])), dtype)
    g = jnp.asarray(rng.normal(size=(batch, len(pattern) * block[1])), dtype)
    return x, g, blocks, indices


def test_the_reference_multiplies_with_the_dense_weight():
    x, g, blocks, indices = operands(5, (4, 3), jnp.float32)
    weight = dense(blocks, indices, 12)
    np.testing.assert_array_equal(reference.dense(blocks, indices, 12), weight.astype(np.float32))
    assert_close(reference.matmul(x, blocks, indices, 12), x @ weight, "float32")
    assert_close(reference.matmul_transposed(g, blocks, indices, 12), g @ weight.T, "float32")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", [(4, 3), (8, 70)])
@pytest.mark.parametrize("chunk", [1, 2**19])
def test_xla(block, dtype, chunk, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", chunk)
    x, g, blocks, indices = operands(5, block, dtype)
    rows = x.shape[1]
    weight = dense(blocks, indices, rows)
    assert_close(xla.matmul(x, blocks, indices, rows), np.asarray(x, float) @ weight, dtype)
    assert_close(xla.matmul_transposed(g, blocks, indices, rows), np.asarray(g, float) @ weight.T, dtype, 4)


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_any_shape_and_pattern(data):
    row_blocks, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    block = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    pattern = [sorted(data.draw(st.sets(st.integers(0, row_blocks - 1)))) for _ in range(columns)]
    x, _, blocks, indices = operands(data.draw(st.integers(1, 4)), block, jnp.float32, pattern, row_blocks)
    y = pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=x.shape[1])
    assert_close(y, x @ dense(blocks, indices, x.shape[1]), "float32")


def test_the_schedule_sorts_by_result_block():
    indices = jnp.asarray([[1, 2, -1], [-1, -1, -1], [0, 1, 2]])
    plan = schedule(indices, 3)
    assert plan.order[:5].tolist() == [0, 1, 6, 7, 8] and plan.source[:5].tolist() == [1, 2, 0, 1, 2]
    assert plan.target.tolist() == [0, 0, 2, 2, 2, 3, 3, 3, 3] and plan.starts.tolist() == [0, 2, 2, 5]
    plan = schedule(indices, 3, transposed=True)
    assert plan.order[:5].tolist() == [6, 0, 7, 1, 8] and plan.source[:5].tolist() == [2, 0, 2, 0, 2]
    assert plan.target[:5].tolist() == [0, 1, 1, 2, 2] and plan.starts.tolist() == [0, 1, 3, 5]


def test_leading_axes_jit_and_mixed_dtypes():
    x, _, blocks, indices = operands(6, (4, 3), jnp.float32)
    y = x @ dense(blocks, indices, 12)
    product = jax.jit(pallas_kernels.block_sparse_matmul, static_argnames=("rows", "implementation"))
    assert_close(product(x.reshape(2, 3, 12), blocks, indices, rows=12), y.reshape(2, 3, 12), "float32")
    assert_close(product(x[0], blocks, indices, rows=12), y[0], "float32")
    mixed = product(x.astype(jnp.bfloat16), blocks, indices, rows=12)
    assert mixed.dtype == jnp.float32
    assert product(x[:0], blocks, indices, rows=12).shape == (0, 12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_equal_autodiff_of_the_reference(implementation):
    x, _, blocks, indices = operands(5, (4, 70), jnp.float32)

    def loss(product, x, blocks):
        return jnp.sum(jnp.sin(product(x, blocks)))

    def ours(x, blocks):
        return pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=12, implementation=implementation)

    found = jax.grad(loss, (1, 2))(ours, x, blocks)
    expected = jax.grad(loss, (1, 2))(lambda x, blocks: reference.matmul(x, blocks, indices, 12), x, blocks)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float32", 4)


def test_gradients_have_gradients():
    x, _, blocks, indices = operands(2, (2, 3), jnp.float32, [[0, 1], [1]], 2)
    product = lambda x, blocks: pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=4)  # noqa: E731
    check_grads(
        lambda x, b: jnp.tanh(product(x, b)), (x, blocks), order=2, modes=["rev"], atol=0.05, rtol=0.05
    )


def test_vmap_over_inputs_and_over_weights():
    x, _, blocks, indices = operands(6, (4, 3), jnp.float32)
    product = lambda x, blocks: pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=12)  # noqa: E731
    many = jnp.stack([blocks, 2 * blocks, -blocks])
    y = jax.vmap(product)(x.reshape(3, 2, 12), many)
    expected = [part @ dense(each, indices, 12) for part, each in zip(x.reshape(3, 2, 12), many, strict=True)]
    assert_close(y, np.stack(expected), "float32")
    slopes = jax.vmap(jax.grad(lambda x, b: product(x, b).sum(), 1), (0, None))(x.reshape(3, 2, 12), blocks)
    assert_close(slopes.sum(0), jax.grad(lambda b: product(x, b).sum())(blocks), "float32")


# Sizes that do not divide a tile, one row, several tiles; blocks that a wgmma or the matrix unit can take.
SHAPES = {
    "pallas_gpu": [(33, (64, 64)), (1, (32, 48)), (200, (16, 80))],
    "pallas_tpu": [(20, (128, 128)), (1, (128, 256)), (520, (128, 128))],
}
CASES = [(name, batch, block) for name, shapes in SHAPES.items() for batch, block in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "batch", "block"), CASES)
def test_kernels_equal_the_reference(name, batch, block, dtype):
    x, g, blocks, indices = operands(batch, block, dtype)
    rows = x.shape[1]
    assert KERNELS[name].reason(batch, blocks.shape, dtype, False) is None
    assert KERNELS[name].reason(batch, blocks.shape, dtype, True) is None
    with running(name):
        y, dx = (
            function(each, blocks, indices, rows)
            for function, each in ((KERNELS[name].matmul, x), (KERNELS[name].matmul_transposed, g))
        )
    assert_close(y, reference.matmul(x, blocks, indices, rows), dtype, 2)
    assert_close(dx, reference.matmul_transposed(g, blocks, indices, rows), dtype, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "batch", "block"), [*CASES, ("pallas_gpu", 300, (128, 128))])
def test_kernels_lower_without_a_device(name, batch, block, dtype):
    rows, columns = 3 * block[0], 4 * block[1]
    stored, indices = ((4, 2, *block), dtype), ((4, 2), jnp.int32)
    for function, width in ((KERNELS[name].matmul, rows), (KERNELS[name].matmul_transposed, columns)):
        assert_lowers(
            name, lambda *args, f=function: f(*args, rows), ((batch, width), dtype), stored, indices
        )


@pytest.mark.parametrize(
    ("name", "batch", "block"), [("pallas_gpu", 9, (64, 64)), ("pallas_tpu", 9, (128, 128))]
)
def test_gradients_of_kernels(name, batch, block, monkeypatch):
    x, g, blocks, indices = operands(batch, block, jnp.float32)

    def product(x, blocks):
        return pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=x.shape[1], implementation=name)

    with running(name, monkeypatch):
        y, backward = jax.vjp(product, x, blocks)
        found = backward(g)
    expected_y, expected = jax.vjp(
        lambda x, blocks: reference.matmul(x, blocks, indices, x.shape[1]), x, blocks
    )
    assert_close(y, expected_y, "float32", 4)
    for one, other in zip(found, expected(g), strict=True):
        assert_close(one, other, "float32", 4)


def test_a_weight_without_blocks_is_zero():
    for name, block in (("pallas_tpu", (128, 128)), ("pallas_gpu", (64, 64))):
        x, _, blocks, indices = operands(3, block, jnp.float32, [[], []])
        assert not pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=x.shape[1]).any()
        with running(name):
            assert not KERNELS[name].matmul(x, blocks, indices, x.shape[1]).any()


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("pallas_gpu", (4, 2, 40, 64), jnp.bfloat16, "the block rows must be a multiple of 16, got 40"),
        ("pallas_gpu", (4, 2, 64, 512), jnp.bfloat16, "the block width must be at most 256, got 512"),
        ("pallas_gpu", (4, 2, 64, 208), jnp.float32, "the block width must be at most 200, got 208"),
        ("pallas_gpu", (4, 2, 64, 20), jnp.bfloat16, "the block width must be a multiple of 16, got 20"),
        (
            "pallas_gpu",
            (4, 2, 64, 64),
            jnp.float64,
            "its operands must be bfloat16 or float16 or float32, got float64",
        ),
        ("pallas_tpu", (4, 2, 64, 128), jnp.bfloat16, "the block rows must be a multiple of 128, got 64"),
        (
            "pallas_tpu",
            (2**9, 2**8, 128, 128),
            jnp.bfloat16,
            "at most 65536 blocks can be scheduled, got 131072",
        ),
        (
            "pallas_tpu",
            (4, 2, 128, 128),
            jnp.float16,
            "its operands must be bfloat16 or float32, got float16",
        ),
    ],
)
def test_shapes_that_kernels_cannot_tile(name, shape, dtype, message):
    assert KERNELS[name].reason(1, shape, np.dtype(dtype), False) == message


def test_the_widest_float32_blocks_fit_into_shared_memory():
    kernels, shape = KERNELS["pallas_gpu"], (1, 1, 32, 200)
    assert kernels.reason(300, shape, jnp.float32, False) is None
    arrays = ((300, 32), jnp.float32), (shape, jnp.float32), ((1, 1), jnp.int32)
    assert_lowers("pallas_gpu", lambda *args: kernels.matmul(*args, 32), *arrays)


def test_bad_input():
    x, _, blocks, indices = operands(2, (4, 3), jnp.float32)

    def message(*args, **keywords):
        with pytest.raises(ValueError) as error:
            pallas_kernels.block_sparse_matmul(*args, **keywords)
        return str(error.value)

    assert message(x, blocks, indices, rows=13) == "rows must be divisible by the blocks' 4 rows, got 13"
    assert message(x[:, :8], blocks, indices, rows=12).startswith(
        "x must end with the weight's 12 rows, but its shape is"
    )
    assert message(x, blocks, indices[:2], rows=12).startswith("indices must be integers of shape (4, 3)")
    assert message(x, blocks, indices.astype(float), rows=12).startswith(
        "indices must be integers of shape (4, 3)"
    )
    assert message(x, blocks[0], indices, rows=12).startswith("blocks must be floats of shape (block columns")
    for empty in (blocks[:0], blocks[:, :0], blocks[:, :, :0], blocks[..., :0]):
        assert message(x, empty, indices[: len(empty), : empty.shape[1]], rows=12).startswith(
            "blocks must be floats of shape (block columns, slots, block rows, block width), none of them 0, got"
        )
    assert re.match(
        "block_sparse_matmul cannot run 'pallas_tpu' here: it needs a TPU, and JAX runs on",
        message(x, blocks, indices, rows=12, implementation="pallas_tpu"),
    )
    assert "no implementation 'cuda' (known: pallas_gpu, pallas_tpu, xla, reference)" in message(
        x, blocks, indices, rows=12, implementation="cuda"
    )


def test_the_bench_makes_the_weights_it_names():
    for balanced in (False, True):
        blocks, indices = bench.block_ell(np.random.default_rng(0), 64, 8, 0.25, balanced)
        counts = (indices >= 0).sum(axis=1)
        assert counts.sum() == 16
        assert (np.abs(blocks).max(axis=(2, 3)) > 0).sum() == 16
        if balanced:
            assert counts.min() == counts.max() == 2
