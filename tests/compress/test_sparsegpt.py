"""SparseGPT against its equations in numpy, its identities, and least squares on the same mask."""

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from sparsejax import compress
from sparsejax.compress import CompressionWarning, statistics
from sparsejax.compress.sparsegpt import inverse_factor, sparsegpt

RNG = np.random.default_rng(0)
INPUTS, OUTPUTS = 40, 24
W = RNG.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
X = (
    RNG.normal(size=(4, 30, INPUTS)) @ (np.eye(INPUTS) + 0.3 * RNG.normal(size=(INPUTS, INPUTS)))
    + RNG.normal(size=INPUTS)
).astype(np.float32)
STATS = statistics.of(("gram",), jnp.asarray(X))
PATTERNS = (("unstructured", 0.5), ("2:4", None), ("1:8", None), ("block:4x4", 0.5))


def hessian(gram, damping=0.01):
    """H of a Gram matrix of live inputs."""
    h = 2 * np.asarray(gram, np.float64)
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h))


def loss(kernel, h):
    delta = W.astype(np.float64) - np.asarray(kernel, np.float64)
    return 0.5 * np.trace(delta.T @ h @ delta)


def lowest(scores, count):
    mask = np.ones(scores.size, bool)
    mask[np.argsort(scores, axis=None, kind="stable")[:count]] = False
    return mask.reshape(scores.shape)


