"""Operations and their gradients on meshes whose axes are explicit, as `jax.make_mesh` has them, and in `jax.shard_map`."""

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, pallas_kernels
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import sparse_decode_attention

auto = jax.make_mesh((2,), "d", axis_types=(AxisType.Auto,))
explicit = jax.make_mesh((2,), "d", axis_types=(AxisType.Explicit,))
draw = np.random.default_rng(0)
def normal(*shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)

def check(function, arrays, specs, floats=2):
    def run(function, arrays):
        def loss(*arrays):
            out = function(*arrays)
            return jnp.sin(out).sum(), out
        return jax.jit(jax.grad(loss, tuple(range(floats)), has_aux=True))(*arrays)

    expected = run(function, arrays)
    specs = [P(*spec) for spec in specs]
    if WHERE == "shard_map":
        found = run(jax.shard_map(function, mesh=auto, in_specs=tuple(specs), out_specs=P("d")), arrays)
    else:
        placed = [jax.device_put(array, NamedSharding(explicit, spec)) for array, spec in zip(arrays, specs)]
        found = run(function, placed)
        for out in (found[1], function(*placed)):
            assert out.sharding.spec[0] == "d" and not any(out.sharding.spec[1:]), out.sharding
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

x = normal(4, 8)
check(lambda *args: pallas_kernels.block_sparse_matmul(*args, rows=8), (x, normal(2, 1, 4, 4), jnp.asarray([[0], [1]])), [("d",), (), ()])
check(lambda *args: pallas_kernels.nm_matmul(*args, n=2, m=4), (x, normal(4, 4), jnp.full((1, 4), 0x44, jnp.uint8)), [("d",), (), ()])
check(pallas_kernels.csr_matmul, (x, normal(3), jnp.asarray([0, 1, 0]), jnp.asarray([0, 1, 3])), [("d",), (), (), ()])
a, b, at = normal(64, 8), normal(8, 64), jnp.arange(2)
check(pallas_kernels.sampled_matmul, (a, b, at, at + 2), [(), (), ("d",), ("d",)])
blocks = lambda *args: pallas_kernels.block_sampled_matmul(*args, (32, 16))
check(blocks, (a, b, jnp.asarray([[0], [1], [0], [1]])), [(), (None, "d"), ("d",)])
check(lambda *args: pallas_kernels.sparse_conv(*args, features=4), (normal(2, 3, 3, 3), normal(2, 1, 2), jnp.asarray([[0], [1]])), [("d",), (), ()])
packed = pallas_kernels.pack_pattern(normal(2, 2, 3, 2))
pattern = lambda *args: pallas_kernels.pattern_conv(*args, kernel_size=(2, 2), features=2)
check(pattern, (normal(2, 3, 3, 3), *packed), [("d",), (), (), ()])
attention = lambda *args: pallas_kernels.block_sparse_attention(*args, block_q=4, block_k=4)
check(attention, (normal(2, 8, 2, 4), normal(2, 8, 1, 4), normal(2, 8, 1, 4), jnp.ones((2, 2), bool)), [("d",)] * 3 + [()], 3)
pages = lambda *args: sparse_decode_attention.paged(*args)[0]
table, lengths = jnp.asarray([[0, 1], [2, -1]], jnp.int32), jnp.asarray([6, 3], jnp.int32)
check(pages, (normal(2, 2, 4), normal(3, 4, 1, 4), normal(3, 4, 1, 4), table, lengths), [("d",), (), (), ("d",), ("d",)], 3)
check(pallas_kernels.softmax, (x,), [("d",)], 1)
if WHERE == "shard_map":
    indices, indptr = np.asarray([1, 0]), np.asarray([0, 1, 2])
    product = lambda x, y: pallas_kernels.spgemm((x[0], indices, indptr), (y, indices, indptr), columns=2)[0]
    check(lambda x, y: jax.lax.map(lambda row: product(row[None], y), x), (normal(2, 2), normal(2)), [("d",), ()])
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["shard_map", "explicit axes"])
def test_equal_to_one_device(where, assert_prints_same):
    assert_prints_same(f"WHERE = {where!r}\n" + PROGRAM, devices=2)
