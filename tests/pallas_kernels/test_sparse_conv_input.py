"""Packing of sparse convolutions' kernels, and what the operations say of bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_conv import KERNELS, filters, images, pointwise

from pallas_kernels import pack_pattern, pack_pointwise, pattern_conv, sparse_conv
from pallas_kernels.sparse_conv import reference


def test_packing_round_trips():
    kernel = pointwise(9, 10, 4)
    values, indices = pack_pointwise(kernel)
    assert values.shape == (3, indices.shape[1], 4), "the largest block that fits"
    assert (indices[0] == -1).all() and (np.diff(indices[1]) > 0).sum() == (indices[1] >= 0).sum() - 1
    np.testing.assert_array_equal(reference.pointwise_kernel(values, indices, 9, 10), kernel[0, 0])
    assert pack_pointwise(pointwise(9, 10, 2))[0].shape[2] == 2
    kernel = filters((3, 2), 4, 9)
    values, positions, channels = pack_pattern(kernel, block=2)
    assert values.shape[1:] == (6, 4, 2) and sorted(channels[channels >= 0].tolist()) == list(range(9))
    np.testing.assert_array_equal(reference.pattern_kernel(values, positions, channels, (3, 2), 9), kernel)
    kept = np.zeros((1, 1, 9, 10), bool)
    kept[..., 2, :4] = True  # what the mask keeps is stored, zero or not
    assert pack_pointwise(np.zeros((1, 1, 9, 10)), kept)[1].tolist() == [[2], [-1], [-1]]


@pytest.mark.parametrize(
    ("name", "pixels", "values", "dtype", "message"),
    [
        ("pallas_gpu", (8, 9), (2, 3, 32), jnp.float32, "blocks may have at most 16 output channels, got 32"),
        ("pallas_gpu", (8, 0), (2, 3, 4), jnp.float32, "there must be input channels and pixels, got (8, 0)"),
        (
            "pallas_tpu",
            (8, 9),
            (2**10, 2**6, 4),
            jnp.float32,
            "at most 131072 weights and indices fit into scalar memory, got 327680",
        ),
        (
            "pallas_tpu",
            (4096, 9),
            (2, 3, 4),
            jnp.float32,
            "at most 1536 input channels fit into vector memory, got 4096",
        ),
        (
            "pallas_tpu",
            (8, 9),
            (2, 3, 4),
            jnp.float16,
            "its operands must be bfloat16 or float32, got float16",
        ),
    ],
)
def test_pointwise_shapes_that_kernels_cannot_run(name, pixels, values, dtype, message):
    assert KERNELS[name].pointwise_reason(pixels, values, dtype) == message


@pytest.mark.parametrize(
    ("name", "x", "values", "message"),
    [
        ("pallas_gpu", (1, 9, 9, 32), (2, 3, 32, 264), "blocks may have at most 256 filters, got 264"),
        ("pallas_gpu", (0, 9, 9, 32), (2, 3, 32, 8), "there are no images"),
        (
            "pallas_tpu",
            (1, 226, 226, 128),
            (2, 3, 128, 8),
            "an image must fit into 12582912 bytes of vector memory, needs 129335296",
        ),
    ],
)
def test_pattern_shapes_that_kernels_cannot_run(name, x, values, message):
    assert KERNELS[name].pattern_reason(x, values, (3, 3), (1, 1), jnp.bfloat16) == message


def test_numpys_integers_and_lists():
    x = images(1, 4, 4, 9)
    values, indices = pack_pointwise(pointwise(9, 10, 4))
    found = sparse_conv(x.tolist(), values.tolist(), indices.tolist(), features=10, strides=np.int64(2))
    np.testing.assert_array_equal(found, sparse_conv(x, values, indices, features=10, strides=2))


def error(function, *args, **keywords):
    with pytest.raises(ValueError) as found:
        function(*args, **keywords)
    return str(found.value)


def test_masks_that_have_no_such_pattern():
    kernel = pointwise(6, 8, 4, 1.0)
    mask = kernel != 0
    mask[0, 0, 3, 5] = False
    assert error(pack_pointwise, kernel, mask, block=4) == (
        "blocks of 4 output channels must keep the same input channels, but input channel 3 is kept for output "
        "channel 4 and not for 5"
    )
    kernel = filters((3, 3), 4, 6, 2)
    mask = np.ones(kernel.shape, bool)
    mask[0, 2, 3, 5] = False
    assert error(pack_pattern, kernel, mask) == (
        "a filter must keep the same positions in all input channels, but position (0, 2) of output channel 5 is kept "
        "for input channel 0 and not for 3"
    )
    mask = np.ones(kernel.shape, bool)
    mask[1, 1, 0, 2] = False
    assert error(pack_pattern, kernel, mask).endswith(
        "position (1, 1) of output channel 2 is kept for input channel 1 and not for 0"
    )
    mask = np.ones(kernel.shape, bool)
    for channel in range(6):
        mask[channel // 3, channel % 3, :, channel] = False
    assert error(pack_pattern, kernel, mask, patterns=4) == (
        "filters may follow 4 patterns, but output channel 4 has the 5th"
    )
    assert error(pack_pattern, kernel, block=0) == "block must be at least 1, got 0"
    assert error(pack_pointwise, pointwise(2, 2, 1), block=0) == "block must be at least 1, got 0"
    assert error(pack_pointwise, kernel).startswith("the kernel must be of shape (1, 1, input channels,")
    assert error(pack_pattern, kernel[0]).startswith(
        "the kernel must be of shape (height, width, inputs, out"
    )
    assert error(pack_pattern, kernel, mask[0]).startswith(
        "the mask must be bools of shape (3, 3, 4, 6), got bool"
    )


def test_bad_input():
    x = images(1, 4, 4, 9)
    values, indices = pack_pointwise(pointwise(9, 10, 4))
    assert error(sparse_conv, x[0], values, indices, features=10).startswith(
        "x must be floats of shape (batch,"
    )
    assert error(sparse_conv, x, values[0], indices, features=10).startswith(
        "values must be floats of shape (bl"
    )
    assert error(sparse_conv, x, values, indices[:2], features=10).startswith(
        "indices must be integers of shape"
    )
    assert error(sparse_conv, x, values, indices, features=13) == (
        "features must be in [9, 12] for 3 blocks of 4, got 13"
    )
    assert error(sparse_conv, x, values, indices, features=10, strides=0) == (
        "strides must be one or two integers of at least 1, got 0"
    )
    assert error(sparse_conv, x, values, indices, features=10, padding="FULL") == (
        "padding must be SAME, SAME_LOWER, VALID or two pairs of integers of at least 0, got 'FULL'"
    )
    for padding in (((1, -1), (0, 0)), 0, [1, 1], ((1, 0.5), (0, 0))):
        assert error(sparse_conv, x, values, indices, features=10, padding=padding) == (
            f"padding must be SAME, SAME_LOWER, VALID or two pairs of integers of at least 0, got {padding}"
        )
    assert error(sparse_conv, x, values, indices, features=10, strides=1.5) == (
        "strides must be one or two integers of at least 1, got 1.5"
    )
    assert error(sparse_conv, x, values, indices.at[1, 0].set(9), features=10) == (
        "indices must be below the 9 input channels, but block 1 has 9"
    )
    assert error(sparse_conv, x, values, indices, features=10, implementation="pallas_gpu").startswith(
        "sparse_conv cannot run 'pallas_gpu' here: it needs an NVIDIA GPU, and JAX runs on"
    )
    values, positions, channels = pack_pattern(filters((3, 3), 9, 10))
    keywords = {"kernel_size": (3, 3), "features": 10}
    assert error(pattern_conv, x[..., :8], values, positions, channels, **keywords).startswith(
        "x must have the filters' 9 input channels, but its shape is (1, 4, 4, 8)"
    )
    assert error(pattern_conv, x, values, positions[:, :1], channels, **keywords).startswith(
        "positions must be int"
    )
    assert error(pattern_conv, x, values, positions, channels[:1], **keywords).startswith(
        "channels must be integ"
    )
    assert error(pattern_conv, x, values, positions + 9, channels, **keywords) == (
        f"positions must be below the 9 positions, but block 0 has {positions[0, 0] + 9}"
    )
    assert error(pattern_conv, x, values, positions, channels, kernel_size=3, features=9) == (
        f"channels must be below the 9 output channels, but block {np.argwhere(channels == 9)[0][0]} has 9"
    )
    assert error(pattern_conv, x, values, positions, channels, kernel_size=3, features=0) == (
        "features must be at least 1, got 0"
    )
    assert error(pattern_conv, x[:, :2], values, positions, channels, **keywords, padding="VALID") == (
        "the padded images must be at least as large as the kernel (3, 3), got (2, 4)"
    )
