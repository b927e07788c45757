"""PV-Tuning: its limits (Adam, straight-through projection), and descent on quadratics with all partitions listed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.compress.codebook import Codebook, dense, kmeans, nearest
from sparsejax.compress.pv_tuning import pv_tuning, v_step

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)


def gradients(step):
    return {"k": jnp.asarray(np.random.default_rng(step).normal(size=(8, 6)), jnp.float32)}


def test_with_a_codeword_for_each_weight_the_p_step_is_adam():
    book = kmeans(KERNEL, codewords=48)
    tuning = pv_tuning(value_rate=1e-2, code_rate=0.0)
    state, books = tuning.init({"k": book}), {"k": book}
    adam = optax.adam(1e-2, 0.9, 0.95)
    kernel, inner = KERNEL, adam.init(KERNEL)
    for step in range(5):
        books, state = tuning.update(gradients(step), state, books)
        moves, inner = adam.update(gradients(step)["k"], inner)
        kernel = kernel + moves
        np.testing.assert_array_equal(books["k"].codes, book.codes)
        np.testing.assert_allclose(dense(books["k"]), kernel, atol=1e-5)


def test_the_p_step_keeps_codes_and_sums_gradients_of_members():
    book = kmeans(KERNEL, codewords=3, books=2)
    books, _ = (tuning := pv_tuning(code_rate=0.0, value_rate=1.0, value_betas=(0.0, 0.0))).update(
        gradients(0), tuning.init({"k": book}), {"k": book}
    )
    np.testing.assert_array_equal(books["k"].codes, book.codes)
    sums = np.zeros((2, 3))
    for i, j in np.ndindex(8, 6):
        sums[j // 3, book.codes[i, j]] += gradients(0)["k"][i, j]
    np.testing.assert_allclose((books["k"].values - book.values)[..., 0], -np.sign(sums), atol=1e-4)


def test_everything_at_once_without_decay_is_straight_through_projection():
    book = kmeans(KERNEL, codewords=4)
    tuning = pv_tuning(code_rate=0.3, value_rate=0.0, fraction=1.0, trust=None, delta_decay=0.0, lamb=False)
    state, books = tuning.init({"k": book}), {"k": book}
    adam = optax.adam(0.3, 0.0, 0.95)
    latent, inner = dense(book), adam.init(KERNEL)
    update = jax.jit(tuning.update)
    for step in range(6):
        books, state = update(gradients(step), state, books)
        moves, inner = adam.update(gradients(step)["k"], inner)
        latent = latent + moves
        np.testing.assert_array_equal(books["k"].codes, nearest(book.values, latent))
    assert np.any(books["k"].codes != book.codes)
    reset = pv_tuning(code_rate=0.05, value_rate=0.0, fraction=1.0, trust=None, lamb=False)
    state, again = reset.init({"k": book}), {"k": book}
    for step in range(6):
        again, state = reset.update(gradients(step), state, again)
    assert np.any(again["k"].codes != books["k"].codes)  # with decay 1 small steps are forgotten


def test_lamb_steps_have_the_norm_of_the_kernel():
    book = kmeans(KERNEL, codewords=4)
    tuning = pv_tuning(code_rate=0.02, value_rate=0.0)
    _, state = tuning.update(gradients(0), tuning.init({"k": book}), {"k": book})
    step = np.linalg.norm(state.targets["k"] - dense(book))
    np.testing.assert_allclose(step, 0.02 * np.linalg.norm(dense(book)), rtol=1e-5)


def quadratic(seed):
    """phi(w) = (w - a)^T H (w - a) / 2 over 6 weights, its curvature, and two values."""
    rng = np.random.default_rng(seed)
    root, a = rng.normal(size=(6, 6)), rng.normal(size=6)
    hessian = root @ root.T
    return lambda w: 0.5 * (w - a) @ hessian @ (w - a), hessian, a, np.linalg.eigvalsh(hessian)[-1]


@pytest.mark.parametrize("fraction", [1 / 6, 0.5, 1.0])
def test_v_steps_never_raise_a_quadratic_and_end_above_the_best_partition(fraction):
    step = jax.jit(lambda book, target: v_step(book, target, fraction=fraction, trust=None))
    moved = 0
    for seed in range(20):
        phi, hessian, a, curvature = quadratic(seed)
        values = jnp.asarray([[[-0.8], [0.9]]], jnp.float32)
        best = min(phi(np.array(w)) for w in itertools.product((-0.8, 0.9), repeat=6))
        book = Codebook(values, jnp.asarray(np.random.default_rng(seed).integers(0, 2, (6, 1)), jnp.int32))
        for _ in range(10):
            w = np.asarray(dense(book), float)[:, 0]
            target = w - hessian @ (w - a) / curvature
            codes = step(book, jnp.asarray(target[:, None], jnp.float32))
            assert np.sum(codes != book.codes) <= np.ceil(6 * fraction)
            moved += int(np.sum(codes != book.codes))
            book = book._replace(codes=codes)
            new = phi(np.asarray(dense(book), float)[:, 0])
            assert best - 1e-6 <= new <= phi(w) + 1e-6
    assert moved > 0


def test_the_subspace_is_the_farthest_vectors_and_the_trust_region_ends_it():
    values = jnp.asarray(np.linspace(-3, 3, 13)[None, :, None], jnp.float32)
    book = Codebook(values, nearest(values, KERNEL))
    w = np.asarray(dense(book))
    target = w + np.random.default_rng(1).normal(size=(8, 6))
    order = np.argsort(-np.abs(target - w).ravel())
    full = np.asarray(nearest(values, jnp.asarray(target, jnp.float32)))
    for trust in (0.0, 0.3, 0.6, None):
        found = np.asarray(v_step(book, target.astype(np.float32), fraction=0.25, trust=trust))
        expected, change = np.array(book.codes).ravel(), 0.0
        for rank, i in enumerate(order[:12]):
            change += (np.asarray(values)[0, full.ravel()[i], 0] - w.ravel()[i]) ** 2
            if trust is None or np.sqrt(change) <= trust * np.linalg.norm(w) or rank == 0:
                expected[i] = full.ravel()[i]
        np.testing.assert_array_equal(found.ravel(), expected)
        assert np.sum(found != book.codes) >= 1


def test_books_of_vectors_per_output():
    book = kmeans(KERNEL, codewords=3, dim=2, books=6)
    found = v_step(book, KERNEL + 0.7, fraction=1.0, trust=None)
    np.testing.assert_array_equal(found, nearest(book.values, KERNEL + 0.7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, r"fraction of pv_tuning must be in \(0, 1\], got 0.0"),
        ({"trust": -1.0}, "trust of pv_tuning must be at least 0, or None, got -1.0"),
        ({"delta_decay": 2.0}, r"delta_decay of pv_tuning must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pv_tuning(**settings)
