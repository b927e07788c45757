"""Sparse convolutions against lax.conv, their kernels interpreted and lowered, their gradients against autodiff."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads
from kernel_checks import assert_close, assert_lowers, running

from pallas_kernels import pack_pattern, pack_pointwise, pattern_conv, sparse_conv
from pallas_kernels.sparse_conv import bench, reference, xla
from pallas_kernels.sparse_conv.geometry import lengths

KERNELS = {
    name: importlib.import_module(f"pallas_kernels.sparse_conv.{name}")
    for name in ("pallas_gpu", "pallas_tpu")
}


def pointwise(inputs, features, block, density=0.4, seed=0):
    """A kernel `(1, 1, I, O)` in blocks of output channels, the first of them empty."""
    rng = np.random.default_rng(seed)
    kept = rng.random((inputs, -(-features // block))) < density
    kept[:, 0] &= density == 1
    kernel = rng.normal(size=(inputs, features)) * np.repeat(kept, block, axis=1)[:, :features]
    return kernel.astype(np.float32)[None, None]


def filters(size, inputs, features, patterns=3, seed=0):
    """A kernel `(kh, kw, I, O)` whose filters follow few patterns; the first keeps nothing, the second everything."""
    rng = np.random.default_rng(seed)
    masks = rng.random((patterns, *size)) < 0.4
    masks[0], masks[1:2] = False, True
    kept = masks[rng.integers(0, patterns, features)].transpose(1, 2, 0)[:, :, None]
    return (rng.normal(size=(*size, inputs, features)) * kept).astype(np.float32)


def images(batch, height, width, inputs, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width, inputs)), dtype)


def dense(x, kernel, strides=(1, 1), padding="SAME"):
    """The convolution in float32, by XLA."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x, kernel = (jnp.asarray(each, jnp.float32) for each in (x, kernel))
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, precision=lax.Precision.HIGHEST
    )


def packed(kernel, dtype=jnp.float32, **keywords):
    """A packed kernel in a dtype, and the dense one with the same rounding."""
    pack = pack_pointwise if kernel.shape[:2] == (1, 1) else pack_pattern
    values, *indices = pack(kernel, **keywords)
    return (values.astype(dtype), *indices), jnp.asarray(kernel, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("block", "density"), [(1, 0.4), (2, 0.4), (4, 0.0), (4, 1.0), (3, 0.4)])
def test_pointwise(block, density, implementation, dtype, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 300)
    monkeypatch.setattr(xla, "GATHER", 0)  # gathers as long as one channel is left out
    arrays, kernel = packed(pointwise(9, 10, block, density), dtype, block=block)
    x = images(2, 5, 4, 9, dtype)
    for strides, padding in ((1, "SAME"), ((2, 3), ((1, 0), (2, 1)))):
        y = sparse_conv(
            x, *arrays, features=10, strides=strides, padding=padding, implementation=implementation
        )
        pair = (1, 1) if strides == 1 else strides
        assert y.dtype == dtype
        assert_close(y, dense(x, kernel, pair, padding), dtype, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("size", "block"), [((3, 3), None), ((2, 3), 2), ((1, 1), 4)])
