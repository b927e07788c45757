"""Conversion of whole models between dense and factorised layers: the same function before and after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax import models, nn
from sparsejax.masks import flatten

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
KEY = jax.random.key(7)
SPECS = {
    "monarch": {"name": "monarch", "blocks": 2},
    "low_rank": {"name": "low_rank", "rank": 4},
    "sparse_low_rank": {"name": "sparse_low_rank", "rank": 4, "density": 0.5},
}


def network(spec, seed=0):
    model = models.build("mlp", 3, hidden=(12, 8), **({"linear": spec} if spec else {}))
    return model, jax.jit(lambda: model.init(jax.random.key(seed), X))()


@pytest.mark.parametrize("name", SPECS)
def test_to_dense_computes_the_same(name):
    model, variables = network(SPECS[name])
    params = nn.to_dense(model, variables, X)
    dense, fresh = network(None)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh["params"])
    expected = jax.jit(model.apply)(variables, X)
    assert float(jnp.abs(expected).max()) > 1e-3
    np.testing.assert_allclose(dense.apply({"params": params}, X), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["monarch", "low_rank"])
def test_there_and_back_again(name):
    model, variables = network(SPECS[name])
    again = nn.from_dense(model, nn.to_dense(model, variables, X), X)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables["params"])
    expected = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(model.apply({"params": again}, X), expected, rtol=1e-3, atol=1e-5)


def test_convert_shares_multiplies_out_and_projects():
    monarch, trained = network(SPECS["monarch"])
    same = nn.convert(monarch, trained, monarch, KEY, X)
    jax.tree.map(np.testing.assert_array_equal, same, trained)

    lean, own = network({"name": "sparse_low_rank", "rank": 2, "alpha": 32, "density": 0.1})
    other, _ = network({"name": "sparse_low_rank", "rank": 2, "alpha": 2, "density": 0.1})
    with pytest.raises(ValueError, match="dense_0 cannot be made from a dense layer: SparseLowRank"):
        nn.convert(lean, own, other, KEY, X)  # of the same shapes, but another function

    found = nn.convert(monarch, trained, network(None)[0], KEY, X)
    jax.tree.map(np.testing.assert_array_equal, found["params"], nn.to_dense(monarch, trained, X))

    found = nn.convert(monarch, trained, network({"name": "low_rank", "rank": 2})[0], KEY, X)
    kernel = nn.to_dense(monarch, trained, X)["dense_0"]["kernel"]
    down, up = (found["params"]["dense_0"][f"{name}_kernel"] for name in ("down", "up"))
    left, values, right = np.linalg.svd(kernel)
    np.testing.assert_allclose(down @ up, left[:, :2] * values[:2] @ right[:2], rtol=1e-3, atol=1e-5)
    assert found["params"]["head"] is trained["params"]["head"]


def test_collections_follow_where_they_fit():
    class Net(linen.Module):
        spec: dict

        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True)(x)
            return nn.linear(dict(self.spec), 4, name="linear")(x)

    source, target = Net(SPECS["sparse_low_rank"]), Net({"name": "monarch", "blocks": 2})
    variables = jax.jit(source.init)(KEY, X)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 1.0, variables["batch_stats"])
    found = nn.convert(source, variables, target, KEY, X)
    assert found.keys() == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], variables["batch_stats"])


def test_bad_conversions_name_the_leaf():
    dense, variables = network(None)
    sparse, _ = network(SPECS["sparse_low_rank"])
    with pytest.raises(ValueError, match="dense_0 cannot be made from a dense layer: SparseLowRank has no"):
        nn.convert(dense, variables, sparse, KEY, X)
    monarch, _ = network(SPECS["monarch"])
    with pytest.raises(ValueError, match="the dense parameters have no leaf 'dense_0/kernel'"):
        nn.from_dense(monarch, {"head": variables["params"]["head"]}, X)


def test_a_transformer_takes_structured_projections():
    model = models.build("transformer", 16, depth=1, width=16, heads=2, linear=SPECS["monarch"])
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    for layer in ("attention/query", "attention/out", "mlp/up", "mlp/down"):
        assert f"block_0/{layer}/first_kernel" in flatten(params)
    assert params["head"]["kernel"].shape == (16, 16)
