"""Which implementation runs, on devices that are not here, and that the operations do not care how arrays are sharded."""

import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch

REASONS = {"pallas_gpu": "it needs a GPU", "xla": None, "reference": None}


def test_the_first_that_can_run_is_picked():
    assert dispatch.pick("op", None, REASONS) == "xla"
    assert dispatch.pick("op", None, REASONS | {"pallas_gpu": None}) == "pallas_gpu"
    assert dispatch.pick("op", "reference", REASONS) == "reference"
    assert set(REASONS) <= set(dispatch.IMPLEMENTATIONS)


def test_naming_one_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="^op cannot run 'pallas_gpu' here: it needs a GPU$"):
        dispatch.pick("op", "pallas_gpu", REASONS)
    with pytest.raises(
        ValueError, match=r"^op has no implementation 'fast' \(known: pallas_gpu, xla, reference\)$"
    ):
        dispatch.pick("op", "fast", REASONS)


def test_gradients_take_another_one_where_the_named_one_cannot_run():
    assert dispatch.prefer("reference", REASONS) == "reference"
    assert dispatch.prefer("pallas_gpu", REASONS) == dispatch.prefer("triton", REASONS) == "xla"
    assert dispatch.prefer(None, REASONS) == "xla"


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [
        ("cpu", None, "it needs an NVIDIA GPU, and JAX runs on cpu"),
        ("gpu", "9.0", None),
        ("gpu", "8.0", "it needs a GPU of compute capability 9.x or 10.x, and this one has 8.0"),
        ("gpu", None, "it needs a GPU of compute capability 9.x or 10.x, and this one has none"),
    ],
)
def test_reasons_of_gpus(backend, capability, expected, monkeypatch):
    device = types.SimpleNamespace(**({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert dispatch.gpu_reason(9, 10) == expected


def test_kernels_are_for_the_device_of_the_operand_or_the_default_one(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda **_: [types.SimpleNamespace(compute_capability="9.0")])
    (cpu,) = jnp.zeros(()).devices()
    assert dispatch.gpu_reason(9, at=jnp.zeros(())) is dispatch.gpu_reason(9) is None
    expected = "it needs an NVIDIA GPU, and JAX runs on cpu"
    assert dispatch.gpu_reason(9, at=jax.device_put(jnp.zeros(()), cpu)) == expected
    with jax.default_device(cpu):
        assert dispatch.gpu_reason(9) == dispatch.gpu_reason(9, at=jnp.zeros(())) == expected


def test_reasons_of_tpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.tpu_reason() == "it needs a TPU, and JAX runs on gpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert dispatch.tpu_reason() is None


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path[:0] = ["tests/pallas_kernels", "."]
import pallas_kernels
from test_block_sparse_matmul import operands
from test_nm_matmul import make

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

def check(function, arrays, specs):
    expected = jax.jit(function)(*arrays)
    placed = [jax.device_put(array, NamedSharding(mesh, P(*spec))) for array, spec in zip(arrays, specs)]
    for one, other in zip(jax.tree.leaves(jax.jit(function)(*placed)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

def with_gradients(function):
    return lambda a, b, *rest: jax.value_and_grad(lambda a, b: jnp.sin(function(a, b, *rest)).sum(), (0, 1))(a, b)

x, _, blocks, indices = operands(8, (4, 6), jnp.float32)
product = lambda x, blocks, indices: pallas_kernels.block_sparse_matmul(x, blocks, indices, rows=12)
check(with_gradients(product), (x, blocks, indices), [("data", "model"), ("model",), ("model",)])
_, values, packed = make(2, 4, 4, 6)
x = jax.random.normal(jax.random.key(0), (8, 16))
product = lambda x, values, packed: pallas_kernels.nm_matmul(x, values, packed, n=2, m=4)
check(with_gradients(product), (x, values, packed), [("data", None), (None, "model"), (None, "model")])
a, b = jax.random.normal(jax.random.key(1), (16, 8)), jax.random.normal(jax.random.key(2), (8, 16))
rows, cols = jnp.arange(8) * 2, jnp.arange(8)[::-1]
check(with_gradients(pallas_kernels.sampled_matmul), (a, b, rows, cols), [("data",), (None, "model"), ("data",), ("data",)])
blocks = lambda a, b, indices: pallas_kernels.block_sampled_matmul(a, b, indices, (8, 4))
check(with_gradients(blocks), (a, b, jnp.asarray([[0], [1], [-1], [0]])), [("data",), (None, "model"), ()])
"""

# XLA's implementations in the place of kernels: the partitioner cannot look into these either.
SHARDED_KERNELS = SHARDED.replace(
    "assert jax.device_count() == 8",
    """
from pallas_kernels import dispatch
module = dispatch.module
dispatch.module = lambda op, name: module(op, "xla" if name == "pallas_tpu" else name)
dispatch.pick = lambda *args: "pallas_tpu"
dispatch.prefer = lambda *args: "pallas_tpu"
""",
)
ROWS_STAY = """
x, values, packed = jnp.ones((8, 16)), jnp.ones((8, 6)), jnp.zeros((2, 6), jnp.uint8)
x = jax.device_put(x, NamedSharding(mesh, P("data")))
product = jax.jit(lambda x: pallas_kernels.nm_matmul(x, values, packed, n=2, m=4))
assert "all-gather" not in product.lower(x).compile().as_text() and product(x).sharding.spec == P("data")
"""


# The axes of such a mesh are explicit.
MADE = 'jax.make_mesh((4, 2), ("data", "model"))'
SHARDED_EXPLICIT = SHARDED.replace('Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))', MADE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [SHARDED, SHARDED_EXPLICIT, SHARDED_KERNELS + ROWS_STAY],
    ids=["xla", "explicit axes", "kernels"],
)
def test_sharded_equals_unsharded(program, assert_prints_same):
    assert_prints_same(program + "print('same')")
