"""The runner gives the same masks on eight (virtual) devices as on one."""

import pytest

SCRIPT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sparsejax import compress
from sparsejax.models.transformer import Transformer

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
model = Transformer(classes=32, depth=2, width=16, heads=4, hidden=32, max_length=24)
tokens = np.asarray(jax.random.randint(jax.random.key(0), (8, 20), 0, 32))
params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
many = {
    "params": jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "model"))), params),
    "tokens": jax.device_put(tokens, NamedSharding(mesh, P("data"))),
}
for method in (compress.wanda(), compress.sparsegpt()):
    one = compress.prune_layers(method, model, params, tokens, 0.5, batch=4)
    other = compress.prune_layers(method, model, many["params"], many["tokens"], 0.5, batch=4)
    for (path, a), b in zip(jax.tree.leaves_with_path(one.masks), jax.tree.leaves(other.masks), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all(), (method.name, path)
    for old, new in zip(jax.tree.leaves(many["params"]), jax.tree.leaves(other.params), strict=True):
        assert new.sharding == old.sharding
    np.testing.assert_allclose(
        compress.perplexity(model, other.params, many["tokens"], 4)["loss"],
        compress.perplexity(model, one.params, tokens, 4)["loss"], rtol=1e-5)
try:
    compress.prune_layers(compress.wanda(), model, params, many["tokens"], 0.5, batch=6)
except ValueError as error:
    assert "sharded 4 ways, which does not divide a batch of" in str(error), error
else:
    raise AssertionError("batches that the shards do not divide")
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SCRIPT)
