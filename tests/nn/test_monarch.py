"""Monarch matrices against explicit sums, block-diagonal products, scipy, and matrices known to be Monarch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from flax import linen

from sparsejax import flops, nn
from sparsejax.masks import apply_masks, flatten

# k, l, p, s, b: square, rectangular both ways, unequal numbers of blocks, slices of rank one and more.
SIZES = [(4, 4, 4, 4, 1), (4, 4, 6, 3, 1), (2, 3, 6, 8, 1), (2, 2, 8, 8, 2), (3, 2, 7, 5, 4)]


def random_factors(k, l, p, s, b, seed=0):
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((k, b * l, p)), rng.standard_normal((l, s, k * b))
    return jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)


def dense_by_sums(first, second):
    """W[(k,p),(s,l)] = sum_b W2[l,s,(k,b)] W1[k,(b,l),p], entry by entry."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    (k, q, p), (l, s, _) = first.shape, second.shape
    rank, dense = q // l, np.zeros((k * p, s * l))
    for i, j, c, d, b in itertools.product(range(k), range(p), range(s), range(l), range(rank)):
        dense[i * p + j, c * l + d] += second[d, c, i * rank + b] * first[i, b * l + d, j]
    return dense


def tail_energy(dense, k, l, b):
    """What the projection must leave: the squared singular values beyond the b-th of every slice."""
    p, s = dense.shape[0] // k, dense.shape[1] // l
    slices = np.asarray(dense, np.float64).reshape(k, p, s, l)
    values = [
        np.linalg.svd(slices[i, :, :, j], compute_uv=False) for i, j in itertools.product(range(k), range(l))
    ]
    assert p >= b and s >= b
    return sum(np.sum(found[b:] ** 2) for found in values)


@pytest.mark.parametrize("sizes", SIZES)
def test_dense_and_product_are_the_sums_of_the_equation(sizes):
    first, second = random_factors(*sizes)
    expected = dense_by_sums(first, second)
    np.testing.assert_allclose(nn.monarch_dense(first, second), expected, rtol=1e-5, atol=1e-5)
    x = np.random.default_rng(1).standard_normal((2, 5, expected.shape[0])).astype(np.float32)
    np.testing.assert_allclose(nn.monarch_matmul(x, first, second), x @ expected, rtol=1e-4, atol=1e-4)