def in_numpy(weights, h, sparsity, block, nm=None, side=None, quantise=None):
    """The paper's algorithm in its own layout (out, in), input by input: kernel, mask, sum of e^2."""
    w = weights.T.astype(np.float64)
    u = scipy.linalg.cholesky(np.linalg.inv(h))  # upper
    mask, total = np.ones(w.shape, bool), 0.0
    for a in range(0, INPUTS, block):
        b = min(a + block, INPUTS)
        scores = w[:, a:b] ** 2 / np.diag(u)[a:b] ** 2
        if side:
            units = scores.reshape(OUTPUTS // side, side, (b - a) // side, side).mean((1, 3)).T
            units = lowest(units, int(sparsity * units.size)).T
            mask[:, a:b] = units.repeat(side, 0).repeat(side, 1)
        elif nm is None and sparsity:
            mask[:, a:b] = lowest(scores.T, int(sparsity * scores.size)).T
        rounding = quantise and quantise((w[:, a:b] * mask[:, a:b]).T)
        for j in range(a, b):
            if nm and (j - a) % nm[1] == 0:
                group = w[:, j : j + nm[1]] ** 2 / np.diag(u)[j : j + nm[1]] ** 2
                mask[:, j : j + nm[1]] = np.argsort(np.argsort(-group, 1, kind="stable"), 1) < nm[0]
            q = w[:, j] * mask[:, j]
            q = rounding(q, j - a) * mask[:, j] if rounding else q
            e = (w[:, j] - q) / u[j, j]
            w[:, j:] -= np.outer(e, u[j, j:])
            w[:, j], total = q, total + np.sum(e**2)
    return w.T, mask.T, total


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_equals_the_equations_in_numpy(pattern, sparsity, block):
    kernel, mask = sparsegpt(block=block).prune(jnp.asarray(W), STATS, sparsity, pattern)
    rule = compress.base.parse(pattern)
    own = {"nm": (rule.n, rule.m)} if hasattr(rule, "n") else {"side": 4} if hasattr(rule, "shape") else {}
    h = hessian(STATS["gram"])
    expected, expected_mask, total = in_numpy(W, h, sparsity, block, **own)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(kernel, expected, atol=2e-5)
    np.testing.assert_allclose(loss(kernel, h), total / 2, rtol=1e-4)


@pytest.mark.parametrize("block", [7, 12])
def test_the_update_behind_a_block_may_take_several_steps(monkeypatch, block):
    whole = sparsegpt(block=block).prune(jnp.asarray(W), STATS, None, "1:4")
    monkeypatch.setattr(sys.modules["sparsejax.compress.sparsegpt"], "_TAIL", 8)
    expected, expected_mask, _ = in_numpy(W, hessian(STATS["gram"]), 0.75, -(-block // 4) * 4, nm=(1, 4))
    jax.clear_caches()  # of the sweep with the longer steps
    kernel, mask = sparsegpt(block=block).prune(jnp.asarray(W), STATS, None, "1:4")
    jax.clear_caches()
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(kernel, expected, atol=2e-5)
    np.testing.assert_allclose(kernel, whole[0], atol=2e-5)


def test_layers_with_the_same_inputs_share_a_factor_for_as_long_as_these_live(monkeypatch):
    module, grams = sys.modules["sparsejax.compress.sparsegpt"], []
    monkeypatch.setattr(
        module, "_factorise", lambda g, d, f=module._factorise: grams.append(g.shape) or f(g, d)
    )
    method, one = sparsegpt(), {"gram": STATS["gram"] + 0}
    for stats in (one, one, STATS, STATS, one):
        method.prune(jnp.asarray(W), stats, 0.5, "unstructured")
    assert len(grams) == 3
    factors = next(
        c.cell_contents for c in method.prune.__closure__ if isinstance(c.cell_contents, module._Factors)
    )
    assert factors._found is not None
    del one, stats
    gc.collect()
    assert factors._found is None


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_factor_is_narrowed_in_its_place(monkeypatch, size):
    monkeypatch.setattr(sys.modules["sparsejax.compress.sparsegpt"], "_PIECE", 3)
    half = RNG.normal(size=(size, 2 * size))
    gram = half @ half.T
    factor, _ = inverse_factor(gram, 0.0)
    np.testing.assert_allclose(factor, scipy.linalg.cholesky(np.linalg.inv(2 * gram)), rtol=1e-4, atol=1e-6)


def test_the_count_is_exact_over_blocks_that_do_not_divide_it():
    for block in (7, 12, 64):
        _, mask = sparsegpt(block=block).prune(jnp.asarray(W), STATS, 0.37, "unstructured")
        assert int(np.sum(mask)) == W.size - int(0.37 * W.size)


def test_the_block_does_not_matter_for_a_given_mask():
    # N:M masks depend on the weights of their group alone
    one, other = (sparsegpt(block=b).prune(jnp.asarray(W), STATS, None, "2:4") for b in (4, 40))
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_allclose(one[0], other[0], atol=2e-5)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS[:2])
def test_between_the_masked_kernel_and_least_squares(pattern, sparsity):
    kernel, mask = sparsegpt().prune(jnp.asarray(W), STATS, sparsity, pattern)
    h = hessian(STATS["gram"])
    best = np.zeros(W.shape)
    for o, kept in enumerate(np.asarray(mask).T):
        best[kept, o] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ W[:, o].astype(np.float64))
    assert loss(best, h) <= loss(kernel, h) < loss(np.where(mask, W, 0), h)


def test_uncorrelated_inputs_give_the_mask_of_wanda_over_the_layer():
    square = np.exp(RNG.normal(size=INPUTS)).astype(np.float32)
    stats = {"gram": jnp.diag(square), "square": jnp.asarray(square)}
    kernel, mask = sparsegpt(damping=0.0, block=INPUTS).prune(jnp.asarray(W), stats, 0.5, "unstructured")
    expected = compress.wanda(scope="layer").prune(jnp.asarray(W), stats, 0.5, "unstructured")
    np.testing.assert_array_equal(mask, expected[1])
    np.testing.assert_allclose(kernel, expected[0], atol=1e-6)


def test_the_scale_of_inputs_does_not_matter():
    gram = np.array(STATS["gram"])
    gram[5], gram[:, 5] = 0, 0
    one, other = (
        sparsegpt().prune(jnp.asarray(W), {"gram": jnp.asarray(gram * c)}, 0.5, "unstructured")
        for c in (1.0, 2.0**-20)
    )
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_allclose(one[0], other[0], atol=2e-5)


def test_dead_inputs_lose_their_weights_and_change_nothing_else():
    live = np.ones(INPUTS, bool)
    live[[0, 7, 39]] = False
    stats = statistics.of(("gram",), jnp.asarray(X * live))
    kernel, _ = sparsegpt(block=INPUTS).prune(jnp.asarray(W), stats, 0.5, "unstructured")
    assert not np.asarray(kernel)[~live].any()
    without = {"gram": stats["gram"][live][:, live]}
    sparsity = (0.5 * INPUTS - 3) / live.sum()  # dead weights are dropped first
    expected, _ = sparsegpt(block=INPUTS).prune(jnp.asarray(W[live]), without, sparsity, "unstructured")
    np.testing.assert_allclose(np.asarray(kernel)[live], expected, atol=2e-5)


def test_factor_is_that_of_the_inverse():
    factor, dead = inverse_factor(STATS["gram"], 0.01)
    assert not np.asarray(dead).any() and (np.diag(factor) > 0).all()
    np.testing.assert_array_equal(factor, np.triu(factor))
    inverse = np.asarray(factor, np.float64).T @ np.asarray(factor, np.float64)
    np.testing.assert_allclose(inverse @ hessian(STATS["gram"]), np.eye(INPUTS), atol=1e-4)


def to_tenths(block):
    return lambda row, i: jnp.round(row * 10) / 10


def test_rounding_in_the_sweep_is_gptq():
    kernel, mask = sparsegpt(block=8, quantise=to_tenths).prune(jnp.asarray(W), STATS, 0.0, "unstructured")
    h = hessian(STATS["gram"])
    expected, _, total = in_numpy(W, h, 0.0, 8, quantise=lambda block: lambda row, i: np.round(row * 10) / 10)
    assert np.asarray(mask).all()
    np.testing.assert_allclose(kernel, expected, atol=1e-5)
    np.testing.assert_allclose(loss(kernel, h), total / 2, rtol=1e-4)
    assert loss(kernel, h) < loss(np.round(W * 10) / 10, h)


def shrunk(block):
    """Not a rounding, so that a last bit cannot tip it over, but it needs the block, the input, and a mask."""
    size = abs(block).max(0)
    return lambda row, i: 0.9 * row + 0.01 * size * (i + 1)


def test_rounding_sees_the_block_it_is_for_and_keeps_the_mask():
    method = sparsegpt(block=8, quantise=shrunk)
    kernel, mask = method.prune(jnp.asarray(W), STATS, 0.5, "unstructured")
    expected, expected_mask, _ = in_numpy(W, hessian(STATS["gram"]), 0.5, 8, quantise=shrunk)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(kernel, expected, atol=2e-5)
    assert not np.asarray(kernel)[~np.asarray(mask)].any()


def test_a_gram_matrix_that_is_not_positive_definite_is_damped_more_with_a_warning():
    gram = np.eye(INPUTS, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 1.05  # smallest eigenvalue -0.05: 0.01 is not enough, 0.1 is
    with pytest.warns(
        CompressionWarning, match="not positive definite with damping 0.01; damped by 0.1 times"
    ):
        kernel, _ = sparsegpt().prune(jnp.asarray(W), {"gram": jnp.asarray(gram)}, 0.5, "unstructured")
    assert np.isfinite(kernel).all()
    np.testing.assert_allclose(inverse_factor(np.eye(3), 0.1)[0], np.eye(3) / np.sqrt(2.2), rtol=1e-6)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (-100 * np.eye(INPUTS), "not positive definite, even with 10 times its mean diagonal added"),
        (np.full((INPUTS, INPUTS), np.nan), "is not finite"),
    ],
)
def test_impossible_gram_matrices(gram, message):
    with pytest.raises(ValueError, match=message):
        sparsegpt().prune(jnp.asarray(W), {"gram": jnp.asarray(gram, jnp.float32)}, 0.5, "unstructured")


def test_bad_arguments():
    with pytest.raises(ValueError, match="a block of at least 1 input, got 0"):
        sparsegpt(block=0)
    for damping in (-1, 20, np.nan):
        with pytest.raises(ValueError, match=rf"damping must be in \[0, 10\], got {damping}"):
            sparsegpt(damping=damping)
        with pytest.raises(ValueError, match="damping must be in"):
            inverse_factor(np.eye(3), damping)
