"""Products of sparse matrices against scipy, kernels interpreted and lowered, gradients against autodiff."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from kernel_checks import assert_close, assert_lowers, running

from pallas_kernels import spgemm, spgemm_plan
from pallas_kernels.spgemm import bench, reference, tiles
from pallas_kernels.spgemm.symbolic import coordinates

KERNELS = {
    name: importlib.import_module(f"pallas_kernels.spgemm.{name}") for name in ("pallas_gpu", "pallas_tpu")
}


def factors(rows, inner, columns, density=0.3, seed=0):
    """Two scipy matrices; the first row of one and the last of the other are empty."""
    rng = np.random.default_rng(seed)
    a, b = (
        rng.normal(size=shape) * (rng.random(shape) < density) for shape in ((rows, inner), (inner, columns))
    )
    if rows > 1:
        a[0] = 0
    if inner > 1:
        b[-1] = 0
    return scipy.sparse.csr_array(a.astype(np.float32)), scipy.sparse.csr_array(b.astype(np.float32))


def arrays(matrix, dtype=jnp.float32):
    return jnp.asarray(matrix.data, dtype), *(
        jnp.asarray(part, jnp.int32) for part in (matrix.indices, matrix.indptr)
    )


def check(found, expected, dtype="float32"):
    """The arrays of a CSR matrix are those of scipy's product, entry by entry; what lies beyond is zero."""
    expected.sort_indices()
    data, indices, indptr = (np.asarray(array) for array in found)
    np.testing.assert_array_equal(indptr, expected.indptr)
    np.testing.assert_array_equal(indices[: indptr[-1]], expected.indices)
    assert_close(data[: indptr[-1]], expected.data, dtype, 4)
    assert not data[indptr[-1] :].any()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("products", [None, 0, 2000])
def test_implementations(implementation, density, products):
    a, b = factors(9, 11, 7, density)
    plan = spgemm_plan(arrays(a), arrays(b), columns=7, capacity=70, products=products)
    assert products is None or plan.left.size == products
    for dtype in (jnp.float32, jnp.bfloat16):
        left, right = arrays(a, dtype), arrays(b, dtype)
        found = spgemm(left, right, columns=7, plan=plan, implementation=implementation)
        assert found[0].dtype == dtype
        rounded = [
            scipy.sparse.csr_array((np.asarray(each[0], np.float32), *map(np.asarray, each[1:])), like.shape)
            for each, like in ((left, a), (right, b))
        ]
        check(found, rounded[0] @ rounded[1], dtype)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_any_shape(rows, inner, columns, density, seed):
    a, b = factors(rows, inner, columns, density, seed)
    check(spgemm(arrays(a), arrays(b), columns=columns, products=216), a @ b)


def test_lists_are_arrays():
    found = spgemm(([1.0], [0], [0, 1]), ([2.0], [0], [0, 1]), columns=1)
    assert [array.tolist() for array in found] == [[2.0], [0], [0, 1]]


def test_cancelled_entries_stay():
    a = scipy.sparse.csr_array(np.asarray([[1.0, 1.0]], np.float32))
    b = scipy.sparse.csr_array(np.asarray([[1.0], [-1.0]], np.float32))
    data, indices, indptr = spgemm(arrays(a), arrays(b), columns=1)
    assert data.tolist() == [0] and indices.tolist() == [0] and indptr.tolist() == [0, 1]


def test_a_plan_is_found_under_jit():
    """The same plan as on the host, with padding; the result can be a factor again."""
    a, b = factors(6, 8, 5)
    exact = spgemm_plan(arrays(a), arrays(b), columns=5, capacity=25, products=200)
    compiled = jax.jit(lambda a, b: spgemm_plan(a, b, columns=5, capacity=25, products=200))
    found = compiled(arrays(a), arrays(b))
    for name, one, other in zip(found._fields, found, exact, strict=True):
        np.testing.assert_array_equal(one, other, name)
    c, _ = factors(5, 8, 1, seed=3)

    @jax.jit
    def chain(a, b, c):
        first = spgemm(a, b, columns=5, capacity=25, products=200)
        return spgemm(first, c, columns=8, capacity=45, products=200)

    check(chain(arrays(a), arrays(b), arrays(c)), a @ b @ c)


@pytest.mark.parametrize(("capacity", "products"), [(3, 200), (25, 4)])
def test_bounds_that_are_too_small_are_seen(capacity, products):
    a, b = factors(6, 8, 5)
    found = jax.jit(lambda a, b: spgemm(a, b, columns=5, capacity=capacity, products=products))
    assert found(arrays(a), arrays(b))[2][-1] > capacity


