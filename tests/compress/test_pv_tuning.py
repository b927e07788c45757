"""PV-Tuning: its limits (Adam, straight-through projection, k-means), and descent on quadratics with all partitions
listed."""

import itertools
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.compress.codebook import Codebook, dense, insert, kmeans, nearest
from sparsejax.compress.objectives import objective
from sparsejax.compress.pv_tuning import pv_optimizer, pv_tuning, v_step
from sparsejax.compress.topkld import topkld
from sparsejax.masks import flatten, map_with_name
from sparsejax.models import Transformer

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)


def gradients(step):
    return {"k": jnp.asarray(np.random.default_rng(step).normal(size=(8, 6)), jnp.float32)}


@pytest.mark.slow
def test_with_a_codeword_for_each_weight_the_p_step_is_adam():
    book = kmeans(KERNEL, codewords=48)
    tuning = pv_optimizer(value_rate=1e-2, code_rate=0.0)
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
    books, _ = (tuning := pv_optimizer(code_rate=0.0, value_rate=1.0, value_betas=(0.0, 0.0))).update(
        gradients(0), tuning.init({"k": book}), {"k": book}
    )
    np.testing.assert_array_equal(books["k"].codes, book.codes)
    sums = np.zeros((2, 3))
    for i, j in np.ndindex(8, 6):
        sums[j // 3, book.codes[i, j]] += gradients(0)["k"][i, j]
    np.testing.assert_allclose((books["k"].values - book.values)[..., 0], -np.sign(sums), atol=1e-4)


def test_everything_at_once_without_decay_is_straight_through_projection():
    book = kmeans(KERNEL, codewords=4)
    tuning = pv_optimizer(
        code_rate=0.3, value_rate=0.0, fraction=1.0, trust=None, delta_decay=0.0, lamb=False
    )
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


def test_with_decay_one_every_target_starts_from_the_quantised_weights():
    """Adam without momentum by NumPy: steps that reach no other codeword are forgotten; with decay 0 they add up."""
    book = kmeans(KERNEL, codewords=4)
    settings = dict(code_rate=0.3, value_rate=0.0, fraction=1.0, trust=None, lamb=False)
    books, sums = {}, {}
    for decay in (1.0, 0.0):
        tuning = pv_optimizer(**settings, delta_decay=decay)
        state, books[decay] = tuning.init({"k": book}), {"k": book}
        values, codes = np.asarray(book.values)[0, :, 0], np.asarray(book.codes)
        second, sums[decay] = np.zeros((8, 6)), values[codes]
        update = jax.jit(tuning.update)
        for step in range(6):
            books[decay], state = update(gradients(step), state, books[decay])
            g = np.asarray(gradients(step)["k"], np.float64)
            second = 0.95 * second + 0.05 * g**2
            start = values[codes] if decay else sums[decay]
            sums[decay] = start - 0.3 * g / (np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-8)
            codes = np.argmin((sums[decay][..., None] - values) ** 2, axis=-1)
            np.testing.assert_array_equal(books[decay]["k"].codes, codes)
    assert np.any(books[1.0]["k"].codes != books[0.0]["k"].codes)


def test_lamb_steps_have_the_norm_of_the_kernel():
    book = kmeans(KERNEL, codewords=4)
    tuning = pv_optimizer(code_rate=0.02, value_rate=0.0)
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


# --- the method --------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, 11, (6, 8))
ATTENTION = Transformer(
    11, depth=1, width=8, heads=2, max_length=8, layers=({"hidden": 0},)
)  # four kernels of 64


@cache
def attention():
    return jax.jit(ATTENTION.init)(jax.random.key(0), TOKENS)["params"]


@jax.jit
def logits_of(params):
    return ATTENTION.apply({"params": params}, TOKENS)


def next_token(params):
    logits = logits_of(params)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


@pytest.mark.slow
def test_without_epochs_it_is_kmeans():
    params = attention()
    found = pv_tuning(codewords=4, dim=2, epochs=0).run(ATTENTION, params, TOKENS, 0.0, progress=False)
    kernels = {
        name: leaf for name, leaf in flatten(params).items() if "attention" in name and "kernel" in name
    }
    books = {name: kmeans(kernel, codewords=4, dim=2) for name, kernel in kernels.items()}
    chex.assert_trees_all_close(found.params, insert(params, books), atol=1e-6)
    assert found.report["bits"] == 1 and found.report["sparsity"] == 0
    assert found.report["losses"] == [pytest.approx(float(next_token(found.params)), rel=1e-5)]
    assert set(found.report["layers"]) == set(kernels)
    assert all(0.1 < layer["error"] < 1 for layer in found.report["layers"].values())


@pytest.mark.slow
def test_with_a_codeword_for_each_weight_it_is_adam():
    params, adam = attention(), optax.adam(1e-2, 0.9, 0.95)
    settings = dict(codewords=64, code_rate=0.0, value_rate=1e-2, epochs=3)
    found = pv_tuning(**settings).run(ATTENTION, params, TOKENS, None, progress=False)

    def loss(kernels):
        return next_token(map_with_name(lambda name, leaf: kernels.get(name, leaf), params))

    kernels = {name: x for name, x in flatten(params).items() if name in found.report["layers"]}
    state, losses, step = adam.init(kernels), [], jax.jit(jax.value_and_grad(loss))
    for _ in range(4):
        value, grads = step(kernels)
        losses.append(float(value))
        last = kernels
        moves, state = adam.update(grads, state)
        kernels = optax.apply_updates(kernels, moves)
    np.testing.assert_allclose(found.report["losses"], losses, rtol=1e-5)
    assert losses == sorted(losses, reverse=True)
    for name, kernel in last.items():
        np.testing.assert_allclose(flatten(found.params)[name], kernel, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("distil", [None, {"k": 3}])
def test_training_lowers_what_it_is_trained_on(distil):
    params = attention()
    settings = dict(codewords=4, epochs=3, batch=3, code_rate=0.05, value_rate=1e-2, distil=distil)
    found = pv_tuning(**settings).run(ATTENTION, params, TOKENS, 0.0, progress=False)
    losses = found.report["losses"]
    assert len(losses) == 4 and min(losses) < 0.98 * losses[0]
    teacher, student = logits_of(params), logits_of(found.params)
    reached = next_token(found.params) if distil is None else topkld(**distil)(teacher, student).mean()
    assert min(losses) == pytest.approx(float(reached), rel=1e-4)


@pytest.mark.slow
def test_a_model_is_its_own_teacher():
    params = attention()
    settings = dict(codewords=64, epochs=0, distil={"k": 2})
    found = pv_tuning(**settings).run(ATTENTION, params, TOKENS, 0.0, progress=False)
    assert abs(found.report["losses"][0]) < 1e-6
    loss, batches = objective(ATTENTION, params, TOKENS, 6, {"k": 2})
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params, batches[0])):
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_with_grouped_keys_and_a_tied_head():
    model = Transformer(11, depth=1, width=8, heads=4, kv_heads=2, hidden=8, max_length=8, tied=True, bias=())
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16), shapes)
    found = pv_tuning(codewords=4, batch=6).run(model, params, TOKENS, 0.0, progress=False)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.params, params)
    chex.assert_tree_all_finite(found.params)