def test_patterns(size, block, implementation, dtype):
    kernel = filters(size, 5, 7)
    arrays = pack_pattern(kernel, block=block)
    arrays, kernel = (arrays[0].astype(dtype), *arrays[1:]), jnp.asarray(kernel, dtype)
    x = images(2, 6, 7, 5, dtype)
    for strides, padding in (((1, 1), "SAME"), ((2, 1), "VALID"), ((3, 2), ((2, 0), (1, 1)))):
        y = pattern_conv(
            x,
            *arrays,
            kernel_size=size,
            features=7,
            strides=strides,
            padding=padding,
            implementation=implementation,
        )
        assert y.dtype == dtype
        assert_close(y, dense(x, kernel, strides, padding), dtype, 2)


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(st.data())
def test_any_shape(data):
    inputs, features, block = (data.draw(st.integers(1, 6)) for _ in range(3))
    kernel_size = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    strides = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    height, width = (side + data.draw(st.integers(0, 3)) for side in kernel_size)
    padding = data.draw(st.sampled_from(["SAME", "VALID", "SAME_LOWER"]))
    x = images(data.draw(st.integers(1, 2)), height, width, inputs)
    kernel = pointwise(inputs, features, block, data.draw(st.floats(0, 1)))
    y = sparse_conv(
        x, *pack_pointwise(kernel, block=block), features=features, strides=strides, padding=padding
    )
    assert_close(y, dense(x, kernel, strides, padding), "float32", 2)
    kernel = filters(kernel_size, inputs, features, data.draw(st.integers(1, 4)))
    arrays = pack_pattern(kernel, block=block)
    y = pattern_conv(x, *arrays, kernel_size=kernel_size, features=features, strides=strides, padding=padding)
    assert_close(y, dense(x, kernel, strides, padding), "float32", 2)


def test_slots_of_padding_are_skipped_wherever_they_are():
    values, indices = pack_pointwise(pointwise(9, 4, 2, 1.0))
    x = images(1, 2, 2, 9)
    fewer = indices.at[:, 3].set(-1)
    kernel = reference.pointwise_kernel(values, fewer, 9, 4)[None, None]
    assert_close(sparse_conv(x, values, fewer, features=4), dense(x, kernel), "float32", 2)
    values, positions, channels = pack_pattern(filters((2, 2), 9, 4))
    fewer = positions.at[:, 0].set(-1)
    kernel = reference.pattern_kernel(values, fewer, channels, (2, 2), 4)
    y = pattern_conv(x, values, fewer, channels, kernel_size=2, features=4)
    assert_close(y, dense(x, kernel), "float32", 2)


def operations(implementation=None):
    """Both operations as functions of images and values, with these and with the dense kernel as another such."""
    (values, indices), _ = packed(pointwise(8, 10, 2), block=2)
    (weights, positions, channels), _ = packed(filters((3, 2), 8, 10), block=8)

    def one(x, values):
        return sparse_conv(x, values, indices, features=10, strides=2, implementation=implementation)

    def one_dense(x, values):
        return dense(x, reference.pointwise_kernel(values, indices, 8, 10)[None, None], (2, 2))

    def other(x, values):
        return pattern_conv(
            x, values, positions, channels, kernel_size=(3, 2), features=10, implementation=implementation
        )

    def other_dense(x, values):
        return dense(x, reference.pattern_kernel(values, positions, channels, (3, 2), 10))

    return (one, one_dense, values), (other, other_dense, weights)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_equal_autodiff_of_the_dense_convolution(implementation):
    x = images(2, 5, 6, 8)
    for ours, theirs, values in operations(implementation):
        found, expected = (
            jax.grad(lambda x, v, f=function: jnp.sin(f(x, v)).sum(), (0, 1))(x, values)
            for function in (ours, theirs)
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, "float32", 8)


@pytest.mark.slow
def test_gradients_have_gradients():
    x = images(1, 3, 2, 8)
    for ours, _, values in operations():
        check_grads(
            lambda x, v, f=ours: jnp.tanh(0.1 * f(x, v)),
            (x, values),
            order=2,
            modes=["rev"],
            atol=0.05,
            rtol=0.05,
        )


def test_vmap_and_mixed_dtypes():
    x = images(6, 5, 4, 8).reshape(3, 2, 5, 4, 8)
    for ours, theirs, values in operations():
        many = jnp.stack([values, -values, 2 * values])
        assert_close(jax.vmap(ours)(x, many), jax.vmap(theirs)(x, many), "float32", 4)
        assert jax.jit(ours)(x[0].astype(jnp.bfloat16), values).dtype == jnp.float32


