"""Low-rank and SLTrain layers against dense constructions, their papers' counts, and XLA's memory analysis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from sparsejax import flops, nn
from sparsejax.bench import MEMORY_FIRST
from sparsejax.nn.sparse_low_rank import random_support, sparse_low_rank_dense, sparse_low_rank_matmul

LAYERS = {
    "low_rank": {"rank": 3},
    "sparse_low_rank": {"rank": 3, "density": 0.1, "alpha": 6.0},
}


def random_case(inputs=12, features=20, rank=3, count=24, seed=0):
    rng = np.random.default_rng(seed)
    x, down = rng.standard_normal((2, 5, inputs)), rng.standard_normal((inputs, rank))
    up, values = rng.standard_normal((rank, features)), rng.standard_normal(count)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, down, up, values)]
    return *arrays, jnp.asarray(np.sort(rng.choice(inputs * features, count, replace=False)))


def dense_by_entries(down, up, values, support, scale):
    dense = scale * np.asarray(down, np.float64) @ np.asarray(up, np.float64)
    for position, value in zip(np.asarray(support), np.asarray(values), strict=True):
        dense[divmod(int(position), dense.shape[1])] += value
    return dense


def test_sparse_low_rank_is_the_sum_of_both_parts():
    x, down, up, values, support = random_case()
    expected = dense_by_entries(down, up, values, support, 0.5)
    dense = sparse_low_rank_dense(down, up, values, support, 0.5)
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-5)
    y = sparse_low_rank_matmul(x, down, up, values, support, 0.5)
    np.testing.assert_allclose(y, x @ expected, rtol=1e-4, atol=1e-4)
    none = sparse_low_rank_dense(down, up, values[:0], support[:0], 0.5)  # without a sparse part: low rank
    np.testing.assert_array_equal(none, 0.5 * (down @ up))


def test_gradients_are_those_of_the_dense_construction():
    *arrays, support = random_case()

    def naive(x, down, up, values, support, scale):
        rows, columns = support // 20, support % 20
        return x @ (
            scale * jnp.einsum("ir,rf->if", down, up) + jnp.zeros((12, 20)).at[rows, columns].add(values)
        )

    def slopes(matmul):
        def loss(*arrays):
            return jnp.sum(jnp.sin(matmul(*arrays, support, 0.5)))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays)

    pairs = zip(slopes(sparse_low_rank_matmul), slopes(naive), strict=True)
    for ours, expected in pairs:
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_the_support_is_drawn_uniformly_without_replacement():
    draw = jax.jit(lambda key: random_support(key, 6, 5, 9))
    draws = np.stack([draw(jax.random.key(seed)) for seed in range(400)])
    assert draws.dtype == np.int32 and (np.diff(draws, axis=1) > 0).all()  # sorted, and no position twice
    assert draws.min() == 0 and draws.max() == 29
    counts = np.bincount(draws.ravel(), minlength=30)  # 120 each, with a deviation of 9
    assert 75 < counts.min() and counts.max() < 165


def test_the_sparse_part_lifts_the_rank():
    # The dossier's figures: 64 x 64, r = 8, density 0.03 and 0.1.
    rng = np.random.default_rng(0)
    down, up = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((64, 8), (8, 64)))
    ranks = []
    for density in (0.0, 0.03, 0.1):
        count = int(density * 64 * 64)
        support = random_support(jax.random.key(1), 64, 64, count)
        values = jnp.asarray(rng.standard_normal(count), jnp.float32)
        ranks.append(np.linalg.matrix_rank(sparse_low_rank_dense(down, up, values, support, 1.0)))
    assert ranks[0] == 8 and 52 <= ranks[1] <= 63 and ranks[2] == 64


# --- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_dense_twin(name):
    layer = nn.linear({"name": name, **LAYERS[name]}, 20)
    x = jax.random.normal(jax.random.key(0), (3, 5, 12))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    params = variables["params"]
    keys = dict(zip(params, jax.random.split(jax.random.key(2), len(params)), strict=True))
    params = {key: jax.random.normal(keys[key], leaf.shape) for key, leaf in params.items()}
    variables = {**variables, "params": params}
    dense = {"params": layer.to_dense(variables)}
    np.testing.assert_allclose(layer.apply(variables, x), nn.Dense(20).apply(dense, x), rtol=1e-4, atol=1e-4)
    half = nn.linear({"name": name, **LAYERS[name]}, 20, dtype=jnp.bfloat16)
    assert half.apply(variables, x).dtype == jnp.bfloat16


def test_low_rank_from_dense_is_the_best_approximation():
    kernel = np.random.default_rng(0).standard_normal((12, 20)).astype(np.float32)
    params = nn.LowRank(20, rank=3).from_dense({"kernel": kernel, "bias": jnp.arange(20.0)})
    kept = params["down_kernel"] @ params["up_kernel"]
    tail = np.linalg.svd(kernel, compute_uv=False)[3:]
    assert np.sum((kernel - kept) ** 2) == pytest.approx(np.sum(tail**2), rel=1e-4)
    np.testing.assert_array_equal(params["bias"], np.arange(20.0))


def test_counts():
    x = jax.ShapeDtypeStruct((3, 7, 100), jnp.float32)
    expected = {"low_rank": (8 * 260, 8 * 260), "sparse_low_rank": (8 * 260 + 480, 100 * 160)}
    keywords = {"low_rank": {"rank": 8}, "sparse_low_rank": {"rank": 8, "density": 0.03}}
    for name, (parameters, macs) in expected.items():
        layer = nn.linear({"name": name, **keywords[name]}, 160, use_bias=False)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert flops.parameters(variables["params"])[0] == parameters
        assert sum(flops.layer_macs(layer, variables, x).values()) == 7 * macs
    awkward = jax.eval_shape(
        nn.SparseLowRank(10, rank=1, density=0.29).init, jax.random.key(0), jnp.ones((1, 10))
    )
    assert awkward["constants"]["support"].shape == (29,)  # though 0.29 * 100 is below 29


def test_sltrain_starts_as_its_sparse_part_and_keeps_its_support():
    layer, x = nn.SparseLowRank(20, rank=4, density=0.2), jax.random.normal(jax.random.key(0), (8, 30))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    params, support = variables["params"], np.asarray(variables["constants"]["support"])
    assert support.shape == (120,) and not params["up_kernel"].any()
    for name in ("down_kernel", "values"):
        assert 0.9 * 30**-0.5 < np.abs(params[name]).max() <= 30**-0.5
    sparse = np.zeros(600)
    sparse[support] = params["values"]
    np.testing.assert_allclose(layer.apply(variables, x), x @ sparse.reshape(30, 20), rtol=1e-4, atol=1e-5)

    tx = optax.adam(0.05)

    @jax.jit
    def step(variables, state):
        def loss(params):
            y, updated = layer.apply({**variables, "params": params}, x, mutable=["constants"])
            return jnp.mean((y - 1.0) ** 2), updated

        (_, updated), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {**updated, "params": optax.apply_updates(variables["params"], updates)}, state

    state = tx.init(params)
    for _ in range(5):
        variables, state = step(variables, state)
    np.testing.assert_array_equal(variables["constants"]["support"], support)
    assert all(np.abs(variables["params"][name] - params[name]).min() > 0 for name in ("up_kernel", "values"))


@pytest.mark.parametrize(
    "layer, message",
    [
        (nn.LowRank(8, rank=9), "LowRank layer: rank=9 must be an integer from 1 to 8, .* 10 x 8 weight"),
        (nn.LowRank(8, rank=0), "LowRank layer: rank=0 must be an integer from 1 to 8"),
        (nn.SparseLowRank(8), "SparseLowRank layer: rank=128 must be an integer from 1 to 8"),
        (nn.SparseLowRank(8, rank=1, density=0.001), r"density=0.001 must be in \(0, 1\] and keep one or more of 80"),
        (nn.SparseLowRank(8, rank=1, density=1.5), r"density=1.5 must be in \(0, 1\]"),
        (nn.SparseLowRank(2**28, rank=1), "32-bit positions cannot number the entries of its 10 x 268435456"),
    ],
)  # fmt: skip
def test_bad_sizes(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 10)))


# --- memory ------------------------------------------------------------------------------------------


class Naive(nn.SparseLowRank):
    """SLTrain by plain autodiff."""

    def product(self, x, down, up, values):
        support = self.get_variable("constants", "support")
        return x @ sparse_low_rank_dense(down, up, values, support, self.alpha / self.rank)


@pytest.mark.skipif(
    jax.default_backend() == "cpu" and tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11),
    reason="the XLA of JAX 0.10 drops optimisation barriers on CPUs",
)
def test_the_backward_pass_stores_no_dense_weights():
    def peak(layer):
        model = linen.Sequential([layer.clone() for _ in range(6)])
        x = jax.ShapeDtypeStruct((16, 256), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        params = variables.pop("params")

        def loss(params, constants, x):
            return jnp.sum(jnp.sin(model.apply({"params": params, **constants}, x)))

        options = MEMORY_FIRST if jax.default_backend() == "cpu" else {}
        lowered = jax.jit(jax.grad(loss)).lower(params, variables, x)
        return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes

    weight = 256 * 256 * 4
    assert peak(nn.SparseLowRank(256, rank=4)) < 3 * weight  # W and dW of one layer
    assert peak(Naive(256, rank=4)) > 6 * weight
