"""Natural GaLore against direct solves, plain SGD, and Optax's GaLore; Lion is Optax's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax.natural_galore import natural_galore


def tree(rng, dtype=jnp.float32):
    shapes = {"wide": (5, 9), "tall": (9, 5), "square": (6, 6)}
    params = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=3)} for name, shape in shapes.items()
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def gradients(seed, steps):
    rng = np.random.default_rng(seed)
    return [tree(rng) for _ in range(steps)]


def run(transform, params, grads):
    state, updates = transform.init(params), []
    for g in grads:
        update, state = jax.jit(transform.update)(g, state, params)
        updates.append(update)
    return updates, state


def basis_of(matrix, rank):
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return left[:, :rank] if matrix.shape[0] < matrix.shape[1] else right[:rank].T


@pytest.mark.parametrize("name", ["wide", "tall", "square"])
def test_the_natural_step_solves_with_the_damped_fisher_matrix(name):
    """Numpy in float64: project, stack the last `history` gradients, solve the full system, project back."""
    rank, history, damping = 3, 4, 0.05
    grads = gradients(0, 7)
    transform = natural_galore(
        optax.sgd(1.0), rank=rank, history=history, damping=damping, scale=0.5, update_every=5
    )
    updates, _ = run(transform, grads[0], grads)
    past = []
    for step, (g, update) in enumerate(zip(grads, updates, strict=True)):
        g = np.asarray(g[name]["kernel"], np.float64)
        if step % 5 == 0:
            basis = basis_of(g, rank)
        low = basis.T @ g if g.shape[0] < g.shape[1] else g @ basis
        past = [*past, low.ravel()][-history:]
        columns = np.stack(past, axis=1)
        natural = np.linalg.solve(damping * np.eye(low.size) + columns @ columns.T, low.ravel())
        natural = natural.reshape(low.shape)
        expected = basis @ natural if g.shape[0] < g.shape[1] else natural @ basis.T
        np.testing.assert_allclose(update[name]["kernel"], -0.5 * expected, rtol=2e-4, atol=2e-6)


def test_one_gradient_is_divided_by_damping_and_its_square():
    (g,) = gradients(1, 1)
    updates, _ = run(natural_galore(optax.sgd(1.0), rank=9, scale=1.0), g, [g])
    for name, leaf in g.items():
        kernel = leaf["kernel"]
        expected = -kernel / (1e-3 + jnp.sum(kernel**2))
        np.testing.assert_allclose(updates[0][name]["kernel"], expected, rtol=1e-4, atol=1e-7)


def test_small_damping_loses_no_digits():
    """Woodbury's form subtracts numbers of size 1 / damping^2, which float32 cannot hold."""
    (g,) = gradients(2, 1)
    updates, _ = run(natural_galore(optax.sgd(1.0), rank=9, scale=1.0, damping=1e-6), g, [g])
    kernel = g["tall"]["kernel"]
    np.testing.assert_allclose(updates[0]["tall"]["kernel"], -kernel / jnp.sum(kernel**2), rtol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_gradients_that_repeat_lose_no_digits(noise):
    """H^T H has one eigenvalue of size 10^5 and others at the damping, below float32's resolution beside it."""
    rng = np.random.default_rng(8)
    g = 10 * rng.normal(size=(32, 16))
    grads = [{"kernel": jnp.asarray(g + noise * rng.normal(size=g.shape), jnp.float32)} for _ in range(5)]
    updates, state = run(sparsejax.natural_galore(optax.sgd(1.0), rank=16, scale=1.0), grads[0], grads)
    past = np.asarray(state.past["kernel"], np.float64)[:5].reshape(5, -1)
    basis = np.asarray(state.bases["kernel"], np.float64)
    for step, update in enumerate(updates):
        columns = past[: step + 1].T
        natural = np.linalg.solve(1e-3 * np.eye(len(columns)) + columns @ columns.T, columns[:, -1])
        expected = -natural.reshape(32, -1) @ basis.T
        error = np.linalg.norm(update["kernel"] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, (step, error)


def test_full_rank_without_history_is_the_inner_optimizer():
    grads = gradients(3, 4)
    updates, _ = run(natural_galore(optax.sgd(0.1), rank=6, scale=1.0, history=0), grads[0], grads)
    expected, _ = run(optax.sgd(0.1), grads[0], grads)
    chex.assert_trees_all_close(updates, expected, atol=1e-5)


@pytest.mark.parametrize(("inner", "every"), [(optax.scale_by_adam(), 9), (optax.scale(-1.0), 3)])
def test_without_history_it_is_the_galore_of_optax(inner, every):
    """Optax projects square matrices from the left, we from the right: each on the other's transpose. (Adam's
    moments see the arbitrary signs of singular vectors when the subspace changes, so they keep one subspace.)"""
    grads = [{"kernel": g["square"]["kernel"]} for g in gradients(4, 5)]
    turned = [{"kernel": g["kernel"].T} for g in grads]
    options = {"rank": 2, "scale": 0.25}
    ours, _ = run(natural_galore(inner, history=0, update_every=every, **options), grads[0], grads)
    theirs = optax.contrib.scale_by_galore(update_proj_gap=every, base_optimizer=inner, **options)
    for mine, other in zip(ours, run(theirs, turned[0], turned)[0], strict=True):
        np.testing.assert_allclose(mine["kernel"].T, other["kernel"], atol=1e-5)


def test_updates_stay_in_the_subspace_and_other_leaves_are_the_inner_optimizers():
    grads = gradients(5, 3)
    updates, state = run(natural_galore(optax.adam(0.1), rank=2), grads[0], grads)
    expected, _ = run(optax.adam(0.1), grads[0], grads)
    for name in grads[0]:
        assert np.linalg.matrix_rank(updates[-1][name]["kernel"], tol=1e-5) == 2
        basis = state.bases[f"{name}/kernel"]
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)
        np.testing.assert_array_equal(updates[-1][name]["bias"], expected[-1][name]["bias"])
    moments = state.inner_state[0].mu
    assert moments["tall"]["kernel"].shape == (9, 2) and moments["wide"]["kernel"].shape == (2, 9)
    assert state.past["tall/kernel"].shape == (20, 9, 2)


def test_bfloat16_parameters_and_kernels_of_more_axes():
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 8), jnp.bfloat16)}, "bias": jnp.ones(8, jnp.bfloat16)}
    updates, state = run(natural_galore(optax.adam(0.1), rank=4), params, [params])
    chex.assert_trees_all_equal_shapes_and_dtypes(updates[0], params)
    assert state.bases["conv/kernel"].shape == (8, 4) and state.bases["conv/kernel"].dtype == jnp.float32