# Sizes that do not divide a tile: (batch, height, width, inputs, features, block), then the kernel and its strides.
POINTWISE = [(1, 1, 1, 16, 4, 1), (2, 20, 29, 9, 10, 4)]
PATTERN = [((1, 3, 3, 16, 8, 8), (3, 3), (1, 1)), ((2, 9, 8, 32, 20, 16), (3, 2), (2, 1))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("shape", POINTWISE)
@pytest.mark.parametrize("name", KERNELS)
def test_pointwise_kernels_equal_the_reference(name, shape, density, dtype):
    batch, height, width, inputs, features, block = shape
    (values, indices), _ = packed(pointwise(inputs, features, block, density), dtype, block=block)
    pixels = images(batch, height, width, inputs, dtype).reshape(-1, inputs).T
    assert KERNELS[name].pointwise_reason(pixels.shape, values.shape, dtype) is None
    with running(name):
        found = KERNELS[name].pointwise(pixels, values, jnp.maximum(indices, 0), lengths(indices))
    assert found.dtype == dtype
    assert_close(found, reference.pointwise(pixels, values, indices, None), dtype, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "size", "strides"), PATTERN)
@pytest.mark.parametrize("name", KERNELS)
def test_pattern_kernels_equal_the_reference(name, shape, size, strides, dtype):
    batch, height, width, inputs, features, block = shape
    (values, positions, _), _ = packed(filters(size, inputs, features), dtype, block=block)
    x = images(batch, height, width, inputs, dtype)
    assert KERNELS[name].pattern_reason(x.shape, values.shape, size, strides, dtype) is None
    with running(name):
        found = KERNELS[name].pattern(x, values, jnp.maximum(positions, 0), lengths(positions), size, strides)
    assert found.dtype == dtype
    assert_close(found, reference.pattern(x, values, positions, None, size, strides), dtype, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower_without_a_device(name, dtype):
    module, slots = KERNELS[name], ((16, 12), jnp.int32)
    used = (16,), jnp.int32
    assert_lowers(name, module.pointwise, ((32, 600), dtype), ((16, 12, 4), dtype), slots, used)
    for inputs, block, strides in ((32, 8, (1, 1)), (256, 128, (2, 2))):
        weights, positions = ((2, 4, inputs, block), dtype), ((2, 4), jnp.int32)
        assert_lowers(
            name,
            lambda *arrays, s=strides: module.pattern(*arrays, (3, 3), s),
            ((2, 9, 12, inputs), dtype),
            weights,
            positions,
            ((2,), jnp.int32),
        )


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_and_vmap_of_kernels(name, monkeypatch):
    x = images(4, 3, 4, 8).reshape(2, 2, 3, 4, 8)
    for (ours, _, values), (theirs, _, _) in zip(operations(name), operations("reference"), strict=True):
        with running(name, monkeypatch):
            y, backward = jax.vjp(jax.vmap(ours, (0, None)), x, values)
            found = y, *backward(y)
        y, backward = jax.vjp(jax.vmap(theirs, (0, None)), x, values)
        for one, other in zip(found, (y, *backward(y)), strict=True):
            assert_close(one, other, "float32", 8)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path[:0] = ["tests/pallas_kernels", "."]
from test_sparse_conv import images, operations

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
x = images(4, 5, 6, 8)
for ours, _, values in operations():
    gradients = jax.jit(jax.value_and_grad(lambda x, v: jnp.sin(ours(x, v)).sum(), (0, 1)))
    expected = gradients(x, values)
    for specs in ((("data",), ()), (("data", None, None, "model"), (None, None, "model"))):
        sharded = [jax.device_put(a, NamedSharding(mesh, P(*s))) for a, s in zip((x, values), specs) if a.ndim]
        for one, other in zip(jax.tree.leaves(gradients(*sharded)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SHARDED)


@pytest.mark.slow
def test_the_bench_agrees_with_dense():
    seen = set()
    for case in bench.cases(16):
        kind = case["kernel"], case["gradients"]
        if kind not in seen:
            seen.add(kind)
            result = bench.run(case | {"image": 6}, repeats=1)
            assert result["max_error"] < 1e-5, result