def test_square_case_is_the_papers_product_of_block_diagonals():
    # M = P L P^T R with P the transposition permutation, for a column vector.
    first, second = random_factors(4, 4, 4, 4, 1)
    transpose = np.eye(16)[np.arange(16).reshape(4, 4).T.ravel()]
    matrix = (
        transpose
        @ scipy.linalg.block_diag(*np.asarray(second))
        @ transpose
        @ scipy.linalg.block_diag(*np.asarray(first))
    )
    np.testing.assert_allclose(nn.monarch_dense(first, second), matrix.T, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_dense_construction():
    factors = random_factors(2, 3, 6, 8, 2)
    x = jax.random.normal(jax.random.key(0), (5, 12))

    def loss(matmul):
        return lambda x, factors: jnp.sum(jnp.sin(matmul(x, *factors)))

    def through_dense(x, first, second):
        first, second = first.reshape(2, 2, 3, 6), second.reshape(3, 8, 2, 2)
        columns = [
            jnp.concatenate([jnp.einsum("bp,sb->ps", first[k, :, l], second[l, :, k]) for k in range(2)])
            for l in range(3)
        ]
        return x @ jnp.stack(columns, -1).reshape(12, 24)

    ours = jax.jit(jax.value_and_grad(loss(nn.monarch_matmul), (0, 1)))(x, factors)
    expected = jax.jit(jax.value_and_grad(loss(through_dense), (0, 1)))(x, factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, expected)


# --- projection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
def test_projection_recovers_monarch_matrices(sizes):
    dense = nn.monarch_dense(*random_factors(*sizes))
    found = nn.monarch_project(dense, sizes[:2], sizes[-1])
    assert [factor.shape for factor in found] == [factor.shape for factor in random_factors(*sizes)]
    np.testing.assert_allclose(nn.monarch_dense(*found), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_projection_error_is_the_tail_energy(sizes):
    k, l, p, s, b = sizes
    dense = np.random.default_rng(2).standard_normal((k * p, s * l)).astype(np.float32)
    error = np.sum((dense - np.asarray(nn.monarch_dense(*nn.monarch_project(dense, (k, l), b)))) ** 2)
    assert error == pytest.approx(tail_energy(dense, k, l, b), rel=1e-4, abs=1e-6)


def test_no_optimizer_beats_the_projection():
    dense = np.random.default_rng(3).standard_normal((8, 8))
    best = tail_energy(dense, 2, 2, 1)

    def error(flat):
        first, second = flat[:16].reshape(2, 2, 4), flat[16:].reshape(2, 4, 2)
        residual = np.einsum("klp,lsk->kpsl", first, second) - dense.reshape(2, 4, 4, 2)
        slopes = np.einsum("kpsl,lsk->klp", residual, second), np.einsum("kpsl,klp->lsk", residual, first)
        return np.sum(residual**2), 2 * np.concatenate([slope.ravel() for slope in slopes])

    rng = np.random.default_rng(4)
    found = [
        scipy.optimize.minimize(error, rng.standard_normal(32), jac=True, method="L-BFGS-B").fun
        for _ in range(20)
    ]
    ours = error(np.concatenate([np.ravel(f) for f in nn.monarch_project(jnp.asarray(dense), 2, 1)]))[0]
    assert ours == pytest.approx(best, rel=1e-5)
    assert min(found) >= best - 1e-9 and min(found) == pytest.approx(best, rel=1e-4)


def relative_error(dense, blocks, rank=1):
    kept = np.asarray(nn.monarch_dense(*nn.monarch_project(jnp.asarray(dense), blocks, rank)))
    return np.sum(np.abs(dense - kept) ** 2) / np.sum(np.abs(dense) ** 2)


def test_hadamard_and_fourier_matrices_are_monarch_and_circulants_are_not():
    assert relative_error(scipy.linalg.hadamard(16).astype(np.float32), 4) < 1e-10
    for n, k, l in ((16, 4, 4), (64, 8, 8), (12, 3, 4)):
        fourier = scipy.linalg.dft(n).astype(np.complex64)
        stride = np.arange(n).reshape(n // k, k).T.ravel()  # inputs k apart go to the same block
        assert relative_error(fourier[stride], (k, l)) < 1e-10
        assert relative_error(fourier, (k, l)) > 0.1
    circulant = scipy.linalg.circulant(np.random.default_rng(5).standard_normal(16)).astype(np.float32)
    assert relative_error(circulant, 4) > 0.1


def test_a_gaussian_matrix_loses_what_it_must():
    dense = np.random.default_rng(6).standard_normal((64, 64)).astype(np.float32)
    assert relative_error(dense, 8) == pytest.approx(0.61, abs=0.02)  # a quarter of the parameters


# --- layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, keywords, expected",
    [
        (64, {"features": 64}, 64 * 64 // 2),  # as released: half
        (64, {"features": 64, "blocks": 8}, 2 * 64 * 8),  # 2 n^1.5
        (784, {"features": 512}, 32 * 4 * (784 + 512)),
        (12, {"features": 24, "blocks": [2, 3], "rank": 2}, 2 * (3 * 12 + 2 * 24)),
        (8, {"features": 4}, 4 * (8 + 4)),  # rank is at least 1
    ],
)
def test_parameters_and_macs(inputs, keywords, expected):
    layer = nn.Monarch(use_bias=False, **keywords)
    x = jax.ShapeDtypeStruct((3, 5, inputs), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert flops.parameters(variables["params"]) == (expected, expected)
    macs = flops.layer_macs(layer, variables, x)
    assert macs.keys() == {"first_kernel", "second_kernel"} and sum(macs.values()) == 5 * expected


def test_layer_equals_its_dense_twin():
    layer, x = nn.Monarch(12, blocks=2), jax.random.normal(jax.random.key(0), (3, 5, 8))
    variables = layer.init(jax.random.key(1), x)
    variables["params"]["bias"] = jnp.arange(12.0)
    dense = {"params": layer.to_dense(variables)}
    np.testing.assert_allclose(layer.apply(variables, x), nn.Dense(12).apply(dense, x), rtol=1e-4, atol=1e-5)
    again = layer.from_dense(dense["params"])
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables["params"])
    np.testing.assert_allclose(
        layer.apply({"params": again}, x), layer.apply(variables, x), rtol=1e-4, atol=1e-5
    )


def test_initial_range_dtypes_and_masks():
    layer = nn.Monarch(64, dtype=jnp.bfloat16)
    x = jnp.ones((2, 128))
    variables = layer.init(jax.random.key(0), x)
    for name, leaf in flatten(variables["params"]).items():
        assert leaf.dtype == jnp.float32
        bound = leaf.shape[-1] ** -0.5 if name != "bias" else 0.0
        assert 0.9 * bound <= float(jnp.abs(leaf).max()) <= bound
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    masks = jax.tree.map(
        lambda leaf: jax.random.bernoulli(jax.random.key(2), 0.5, leaf.shape), variables["params"]
    )
    masked = layer.apply({"params": apply_masks(variables["params"], masks)}, x)
    np.testing.assert_array_equal(layer.apply({**variables, "masks": masks}, x), masked)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (
            {"features": 30},
            "blocks do not divide its sizes: 4 must divide its 64 inputs and 4 its 30 outputs",
        ),
        ({"features": 32, "blocks": 0}, "blocks=0 must be a positive integer or a pair of them"),
        ({"features": 32, "blocks": (2, 2, 2)}, r"blocks=\(2, 2, 2\) must be a positive integer or a pair"),
        ({"features": 32, "rank": 9}, r"rank=9 must be an integer from 1 to 8, the smaller side .*16 x 8"),
    ],
)
def test_bad_sizes_name_the_layer(keywords, message):
    model = linen.Sequential([nn.Dense(64), nn.Monarch(**keywords)])
    with pytest.raises(ValueError, match="Monarch layer layers_1: .*" + message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
