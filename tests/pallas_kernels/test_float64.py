"""With `jax_enable_x64` everything that is computed by XLA is computed in float64, and kernels refuse it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from sparsejax import formats


def close(found, expected):
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def masked(draw):
    w = draw.normal(size=(8, 12))
    return w, draw.permuted(np.tile([True, True, False, False], (2, 12, 1)), axis=2).swapaxes(1, 2).reshape(
        8, 12
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_products(implementation):
    draw = np.random.default_rng(0)
    x, (w, mask) = draw.normal(size=(3, 8)), masked(draw)
    rows, cols = np.arange(3), np.arange(3) + 1
    with jax.enable_x64(True):
        nm = formats.pack(w, mask, "2:4")
        csr = formats.pack(w, mask, "csr")
        block = formats.pack(w, np.ones_like(mask), "block:4x4")
        keywords = {"implementation": implementation}
        products = {
            "nm": (lambda x, data: pallas_kernels.nm_matmul(x, data, nm.indices, n=2, m=4, **keywords), nm),
            "csr": (
                lambda x, data: pallas_kernels.csr_matmul(x, data, csr.inputs, csr.indptr, **keywords),
                csr,
            ),
            "block": (
                lambda x, data: pallas_kernels.block_sparse_matmul(
                    x, data, block.indices, rows=8, **keywords
                ),
                block,
            ),
        }
        for function, packed in products.values():
            dense = np.asarray(packed)
            close(function(x, packed.data), x @ dense)
            dx, d_data = jax.grad(lambda x, data: function(x, data).sum(), (0, 1))(
                jnp.asarray(x), packed.data
            )
            close(dx, np.ones((3, 12)) @ dense.T)
            stored = np.where(np.asarray(packed.mask()), x.sum(0)[:, None], 0)
            close(packed.with_data(d_data).to_dense(), stored)
        b = draw.normal(size=(8, 40))
        close(pallas_kernels.sampled_matmul(x, b, rows, cols, **keywords), (x @ b)[rows, cols])
        close(
            jax.grad(lambda b: pallas_kernels.sampled_matmul(x, b, rows[:1], cols[:1], **keywords).sum())(
                jnp.asarray(b)
            )[:, 1],
            x[0],
        )
        blocks = pallas_kernels.block_sampled_matmul(x, b, np.zeros((10, 1), int), (3, 4), **keywords)
        close(blocks[:, 0], (x @ b).reshape(3, 10, 4).swapaxes(0, 1))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("products", [None, 0])
def test_spgemm(implementation, products):
    draw = np.random.default_rng(1)
    data, other = draw.normal(size=(2, 3))
    with jax.enable_x64(True):
        a, b = ((each, np.array([0, 1, 0]), np.array([0, 2, 3])) for each in (data, other))
        found = pallas_kernels.spgemm(a, b, columns=2, products=products, implementation=implementation)
        left, right = (np.array([[each[0], each[1]], [each[2], 0]]) for each in (data, other))
        close(found[0], (left @ right).reshape(-1))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("inputs", [3, 128])
def test_convolutions(implementation, inputs):
    draw = np.random.default_rng(2)
    x, kernel = draw.normal(size=(2, 3, 3, inputs)), draw.normal(size=(1, 1, inputs, 16))
    kernel[0, 0, 1:] = 0
    with jax.enable_x64(True):
        packed = pallas_kernels.pack_pointwise(kernel, block=16)
        convolve = lambda x: pallas_kernels.sparse_conv(
            x, *packed, features=16, implementation=implementation
        )  # noqa: E731
        close(convolve(x), x @ kernel[0, 0])
        close(
            jax.grad(lambda x: convolve(x).sum())(jnp.asarray(x)),
            np.broadcast_to(kernel[0, 0].sum(1), x.shape),
        )
        packed = pallas_kernels.pack_pattern(kernel)
        keywords = {"kernel_size": 1, "features": 16, "implementation": implementation}
        close(pallas_kernels.pattern_conv(x, *packed, **keywords), x @ kernel[0, 0])


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_kernels_refuse_it(name):
    def reason(op, function, *args):
        return getattr(dispatch.module(op, name), function)(*args)

    dtype = np.dtype(np.float64)
    found = [
        reason("nm_matmul", "reason", (8, 128), (64, 128), dtype, 2, 4),
        reason("block_sparse_matmul", "reason", 8, (1, 1, 128, 128), dtype, False),
        reason("sampled_matmul", "reason", (8, 128), (128, 8), dtype),
        reason("sampled_matmul", "block_reason", (128, 128), dtype),
        reason("spgemm", "reason", (8, 8, 8), dtype),
        reason("sparse_conv", "pointwise_reason", (8, 8), (2, 3, 4), dtype),
        reason("sparse_conv", "pattern_reason", (1, 9, 9, 32), (2, 3, 32, 8), (3, 3), (1, 1), dtype),
    ]
    assert all(each.endswith("got float64") for each in found), found
