"""Selection and every transform give the same masks on eight (virtual) devices as on one."""

import pytest

SELECTION = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sparsejax import scores
from sparsejax.selection import global_top_k_masks, top_k_mask

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

def shard(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

for seed, shape, specs in [
    (0, (64, 48), [("data", "model"), (None, "model"), (("data", "model"),), ("model", "data")]),
    (1, (8, 3, 20), [("data", None, "model"), ("model",)]),
]:
    values = jax.random.normal(jax.random.key(seed), shape).round(1)  # many ties
    for spec in specs:
        sharded = shard(values, *spec)
        for k in (1, 77, values.size // 2):
            assert (top_k_mask(sharded, k) == top_k_mask(values, k)).all(), (shape, spec, k)
        for axis in range(len(shape)):
            assert (top_k_mask(sharded, 2, axis) == top_k_mask(values, 2, axis)).all(), (shape, spec, axis)
tree = {"a": jax.random.normal(jax.random.key(2), (16, 40)).round(1), "b": jax.random.normal(jax.random.key(3), (24, 8)).round(1)}
sharded = {"a": shard(tree["a"], "data", "model"), "b": shard(tree["b"], None, ("data", "model"))}
for k in (5, 300):
    one, many = global_top_k_masks(tree, k), global_top_k_masks(sharded, k)
    assert all((one[name] == many[name]).all() for name in tree) and sum(int(m.sum()) for m in many.values()) == k
random = jax.jit(scores.random, out_shardings=NamedSharding(mesh, P("data", "model")))
assert (random(jax.random.key(5), {"k": tree["a"]})["k"] == scores.random(jax.random.key(5), {"k": tree["a"]})["k"]).all()
wide = shard(jax.random.normal(jax.random.key(4), (64, 512)), "data", "model")
text = jax.jit(top_k_mask).lower(wide, 5).compile().as_text()
assert "all-reduce" in text and "all-gather" not in text, "a pass is one all-reduce of a count"
print("same")
"""

TRANSFORMS = """
import sys
import jax, numpy as np, optax, sparsejax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests/transforms")
import test_contract as contract

mesh = Mesh(np.array(jax.devices()[:4]), ("model",))

def spread(tree):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("model") if x.ndim == 2 else P())), tree)

def final_masks(tx, place):
    params = contract.make_params()
    state, params = place(tx.init(params)), place(params)
    step = jax.jit(tx.update)
    for index in range(contract.STEPS):
        updates, state = step(place(contract.make_grads(params, index)), state, params)
        params = optax.apply_updates(params, updates)
    return sparsejax.get_masks(state)

for name in contract.SPARSE:
    for pattern in ("unstructured", "nm", "block") if name == "rigl" else ("unstructured",):
        tx = contract.build(name, pattern, inner=optax.sgd(0.5))
        one, many = final_masks(tx, lambda tree: tree), final_masks(tx, spread)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, many))), (name, pattern)
print("same")
"""


@pytest.mark.parametrize(
    "script", [SELECTION, pytest.param(TRANSFORMS, marks=pytest.mark.slow)], ids=["selection", "transforms"]
)
def test_sharded_equals_unsharded(script, assert_prints_same):
    assert_prints_same(script)
