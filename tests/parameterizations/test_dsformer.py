"""DSFormer: the straight-through factoriser, its gradient and its state, and the layer it is deployed as."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import dense_sparse, flops, models, nn
from sparsejax.masks import densities
from sparsejax.parameterizations import Parameterized, build
from sparsejax.patterns import NM

KEY = jax.random.key(0)
SETTING = {"budget": 0.9, "pattern": "2:4", "block": 4, "exclude": ["head*"]}


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree():
    return {"dense": {"kernel": weights(8, 24), "bias": weights(24)}, "head": {"kernel": weights(24, 3)}}


def build_method(**keywords):
    return build("dsformer", **{**SETTING, **keywords})


@functools.cache
def started():
    """A method, and its latent tree and state for `tree()`."""
    method = build_method()
    return method, *jax.jit(method.init)(KEY, tree())


def dense_of(factors):
    """D S by numpy, block below block."""
    return np.concatenate([np.asarray(d) @ np.asarray(s) for d, s in zip(*factors, strict=True)])


def test_evaluation_uses_the_stored_factors():
    method, latent, state = started()
    found, after, penalty = method.materialize(latent, state)
    (name, factors), *others = method.factors(state).items()
    assert name == "dense/kernel" and not others and penalty == 0.0
    np.testing.assert_allclose(found["dense"]["kernel"], dense_of(factors), rtol=1e-5, atol=1e-6)
    assert after is state
    jax.tree.map(np.testing.assert_array_equal, latent["params"], tree())
    np.testing.assert_array_equal(found["head"]["kernel"], tree()["head"]["kernel"])
    assert factors.dense.shape == (2, 4, 4) and factors.sparse.shape == (2, 4, 24)
    kept = np.count_nonzero(np.asarray(factors.sparse), axis=1)
    assert kept.max() == 2
    # The latent weight itself has no say until the factors follow it.
    moved = jax.tree.map(lambda w: w + 1.0, latent)
    np.testing.assert_array_equal(
        method.materialize(moved, state)[0]["dense"]["kernel"], found["dense"]["kernel"]
    )


def test_a_training_step_is_one_alternation_from_the_stored_factors():
    method, latent, state = started()
    moved = jax.tree.map(lambda w: 1.1 * w + 0.1, latent)
    found, after, _ = jax.jit(method.materialize)(moved, state, KEY)
    old = method.factors(state)["dense/kernel"]
    blocks = moved["params"]["dense"]["kernel"].reshape(2, 4, 24)
    expected = jax.jit(dense_sparse.alternate, static_argnums=2)(blocks, old, NM(2, 4))
    np.testing.assert_allclose(found["dense"]["kernel"], dense_of(expected), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_array_equal(
        method.materialize(moved, after)[0]["dense"]["kernel"], found["dense"]["kernel"]
    )
    errors = [
        dense_sparse.relative_error(blocks, pair) for pair in (old, method.factors(after)["dense/kernel"])
    ]
    assert errors[1] < errors[0]


def test_the_gradient_is_that_of_the_factorised_weight():
    method, latent, state = started()

    def loss(params):
        return jnp.sum(jnp.sin(3 * params["dense"]["kernel"])) + jnp.sum(params["head"]["kernel"] ** 2)

    def through(latent):
        params = method.materialize(latent, state, KEY)[0]
        return loss(params), params

    found, params = jax.jit(jax.grad(through, has_aux=True))(latent)
    expected = jax.grad(loss)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found["params"], expected
    )
    found = found["params"]
    at_the_weight = 3 * jnp.cos(3 * latent["params"]["dense"]["kernel"])
    assert float(jnp.abs(found["dense"]["kernel"] - at_the_weight).max()) > 0.1


def test_enough_atoms_change_nothing():
    low_rank = {
        "dense": {"kernel": weights(8, 3) @ weights(3, 24), "bias": jnp.zeros(24)},
        "head": {"kernel": jnp.ones((24, 3))},
    }
    method = build_method(pattern="1:1", block=None, budget=1.0)
    latent, state = jax.jit(method.init)(KEY, low_rank)
    found = method.materialize(latent, state)[0]["dense"]["kernel"]
    np.testing.assert_allclose(found, low_rank["dense"]["kernel"], rtol=1e-3, atol=1e-5)


def test_deployed_as_dense_sparse_layers():
    setting = {key: value for key, value in SETTING.items() if key != "exclude"}
    x = weights(5, 8, seed=1)
    plain = models.build("mlp", 3, hidden=(24, 12))
    model = Parameterized(plain, build_method())
    variables = jax.jit(model.init)(KEY, x)
    params, masks = model.parameterization.deploy(variables["params"], variables["parameterization"])
    deployed = models.build("mlp", 3, hidden=(24, 12), linear={"name": "dense_sparse", **setting})
    fresh = jax.eval_shape(deployed.init, KEY, x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    np.testing.assert_allclose(
        jax.jit(deployed.apply)({"params": params}, x),
        jax.jit(model.apply)(variables, x),
        rtol=1e-4,
        atol=1e-4,
    )
    # Half of every S: the cost of a layer is that of D and of the kept half.
    kept = densities(masks)
    assert kept == {"dense_0/sparse_kernel": 0.5, "dense_1/sparse_kernel": 0.5}
    macs = flops.layer_macs(deployed, {"params": params}, x)
    assert flops.inference_flops(macs, kept) == 2 * (8 * 4 + 8 * 12 + 24 * 4 + 24 * 6 + 12 * 3)
    # 2:4 codes store four flags for each two values.
    stored = model.parameterization.stored_values(plain.init(KEY, x)["params"])
    assert stored == (8 + 24) * 4 + (2 * 24 + 6 * 12) * (2 + 4 / 32) + 24 + 12 + 3 + 36


def test_only_kernels_are_deployed():
    method = build_method(include=("*embedding",), exclude=())
    latent, state = method.init(KEY, {"embed": {"embedding": tree()["dense"]["kernel"]}})
    with pytest.raises(ValueError, match="only a layer's kernel can be deployed .*, got 'embed/embedding'"):
        method.deploy(latent, state)


def test_the_layer_equals_its_dense_twin_and_is_made_from_one():
    layer, x = nn.DenseSparse(24, budget=0.9, pattern="2:4", block=4), weights(3, 8)
    variables = jax.jit(layer.init)(KEY, x)
    dense = jax.jit(layer.to_dense)(variables)
    np.testing.assert_allclose(
        layer.apply(variables, x), nn.Dense(24).apply({"params": dense}, x), rtol=1e-4, atol=1e-5
    )
    assert np.count_nonzero(variables["params"]["sparse_kernel"]) == 8 * 24 / 2
    wide = jax.jit(nn.DenseSparse(512).init)(KEY, jnp.ones((1, 512)))
    kernel = nn.DenseSparse(512).to_dense(wide)["kernel"]
    assert float(jnp.var(kernel)) * 512 == pytest.approx(1.0, rel=0.2)
    again = jax.jit(layer.from_dense)(dense)
    norms = [jnp.linalg.norm(again["dense_kernel"], axis=1), jnp.linalg.norm(again["sparse_kernel"], axis=2)]
    np.testing.assert_allclose(*(np.where(norms[1] > 0, norm, 0.0) for norm in norms), rtol=1e-4)
    np.testing.assert_allclose(
        layer.to_dense({"params": again})["kernel"], dense["kernel"], rtol=0.2, atol=0.2
    )


def test_a_few_training_steps_follow_the_task():
    model = Parameterized(models.build("mlp", 2, hidden=(24,)), build_method())
    x, y = weights(64, 8), jnp.asarray(np.random.default_rng(3).integers(0, 2, 64))
    variables, tx = jax.jit(model.init)(KEY, x), optax.adam(1e-2)
    moments = tx.init(variables["params"])

    @jax.jit
    def step(variables, moments):
        def loss(params):
            outputs, updated = model.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["parameterization", "losses"],
                rngs={"sample": KEY},
            )
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = tx.update(grads, moments, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "parameterization": updated["parameterization"]}, moments, value

    losses = []
    for _ in range(30):
        variables, moments, value = step(variables, moments)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    evaluated = optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, x), y).mean()
    assert float(evaluated) == pytest.approx(losses[-1], abs=0.05)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"pattern": "unstructured"}, "dsformer needs an N:M pattern along axis -2 .*, got Unstructured"),
        ({"pattern": NM(2, 4, axis=-1)}, "dsformer needs an N:M pattern along axis -2 .*axis=-1"),
        ({"iterations": 0}, "dsformer needs at least one alternation, got iterations=0"),
        ({"block": 5}, "block=5 must be an integer that divides the 8 rows of dense/kernel"),
        ({"budget": 0.2}, r"budget=0.2 is too small for dense/kernel of shape \(8, 24\)"),
        ({"ranks": 3}, "unknown keyword of parameterization 'dsformer' 'ranks'"),
    ],
)
def test_bad_settings_are_one_sentence(keywords, message):
    with pytest.raises(ValueError, match=message):
        build_method(**keywords).init(KEY, tree())
