"""Dense-sparse factorisation against planted factors, truncated SVD, brute force over supports, and counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import dense_sparse
from sparsejax.dense_sparse import Factors
from sparsejax.patterns import NM, parse


def gaussian(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def planted_codes(pattern, blocks, rank, out, seed=0):
    """N:M sparse codes, exactly N nonzeros away from zero in every group."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.5, 1.5, (blocks, rank, out)) * rng.choice([-1, 1], (blocks, rank, out))
    chosen = rng.random((blocks, rank // pattern.m, pattern.m, out)).argsort(2) < pattern.n
    return jnp.asarray(codes * chosen.reshape(codes.shape), jnp.float32)


def orthonormal(blocks, height, rank, seed=0):
    return jnp.linalg.qr(gaussian(blocks, height, rank, seed=seed))[0]


error = jax.jit(dense_sparse.relative_error)
factorise = jax.jit(dense_sparse.factorise, static_argnums=(1, 2, 3))
alternate = jax.jit(dense_sparse.alternate, static_argnums=2)


def test_top_n_coding_recovers_planted_codes_of_orthonormal_atoms():
    pattern, atoms = NM(2, 4), orthonormal(3, 20, 8)
    codes = planted_codes(pattern, 3, 8, 30)
    found = jax.jit(dense_sparse.code, static_argnums=2)(
        atoms @ codes, Factors(atoms, jnp.zeros_like(codes)), pattern
    )
    np.testing.assert_allclose(found.sparse, codes, atol=1e-5)
    np.testing.assert_array_equal(found.sparse != 0, codes != 0)


def test_alternation_recovers_planted_factors_from_nearby_atoms():
    pattern, atoms = NM(1, 4), orthonormal(2, 16, 8)
    codes = planted_codes(pattern, 2, 8, 200)
    weight = atoms @ codes
    factors = Factors(atoms + 0.05 * gaussian(2, 16, 8, seed=1), jnp.zeros_like(codes))
    for _ in range(15):
        factors = alternate(weight, factors, pattern)
    assert error(weight, factors) < 1e-8
    np.testing.assert_array_equal(factors.sparse != 0, codes != 0)


@pytest.mark.parametrize("rank", [6, 10])
def test_dense_codes_with_enough_atoms_are_exact(rank):
    weight = gaussian(1, 12, 5) @ gaussian(1, 5, 9, seed=1)
    assert error(weight, factorise(weight, rank, NM(1, 1), 1)) < 1e-10
    assert error(weight, factorise(weight, 4, NM(1, 1), 3)) > 1e-3


def test_one_block_of_dense_codes_is_the_truncated_svd():
    weight = gaussian(1, 12, 20)
    values = np.linalg.svd(weight[0], compute_uv=False)
    best = np.sum(values[4:] ** 2) / np.sum(values**2)
    assert error(weight, factorise(weight, 4, NM(4, 4), 2)) == pytest.approx(best, rel=1e-5)
    factors = Factors(gaussian(1, 12, 4, seed=1), jnp.zeros((1, 4, 20)))  # and from anywhere
    for _ in range(150):
        factors = alternate(weight, factors, NM(4, 4))
    assert error(weight, factors) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("n, m, rank", [(2, 4, 8), (3, 8, 16), (1, 16, 16)])
def test_the_error_never_increases(n, m, rank):
    weight, pattern = gaussian(4, 8, 40), NM(n, m)
    factors, errors = dense_sparse.start(weight, rank), []
    for _ in range(25):
        factors = alternate(weight, factors, pattern)
        errors.append(float(error(weight, factors)))
        kept = np.count_nonzero(np.asarray(factors.sparse).reshape(4, rank // m, m, 40), axis=2)
        assert kept.max() <= n
    assert np.diff(errors).max() < 1e-6 and errors[-1] < 0.97 * errors[0]
    # Another weight nearby: the warm start is worth more than a fresh one.
    moved = weight + 0.01 * gaussian(4, 8, 40, seed=2)
    cold = alternate(moved, dense_sparse.start(moved, rank), pattern)
    assert error(moved, alternate(moved, factors, pattern)) < error(moved, cold)


def test_codes_are_near_the_best_of_all_supports():
    # Two atoms of four for every column: all six supports, each with its least squares, can be tried.
    weight = gaussian(1, 10, 25)
    factors = factorise(weight, 4, NM(2, 4), 40)
    atoms, columns = np.asarray(factors.dense[0], np.float64), np.asarray(weight[0], np.float64)
    best = np.full(25, np.inf)
    for support in itertools.combinations(range(4), 2):
        picked = atoms[:, support]
        residual = columns - picked @ np.linalg.lstsq(picked, columns, rcond=None)[0]
        best = np.minimum(best, np.sum(residual**2, axis=0))
    ours = float(jnp.sum(jnp.square(weight - dense_sparse.product(factors))))
    assert best.sum() <= ours + 1e-4 and ours < 1.02 * best.sum()


def test_the_dictionary_is_the_least_squares_and_keeps_unused_atoms():
    weight, codes = gaussian(2, 6, 30), planted_codes(NM(1, 2), 2, 4, 30).at[:, 3].set(0.0)
    before = gaussian(2, 6, 4, seed=3)
    found = dense_sparse.fit_dictionary(weight, Factors(before, codes)).dense
    for block in range(2):
        best = np.linalg.lstsq(np.asarray(codes[block, :3].T), np.asarray(weight[block].T), rcond=None)[0].T
        np.testing.assert_allclose(found[block, :, :3], best, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[..., 3], before[..., 3], rtol=1e-4)


def test_more_atoms_than_dimensions_help():
    weight = gaussian(1, 8, 200)
    errors = [error(weight, factorise(weight, rank, NM(2, rank), 20)) for rank in (8, 16)]
    assert errors[1] < 0.9 * errors[0]


def test_degenerate_weights_stay_finite():
    for weight in (jnp.zeros((2, 4, 6)), jnp.ones((2, 4, 6), jnp.bfloat16)):
        factors = factorise(weight, 4, NM(2, 4), 3)
        assert all(bool(jnp.isfinite(part).all()) for part in factors)
        np.testing.assert_allclose(dense_sparse.product(factors), weight, atol=1e-5)


def test_what_is_stored():
    # 2:4 codes: two indices of two bits, or four flags; 5:16: sixteen flags; 1:8: three bits.
    assert dense_sparse.stored_values((1, 10, 20), 8, NM(2, 4)) == 10 * 8 + 2 * 20 * (2 + 4 / 32)
    assert dense_sparse.stored_values((3, 16, 20), 16, NM(5, 16)) == 3 * (256 + 20 * (5 + 16 / 32))
    assert dense_sparse.stored_values((1, 10, 20), 8, NM(1, 8)) == 80 + 20 * (1 + 3 / 32)
    assert dense_sparse.stored_values((1, 10, 20), 7, NM(1, 1)) == 7 * 30
    shape, rank = dense_sparse.plan((784, 256), 0.4, NM(1, 1), None, "w")
    assert shape == (1, 784, 256) and rank == int(0.4 * 784 * 256 / (784 + 256))
    for pattern, block in ((NM(2, 4), None), (NM(5, 16), 16)):
        shape, rank = dense_sparse.plan((784, 256), 0.45, pattern, block, "w")
        sizes = [
            dense_sparse.stored_values(shape, r, pattern) / (784 * 256) for r in (rank, rank + pattern.m)
        ]
        assert sizes[0] <= 0.45 < sizes[1]


@pytest.mark.parametrize(
    "shape, keywords, message",
    [
        ((12, 8), {"block": 4.0}, "block=4.0 must be an integer that divides the 12 rows"),
        ((12, 8), {"pattern": parse("channel")}, "codes of dense_0/kernel need an N:M pattern along axis -2"),
        ((12, 8), {"pattern": NM(2, 4, axis=-1)}, "codes of dense_0/kernel need an N:M pattern along axis -2"),
        ((12, 8), {"block": 5}, "block=5 must be an integer that divides the 12 rows of dense_0/kernel"),
        ((12, 8), {"budget": 0.0}, r"the budget of dense_0/kernel must be in \(0, 1\], got 0.0"),
        ((12, 8), {"budget": 0.1}, r"budget=0.1 is too small for dense_0/kernel of shape \(12, 8\): with 2:4 .* 0.677"),
        ((3, 3, 4, 8), {}, r"factors are those of a matrix, but dense_0/kernel has shape \(3, 3, 4, 8\)"),
    ],
)  # fmt: skip
def test_bad_plans_name_the_leaf(shape, keywords, message):
    arguments = {"budget": 0.9, "pattern": NM(2, 4), "block": None, **keywords}
    with pytest.raises(ValueError, match=message):
        dense_sparse.plan(shape, label="dense_0/kernel", **arguments)
