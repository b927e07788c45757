"""Group grids against their formula in numpy and brute force over the levels, masks, gradients, and GPTQ rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.base import Layerwise
from sparsejax.compress.quantise import (
    Grid,
    decode,
    dense,
    encode,
    fake,
    fit,
    round_to_nearest,
    rounding,
    rtn,
)
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.compress.wanda import wanda
from sparsejax.patterns import NM

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [4, 32])
def test_every_weight_takes_the_nearest_level_of_its_group(bits, group):
    found = np.asarray(dense(round_to_nearest(KERNEL, bits=bits, group=group)))
    for start in range(0, 32, group):
        for output in range(6):
            w = np.asarray(KERNEL, np.float64)[start : start + group, output]
            scale = (max(w.max(), 0) - min(w.min(), 0)) / (2**bits - 1)
            zero = np.round(-min(w.min(), 0) / scale)
            levels = scale * (np.arange(2**bits) - zero)
            nearest = levels[np.abs(w[:, None] - levels).argmin(1)]
            np.testing.assert_allclose(found[start : start + group, output], nearest, atol=1e-5)
            assert np.abs(found[start : start + group, output] - w).max() <= scale / 2 + 1e-5


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])  # groups on both sides of zero, and on one
@pytest.mark.parametrize("bits", [2, 4])
def test_masks_survive_because_zero_is_a_level(bits, shift):
    mask = NM(2, 4).mask(jnp.abs(KERNEL))
    kernel = jnp.where(mask, KERNEL + shift, 0)
    grid = fit(kernel, bits=bits, group=8)
    found = np.asarray(decode(encode(kernel, grid, bits), grid))  # without the mask's help
    assert np.all(found[~np.asarray(mask)] == 0)
    quantised = round_to_nearest(KERNEL + shift, mask, bits=bits, group=8)
    np.testing.assert_array_equal(dense(quantised), found)
    np.testing.assert_array_equal(dense(round_to_nearest(jnp.zeros((8, 2)), bits=bits, group=8)), 0)


def test_sixteen_bits_are_nearly_the_kernel():
    quantised = round_to_nearest(KERNEL, bits=16, group=16)
    assert quantised.codes.dtype == jnp.uint16
    np.testing.assert_allclose(dense(quantised), KERNEL, atol=5e-5)


def test_rounding_once_more_changes_nothing():
    once = dense(round_to_nearest(KERNEL, bits=4, group=16))
    np.testing.assert_allclose(dense(round_to_nearest(once, bits=4, group=16)), once, atol=1e-6)


def test_fake_quantisation_is_the_same_map_with_straight_through_gradients():
    mask = jnp.asarray(RNG.random((32, 6)) > 0.3)
    grid = fit(jnp.where(mask, KERNEL, 0), bits=3, group=8)
    grid = Grid(0.8 * grid.scale, grid.zero)  # so that some weights are clipped
    np.testing.assert_allclose(
        fake(KERNEL, grid, mask, bits=3), jnp.where(mask, decode(encode(KERNEL, grid, 3), grid), 0), atol=1e-6
    )
    weights = jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32)
    by_kernel, by_grid = jax.grad(
        lambda kernel, grid: jnp.sum(weights * fake(kernel, grid, mask, bits=3)), (0, 1)
    )(KERNEL, grid)
    scale, zero = (np.repeat(np.asarray(leaf), 8, axis=0) for leaf in grid)
    steps = np.asarray(KERNEL) / scale
    inside = (np.round(steps) + zero >= 0) & (np.round(steps) + zero <= 7)
    assert 0 < inside.mean() < 1
    codes = np.clip(np.round(steps) + zero, 0, 7)
    share = np.asarray(weights) * np.asarray(mask)
    np.testing.assert_allclose(by_kernel, share * inside, atol=1e-6)
    by_scale = share * (codes - zero - np.where(inside, steps, 0))
    np.testing.assert_allclose(by_grid.scale, by_scale.reshape(4, 8, 6).sum(1), atol=1e-4)
    by_zero = share * np.where(inside, 0, -scale)
    np.testing.assert_allclose(by_grid.zero, by_zero.reshape(4, 8, 6).sum(1), atol=1e-5)


def test_rounding_is_the_grid_row_by_row():
    grid = fit(KERNEL, bits=3, group=8)
    nearest = rounding(bits=3, group=8)(KERNEL)
    rows = jnp.stack([nearest(KERNEL[j], j) for j in range(32)])
    np.testing.assert_array_equal(rows, decode(encode(KERNEL, grid, 3), grid))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_rounding_makes_the_sweep_gptq(sparsity):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 32)) @ rng.normal(size=(32, 32))
    gram = jnp.asarray(x.T @ x / 200, jnp.float32)
    method = sparsegpt(block=16, quantise=rounding(bits=3, group=8))
    kernel, mask = method.prune(KERNEL, {"gram": gram}, sparsity, "unstructured")
    nearest, _ = rtn(sparsegpt(block=16), bits=3, group=8).prune(
        KERNEL, {"gram": gram}, sparsity, "unstructured"
    )

    def error(found):
        return float(np.trace((KERNEL - found).T @ gram @ (KERNEL - found)))

    assert np.all(np.asarray(kernel)[~np.asarray(mask)] == 0)
    for output in range(6):
        for start in range(0, 32, 8):
            assert len(np.unique(np.round(np.asarray(kernel)[start : start + 8, output], 5))) <= 8
    assert error(kernel) < error(nearest), (error(kernel), error(nearest))


def test_rtn_keeps_the_mask_of_the_initial_method():
    stats = {"square": jnp.asarray(RNG.random(32), jnp.float32)}
    pruned, mask = wanda().prune(KERNEL, stats, 0.5, "2:4")
    method = rtn(wanda(), bits=4, group=8)
    assert isinstance(method, Layerwise) and method.needs == ("square",)
    kernel, found = jax.jit(lambda kernel: method.prune(kernel, stats, 0.5, "2:4"))(KERNEL)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_allclose(kernel, dense(round_to_nearest(pruned, bits=4, group=8)), atol=1e-6)
    kernel, mask = rtn(bits=8, group=32).prune(KERNEL, {}, 0.0, "unstructured")
    assert bool(mask.all()) and float(jnp.abs(kernel - KERNEL).max()) < 0.02


def test_bad_input():
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 16, got 0"):
        fit(KERNEL, bits=0)
    with pytest.raises(ValueError, match="groups of 5 inputs do not divide the 32 inputs of the kernel"):
        fit(KERNEL, group=5)
    with pytest.raises(ValueError, match=r"the kernel has shape \(3, 32, 6\)"):
        fit(jnp.zeros((3, 32, 6)))
    for sparsity, pattern in ((0.5, "unstructured"), (None, "2:4"), (0.5, "2:4")):
        with pytest.raises(ValueError, match="prunes nothing, so sparsity must be 0, got 0.5"):
            rtn().prune(KERNEL, {}, sparsity, pattern)
