"""JLCM: its start is k-means, permutations are undone, learning lowers the layer's error, and steps are proximal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.codebook import dense, kmeans
from sparsejax.compress.jlcm import jlcm, learn, mapping_gradient, restore
from sparsejax.compress.magnitude import magnitude

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 16)) @ RNG.normal(size=(16, 16))
GRAM = jnp.asarray(X.T @ X / 300, jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(16, 8)) * RNG.gamma(2, size=8), jnp.float32)


def error(found):
    return np.linalg.norm(X @ (KERNEL - found)) ** 2 / np.linalg.norm(X @ np.asarray(KERNEL)) ** 2


def test_the_start_of_one_group_is_kmeans():
    found = learn(KERNEL, GRAM, codewords=4, groups=1, steps=0)
    plain = dense(kmeans(KERNEL, codewords=4))
    np.testing.assert_allclose(restore(found), plain, atol=1e-5)
    np.testing.assert_allclose(found.errors, [error(plain)], rtol=1e-3)


def test_permutations_are_undone_and_groups_are_alike():
    exact = learn(KERNEL, GRAM, codewords=32, groups=4, steps=0)  # a codeword for each weight
    np.testing.assert_allclose(restore(exact), KERNEL, atol=1e-6)
    assert sorted(exact.order.tolist()) == list(range(8))
    sizes = np.sqrt((np.asarray(KERNEL) ** 2).sum(0))[np.asarray(exact.order)]
    assert np.all(np.diff(sizes) >= 0)
    assert error(restore(learn(KERNEL, GRAM, codewords=4, groups=4, steps=0))) < 0.8 * error(
        restore(learn(KERNEL, GRAM, codewords=4, groups=1, steps=0))
    )


def test_learning_lowers_the_error_of_the_outputs():
    found = learn(KERNEL, GRAM, codewords=4, groups=2, steps=60)
    assert found.errors.shape == (61,)
    np.testing.assert_allclose(error(restore(found)), found.errors.min(), rtol=2e-3)
    assert found.errors.min() < 0.8 * found.errors[0]
    start = learn(KERNEL, GRAM, codewords=4, groups=2, steps=0)
    assert np.any(found.codebook.codes != start.codebook.codes)


def test_the_gradient_of_scores_falls_with_the_distance():
    values = jnp.asarray([[-4.0, -1.0, 0.0, 1.0, 4.0]])
    found = mapping_gradient(jnp.asarray([[2.0]]), values, jnp.asarray([[2]]), jnp.asarray([2.0]))[0, 0]
    np.testing.assert_allclose(found, [-2 / 3, -2 / 1.5, 0, 2 / 1.5, 2 / 3], rtol=1e-6)


def test_a_mask_stays_and_does_not_count():
    method = jlcm(magnitude(), codewords=4, groups=2, steps=20)
    assert method.needs == ("gram",) and method.name == "magnitude+jlcm"
    kernel, mask = method.prune(KERNEL, {"gram": GRAM}, 0.5, "2:4")
    _, expected = magnitude().prune(KERNEL, {}, 0.5, "2:4")
    np.testing.assert_array_equal(mask, expected)
    assert np.all(np.asarray(kernel)[~np.asarray(mask)] == 0)
    assert len(np.unique(np.asarray(kernel)[np.asarray(mask)])) <= 8
    start, _ = jlcm(magnitude(), codewords=4, groups=2, steps=0).prune(KERNEL, {"gram": GRAM}, 0.5, "2:4")
    assert error(kernel) < error(start)
    full, mask = jlcm(codewords=4, steps=0).prune(KERNEL, {"gram": GRAM}, 0.0)
    assert bool(jnp.all(mask)) and np.all(np.isfinite(full))


def test_bad_input():
    for sparsity, pattern in ((0.5, "unstructured"), (None, "2:4")):
        with pytest.raises(ValueError, match="jlcm without an initial method prunes nothing, .* got 0.5"):
            jlcm().prune(KERNEL, {"gram": GRAM}, sparsity, pattern)
    with pytest.raises(ValueError, match="groups=3 of jlcm do not divide the 8 outputs of the kernel"):
        learn(KERNEL, GRAM, groups=3)
    with pytest.raises(ValueError, match="steps of jlcm must be an integer of at least 0, got -1"):
        jlcm(steps=-1)
    with pytest.raises(ValueError, match="value_rate of jlcm must be at least 0, got -0.5"):
        jlcm(value_rate=-0.5)
    with pytest.raises(ValueError, match=r"the kernel has shape \(2, 16, 8\)"):
        learn(jnp.zeros((2, 16, 8)), GRAM)


def test_jit():
    found = jax.jit(lambda k: restore(learn(k, GRAM, codewords=4, groups=2, steps=5)))(KERNEL)
    np.testing.assert_allclose(found, restore(learn(KERNEL, GRAM, codewords=4, groups=2, steps=5)), atol=1e-5)