@pytest.mark.parametrize("products", [300, 0])  # with a list of products, and dense
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_equal_autodiff_of_the_dense_product(implementation, products):
    a, b = factors(6, 8, 5)
    left, right = arrays(a), arrays(b)
    plan = spgemm_plan(left, right, columns=5, products=products)
    places = [coordinates(*each) for each in (left[1:], right[1:], (plan.indices, plan.indptr))]

    def ours(x, y):
        data, _, _ = spgemm(
            (x, *left[1:]), (y, *right[1:]), columns=5, plan=plan, implementation=implementation
        )
        return jnp.sin(data).sum()

    def theirs(x, y):
        return jnp.sin(
            (reference.dense(x, places[0], (6, 8)) @ reference.dense(y, places[1], (8, 5)))[places[2]]
        ).sum()

    found, expected = (jax.grad(function, (0, 1))(left[0], right[0]) for function in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float32", 4)


def test_gradients_have_gradients():
    left, right = map(arrays, factors(3, 4, 3, 0.6))
    plan = spgemm_plan(left, right, columns=3, products=36)

    def product(x, y):
        return jnp.tanh(spgemm((x, *left[1:]), (y, *right[1:]), columns=3, plan=plan)[0])

    check_grads(product, (left[0], right[0]), order=2, modes=["rev"], atol=0.05, rtol=0.05)


def test_vmap():
    a, b = factors(6, 8, 5)
    left, right = arrays(a), arrays(b)
    plan = spgemm_plan(left, right, columns=5, products=300)
    scales = jnp.arange(1.0, 4)
    many = scales[:, None] * left[0]
    product = jax.vmap(lambda x: spgemm((x, *left[1:]), right, columns=5, plan=plan)[0])
    expected = spgemm(left, right, columns=5, plan=plan)[0]
    assert_close(product(many), scales[:, None] * expected, "float32", 4)


# Sizes that do not divide a tile, one row, several tiles.
SHAPES = [(1, 40, 20, 0.3), (130, 200, 150, 0.01), (20, 30, 10, 1.0)]
CASES = [(name, *shape) for name in KERNELS for shape in SHAPES]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "rows", "inner", "columns", "density"), CASES)
def test_kernels_equal_the_reference(name, rows, inner, columns, density, dtype):
    a, b = factors(rows, inner, columns, density)
    left, right = arrays(a, dtype), arrays(b, dtype)
    plan = spgemm_plan(left, right, columns=columns, products=0)
    places = tuple(coordinates(*each) for each in (left[1:], right[1:], (plan.indices, plan.indptr)))
    sizes = rows, inner, columns
    assert KERNELS[name].reason(sizes, dtype) is None
    with running(name):
        found = KERNELS[name].product(left[0], right[0], places, plan[2:], sizes)
    assert found.dtype == dtype
    assert_close(found, reference.product(left[0], right[0], places, plan[2:], sizes), dtype, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower_without_a_device(name, dtype):
    sizes = 130, 200, 150

    def product(x, y, x_place, y_place, place):
        places = tuple(tuple(each) for each in (x_place, y_place, place))
        return KERNELS[name].product(x, y, places, None, sizes)

    places = [((2, count), jnp.int32) for count in (70, 80, 90)]
    assert_lowers(name, product, ((70,), dtype), ((80,), dtype), *places)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_and_vmap_of_kernels(name, monkeypatch):
    left, right = map(arrays, factors(6, 8, 5))
    plan = spgemm_plan(left, right, columns=5, products=0)

    def total(x, y, name):
        found, _, _ = spgemm((x, *left[1:]), (y, *right[1:]), columns=5, plan=plan, implementation=name)
        return jnp.sin(found).sum()

    many = jnp.stack([left[0], 2 * left[0]])
    gradients = jax.vmap(jax.grad(total, (0, 1)), (0, None, None))
    with running(name, monkeypatch):
        found = gradients(many, right[0], name)
    for one, other in zip(found, gradients(many, right[0], "reference"), strict=True):
        assert_close(one, other, "float32", 4)


def test_tiles_without_entries_in_both_are_skipped():
    empty = jnp.zeros((2, 0), jnp.int32)
    x, y = jnp.asarray([[0, 5, 9], [3, 7, 1]]), jnp.asarray([[3, 7], [0, 5]])  # 9 is padding
    order, count = tiles.schedule((tuple(x), tuple(y), tuple(empty)), (6, 8, 6), (4, 4, 4))
    assert count.tolist() == [[1, 0], [0, 1]]  # Y's entries are in tiles (0, 0) and (1, 1)
    assert order[0, 0].tolist() == [0, 0] and order[1, 1].tolist() == [1, 1]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path[:0] = ["tests/pallas_kernels", "."]
from pallas_kernels import spgemm, spgemm_plan
from test_spgemm import arrays, factors

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
left, right = map(arrays, factors(16, 8, 8, 1.0))
for products in (1024, 0):
    plan = spgemm_plan(left, right, columns=8, products=products)
    total = lambda x, y: jnp.sin(spgemm((x, *left[1:]), (y, *right[1:]), columns=8, plan=plan)[0]).sum()
    gradients = jax.jit(jax.value_and_grad(total, (0, 1)))
    expected = gradients(left[0], right[0])
    sharded = [jax.device_put(each[0], NamedSharding(mesh, P("data"))) for each in (left, right)]
    for one, other in zip(jax.tree.leaves(gradients(*sharded)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
print("same")
"""


def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SHARDED)


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "message"),
    [
        ("pallas_gpu", (0, 4, 4), jnp.float32, "all sizes must be at least 1, got (0, 4, 4)"),
        (
            "pallas_gpu",
            (4, 4, 4),
            jnp.float64,
            "its operands must be bfloat16 or float16 or float32, got float64",
        ),
        (
            "pallas_tpu",
            (8192, 8192, 8192),
            jnp.float32,
            "at most 131072 products of tiles can be scheduled, got 262144",
        ),
        ("pallas_tpu", (4, 4, 4), jnp.float16, "its operands must be bfloat16 or float32, got float16"),
    ],
)
def test_shapes_that_kernels_cannot_run(name, sizes, dtype, message):
    assert KERNELS[name].reason(sizes, np.dtype(dtype)) == message


def test_bad_input():
    a, b = map(arrays, factors(6, 8, 5))
    plan = spgemm_plan(a, b, columns=5)

    def message(*args, **keywords):
        with pytest.raises(ValueError) as error:
            spgemm(*args, **keywords)
        return str(error.value)

    entries, products = plan.indices.size, int(np.diff(b[2])[a[1]].sum())
    assert message(a[:2], b, columns=5) == "a must be (data, indices, indptr), got 2 arrays"
    assert message(a, (b[0][1:], *b[1:]), columns=5).startswith(
        "data and indices of b must be vectors of one"
    )
    assert message((*a[:2], a[2][:1]), b, columns=5).startswith(
        "indptr of a must be a vector of one more than"
    )
    assert message((a[1], *a[1:]), b, columns=5) == "data of a must be floats, got int32"
    assert message((a[0], a[0], a[2]), b, columns=5).startswith(
        "indices and indptr of a must be integers, got"
    )
    assert message(a, b, columns=0) == "columns must be at least 1, got 0"
    wrong = b[1].at[3].set(5)
    assert (
        message(a, (b[0], wrong, b[2]), columns=5) == "the columns of b must be in [0, 5), got 5 at entry 3"
    )
    assert message(a, b, columns=5, capacity=2) == (
        f"capacity and products must be at least {entries} and {products}, got 2 and {plan.left.size}"
    )
    assert message(a, b, columns=5, plan=plan, capacity=9).startswith(
        "a plan has its own bounds, but capacity 9"
    )
    other = spgemm_plan(*map(arrays, factors(3, 8, 5)), columns=5)
    assert message(a, b, columns=5, plan=other) == "the plan must be for 6 rows, but it is for 3"
    with pytest.raises(
        ValueError, match="under jax.jit a plan needs its capacity and a number of products above 0"
    ):
        jax.jit(lambda a, b: spgemm(a, b, columns=5))(a, b)
    assert message(a, b, columns=5, implementation="pallas_tpu").startswith(
        "spgemm cannot run 'pallas_tpu' here: it needs a TPU, and JAX runs on"
    )
    assert message(a, b, columns=5, implementation="hash").startswith(
        "spgemm has no implementation 'hash' (known: "
    )


@pytest.mark.slow
def test_the_bench_agrees_with_dense():
    for case in bench.cases(24):
        result = bench.run(case, repeats=1)
        assert result["max_error"] < 1e-5, result
    data, indices, indptr = bench.csr(np.random.default_rng(0), 16, 0.25, band=True)
    assert data.size == indices.size == indptr[-1] and np.diff(indptr).max() == 3
