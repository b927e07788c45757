"""Rotary positions against complex numbers, their invariance, and the definition of each scaling."""

import math

import numpy as np
import numpy_models
import pytest

from sparsejax.models import rotary

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_rotation_is_multiplication_by_complex_numbers():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    cos, sin = rotary.tables(rotary.frequencies(8, 50.0), 5, offset=4)
    turned = rotary.rotate(x, cos, sin)
    for b, t, h in np.ndindex(2, 5, 3):
        expected = numpy_models.turn(x[b, t, h].astype(np.float64), t + 4, 50.0)
        np.testing.assert_allclose(turned[b, t, h], expected, atol=1e-5)


def test_products_depend_on_distances_only():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 6, 1, 8)).astype(np.float32)
    rates = rotary.frequencies(8)
    here, there = (rotary.tables(rates, 6, offset) for offset in (0, 37))
    products = [
        np.einsum("bqhd,bkhd->qk", rotary.rotate(q, *at), rotary.rotate(k, *at)) for at in (here, there)
    ]
    np.testing.assert_allclose(*products, atol=1e-4)


def test_linear_scaling_stretches_the_positions():
    plain = rotary.frequencies(16, 1e4)
    for key in ("rope_type", "type"):
        scaled = rotary.frequencies(16, 1e4, {key: "linear", "factor": 4.0})
        np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)
    np.testing.assert_array_equal(rotary.frequencies(16, 1e4, {"rope_type": "default"}), plain)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain = rotary.frequencies(32, 1e4).astype(np.float64)
    scaled = rotary.frequencies(32, 1e4, LLAMA3)
    for f, found in zip(plain, scaled, strict=True):
        wave = 2 * math.pi / f
        if wave > 64 / 1.0:
            expected = f / 8
        elif wave < 64 / 4.0:
            expected = f
        else:
            smooth = (64 / wave - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * f / 8 + smooth * f
        assert found == pytest.approx(expected, rel=1e-6)
    ratios = scaled / plain
    assert ratios[0] == 1 and ratios[-1] == pytest.approx(1 / 8) and np.any((ratios > 0.13) & (ratios < 0.99))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "rotary positions need heads of even width, got 7"),
        ((8, 1e4, {"rope_type": "linaer"}), "unknown rope_type 'linaer'; did you mean 'linear'"),
        (
            (8, 1e4, {"rope_type": "llama3", "factor": 2.0}),
            "'llama3' needs factor, .* but low_freq_factor is missing",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary.frequencies(*arguments)
