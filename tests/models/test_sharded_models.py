"""Transformers whose parameters and batch lie on eight (virtual) devices give the outputs of one."""

import pytest

SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests/models")
import test_encoder, test_transformer
from sparsejax.models import generate
from sparsejax.training.mesh import batch_placer, build_mesh, param_spec

assert jax.device_count() == 8
mesh = build_mesh("data:2,model:4")
put = batch_placer(mesh)

def spread(params):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, param_spec(x.shape, 4))), params)

def check(model, params, tokens):
    many = spread(params)
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(many)) > len(jax.tree.leaves(many)) // 2
    run = jax.jit(model.apply)
    np.testing.assert_allclose(run({"params": many}, put(tokens)), run({"params": params}, tokens), rtol=1e-4, atol=1e-4)
    return many

tokens = np.tile(test_transformer.TOKENS, (4, 1))
for family in ("gpt2", "mixtral"):
    model, params = test_transformer.start(**{**test_transformer.FAMILIES[family], "experts": 4 * (family == "mixtral")})
    many = check(model, params, tokens)
found, expected = (generate(model, p, t, 2) for p, t in ((many, put(tokens)), (params, tokens)))
assert (found == expected).all()
model, params = test_encoder.start(5, pool="mean", pooler=True, pad=4)
check(model, params, np.tile(test_encoder.TOKENS, (4, 1)))
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SCRIPT)