def test_a_sparse_transform_wraps_it():
    grads = [{"kernel": g["tall"]["kernel"]} for g in gradients(6, 2)]
    transform = sparsejax.fixed(natural_galore(optax.adam(0.1), rank=2), sparsity=0.5)
    params, state, update = grads[0], transform.init(grads[0]), jax.jit(transform.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(params, sparsejax.apply_masks(params, sparsejax.get_masks(state)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"update_every": 0}, "update_every must be an integer of at least 1, got 0"),
        ({"history": -1}, "history must be an integer of at least 0, got -1"),
        ({"damping": 0.0}, "damping must be above 0, got 0.0"),
    ],
)
def test_keywords_out_of_range(keywords, message):
    with pytest.raises(ValueError, match=message):
        natural_galore(optax.sgd(0.1), **keywords)


def test_lion_of_optax_is_the_papers():
    """u = sign(b1 m + (1 - b1) g), w <- w - lr (u + wd w), m <- b2 m + (1 - b2) g: nothing of our own is needed."""
    rng = np.random.default_rng(7)
    weight, moment = rng.normal(size=5).astype(np.float32), np.zeros(5, np.float32)
    transform = optax.lion(0.01, weight_decay=0.1)
    params, state = jnp.asarray(weight), transform.init(jnp.asarray(weight))
    for _ in range(4):
        g = rng.normal(size=5).astype(np.float32)
        updates, state = transform.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        weight = weight - 0.01 * (np.sign(0.9 * moment + 0.1 * g) + 0.1 * weight)
        moment = 0.99 * moment + 0.01 * g
        np.testing.assert_allclose(params, weight, rtol=1e-5)