def test_what_it_cannot_do():
    params = attention()
    with pytest.raises(ValueError, match="pv_tuning keeps every weight, so its sparsity must be 0, got 0.5"):
        pv_tuning().run(ATTENTION, params, TOKENS, 0.5)
    with pytest.raises(ValueError, match="pv_tuning cannot do the pattern 2:4"):
        pv_tuning().run(ATTENTION, params, TOKENS, None, "2:4")
    with pytest.raises(
        ValueError, match="65 codewords .* 64 vectors of a book of block_0/attention/query/kernel"
    ):
        pv_tuning(codewords=65).run(ATTENTION, params, TOKENS, 0.0)
    experts = ATTENTION.clone(layers=(), hidden=8, experts=2)
    shapes = jax.eval_shape(experts.init, jax.random.key(0), TOKENS)["params"]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    with pytest.raises(ValueError, match="pv_tuning cannot do experts, and block_0/mlp/up/kernel has 2"):
        pv_tuning().run(experts, zeros, TOKENS, 0.0)
    with pytest.raises(ValueError, match="k=12 of topkld exceeds the 11 classes"):
        pv_tuning(codewords=4, distil={"k": 12}).run(ATTENTION, params, TOKENS, 0.0)
    with pytest.raises(ValueError, match="distil must be keywords of topkld, got {'top': 3}"):
        pv_tuning(distil={"top": 3})
    with pytest.raises(ValueError, match=r"at least two, got tokens of shape \(6, 1\)"):
        pv_tuning(codewords=4).run(ATTENTION, params, TOKENS[:, :1], 0.0)


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
        pv_optimizer(**settings)
