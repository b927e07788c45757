"""One contract for all packed formats: exact round trips, pytrees, transformations, gradients, bytes, bad input.

A new format joins by a line in `CASES`.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from sparsejax import formats

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, 6e-8, -2.25])


def nm_mask(n, m):
    def mask(rng, shape):
        scores = rng.random((*shape[:-2], shape[-2] // m, m, shape[-1]))
        return (scores.argsort(axis=-2).argsort(axis=-2) < n).reshape(shape)

    return mask


def block_mask(bk, bn):
    def mask(rng, shape):
        grid = rng.random((*shape[:-2], (shape[-2:-1] or (1,))[0] // bk, shape[-1] // bn)) < 0.3
        return grid.repeat(bk, axis=-2).repeat(bn, axis=-1).reshape(shape)

    return mask


def free_mask(rng, shape):
    return rng.random(shape) < 0.2


# format -> (a random mask of its pattern, shapes it can hold)
CASES = {
    "2:4": (nm_mask(2, 4), [(16, 6), (4, 5), (8, 1), (2, 3, 8, 4)]),
    "1:8": (nm_mask(1, 8), [(16, 6), (8, 5), (40, 1), (3, 3, 8, 2)]),
    "5:16": (nm_mask(5, 16), [(48, 3)]),
    "1:2": (nm_mask(1, 2), [(6, 3), (2, 4)]),
    "block:4x8": (block_mask(4, 8), [(16, 24), (4, 24), (16, 8), (3, 2, 8, 16)]),
    "block:1x3": (block_mask(1, 3), [(1, 9), (9,), (5, 3)]),
    "bitmap": (free_mask, [(16, 6), (1, 21), (21, 1), (13,), (3, 3, 5, 4)]),
    "csr": (free_mask, [(16, 6), (1, 21), (21, 1), (13,), (3, 3, 5, 4)]),
}
GRID = [(format, shape) for format, (_, shapes) in CASES.items() for shape in shapes]
FIRST = [(format, shapes[0]) for format, (_, shapes) in CASES.items()]


def weight(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def example(format, shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    mask = CASES[format][0](rng, shape)
    w = weight(rng, shape, dtype)
    return w, mask, formats.pack(w, mask, format)


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind in "fV" else array


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(bits(a), bits(b))


def assert_holds(packed, w, mask):
    """`packed` holds exactly these weights and this mask."""
    mask = np.asarray(mask)
    assert packed.shape == w.shape and packed.dtype == w.dtype
    assert (packed.ndim, packed.size) == (w.ndim, w.size)
    dense, kept = _opened(packed)
    assert_same_bits(dense, np.where(mask, np.asarray(w), np.zeros((), w.dtype)))
    assert_same_bits(kept, mask)
    packed.check()


@jax.jit
def _opened(packed):
    return packed.to_dense(), packed.mask()


@pytest.mark.parametrize(
    ("format", "shape", "dtype"),
    [(*case, jnp.float32) for case in GRID] + [(*case, dtype) for case in FIRST for dtype in DTYPES[1:]],
)
def test_round_trip_is_exact(format, shape, dtype):
    w, mask, packed = example(format, shape, dtype)
    assert packed.format == format
    assert_holds(packed, w, mask)
    # kept zeros of either sign, infinities, NaN and denormals are weights like others
    w = jnp.asarray(np.resize(SPECIAL, shape), dtype)
    assert_holds(formats.pack(w, mask, format), w, mask)


@pytest.mark.parametrize(("format", "shape"), FIRST)
def test_jit_equals_no_jit(format, shape):
    w, mask, packed = example(format, shape)
    dense, kept, again = jax.jit(lambda p: (p.to_dense(), p.mask(), p))(packed)
    assert_same_bits(dense, packed.to_dense())
    assert_same_bits(kept, mask)
    chex.assert_trees_all_equal(again, packed)
    assert repr(again) == repr(packed) == f"{type(packed).__name__}({format}, float32{list(shape)})"


@pytest.mark.parametrize(("format", "shape"), FIRST)
def test_pytree(format, shape):
    w, mask, packed = example(format, shape)
    leaves, structure = jax.tree.flatten(packed)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert_holds(jax.tree.unflatten(structure, leaves), w, mask)
    # the pattern belongs to the structure, which jit hashes and compares
    same = example(format, shape)[2]
    assert jax.tree.structure(same) == structure and hash(jax.tree.structure(same)) == hash(structure)
    assert packed.data is getattr(packed, packed.DATA)
    assert_holds(packed.with_data(packed.data * 2), w * 2, mask)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf is packed.data else leaf, packed)
    assert_holds(half, w.astype(jnp.bfloat16), mask)
    shapes = jax.eval_shape(lambda p: p, packed)
    assert shapes.nbytes == packed.nbytes and shapes.dtype == packed.dtype
    assert "?" in repr(jax.tree.map(lambda leaf: None, packed))


@pytest.mark.parametrize(("format", "shape"), FIRST)
def test_bytes_are_those_of_the_arrays(format, shape):
    for dtype in DTYPES:
        w, _, packed = example(format, shape, dtype)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(packed)]
        assert packed.nbytes == sum(leaf.nbytes for leaf in leaves)
        assert packed.compression_ratio == np.asarray(w).nbytes / packed.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "shape", "batch"),
    [(*case, (3,)) for case in GRID] + [(*case, batch) for case in FIRST for batch in ((), (2, 40))],
)
def test_matmul_and_its_gradients(format, shape, batch):
    w, mask, packed = example(format, shape)
    k, n = packed.matrix_shape
    x = weight(np.random.default_rng(1), (*batch, k))
    cotangent = weight(np.random.default_rng(2), (*batch, n))

    def dense_loss(x, w):
        return jnp.vdot(x @ jnp.where(mask, w, 0).reshape(k, n), cotangent)

    @jax.jit
    def packed_loss(x, data):
        return jnp.vdot(formats.matmul(x, packed.with_data(data)), cotangent)

    y = formats.matmul(x, packed)
    assert y.shape == (*batch, n) and y.dtype == jnp.float32
    chex.assert_trees_all_close(y, x @ jnp.where(mask, w, 0).reshape(k, n), atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(jax.jit(formats.matmul)(x, packed), y, atol=1e-5, rtol=1e-5)
    dx, dw = jax.grad(dense_loss, (0, 1))(x, w)
    found_dx, found_data = jax.grad(packed_loss, (0, 1))(x, packed.data)
    chex.assert_trees_all_close(found_dx, dx, atol=1e-5, rtol=1e-5)
    # the gradient of the stored weights is the dense one where they are; padding of blocks may hold anything
    chex.assert_trees_all_close(packed.with_data(found_data).to_dense(), dw * mask, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("format", CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_in_half_precision(format, dtype):
    w, mask, packed = example(format, CASES[format][1][0], dtype)
    k, n = packed.matrix_shape
    dense = np.where(mask, np.asarray(w, np.float64), 0).reshape(k, n)
    for rows in (1, 200):
        x = weight(np.random.default_rng(3), (rows, k), dtype)
        y = formats.matmul(x, packed)
        assert y.dtype == dtype and formats.matmul(x.astype(jnp.float32), packed).dtype == jnp.float32
        exact = np.asarray(x, np.float64) @ dense
        # rounded once, at the end: within an ulp of the exact product
        np.testing.assert_allclose(
            np.asarray(y, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("format", CASES)
def test_vmap(format):
    w, mask, packed = example(format, CASES[format][1][0])
    k, _ = packed.matrix_shape
    x = weight(np.random.default_rng(4), (5, k))
    each = jax.vmap(formats.matmul, (0, None))(x, packed)
    chex.assert_trees_all_close(each, formats.matmul(x, packed), atol=1e-5)
    # formats of one structure stack, leaf by leaf
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, packed.with_data(-packed.data))
    np.testing.assert_array_equal(jax.vmap(lambda p: p.to_dense())(stack)[1], -packed.to_dense())
    many = jax.vmap(formats.matmul, (None, 0))(x, stack)
    chex.assert_trees_all_close(many[1], -formats.matmul(x, packed), atol=1e-5)


@pytest.mark.parametrize(("format", "shape"), GRID)
def test_all_kept(format, shape):
    w = weight(np.random.default_rng(5), shape)
    if not re.fullmatch(r"\d+:\d+", format):
        assert_holds(formats.pack(w, np.ones(shape, bool), format), w, np.ones(shape, bool))
        return
    m = format.split(":")[1]
    assert_holds(formats.pack(w, np.ones(shape, bool), f"{m}:{m}"), w, np.ones(shape, bool))
    message = f"{format} along axis -2: the {m} weights from {(0,) * len(shape)} keep {m}"
    with pytest.raises(ValueError, match=re.escape(message)):
        formats.pack(w, np.ones(shape, bool), format, name="head/kernel")


@pytest.mark.parametrize(("format", "shape"), GRID)
def test_none_kept(format, shape):
    w, nothing = weight(np.random.default_rng(6), shape), np.zeros(shape, bool)
    if re.fullmatch(r"\d+:\d+", format):
        with pytest.raises(ValueError, match=f"weight is not {format} along axis -2: .* keep 0$"):
            formats.pack(w, nothing, format)
        return
    packed = formats.pack(w, nothing, format)
    assert_holds(packed, w, nothing)
    x = weight(np.random.default_rng(7), (3, packed.matrix_shape[0]))
    y, pull = jax.vjp(lambda x, data: formats.matmul(x, packed.with_data(data)), x, packed.data)
    assert not y.any() and not any(d.any() for d in pull(y + 1)[:1])


@pytest.mark.parametrize("format", CASES)
def test_soft_masks_scale(format):
    w, mask, _ = example(format, CASES[format][1][0])
    soft = jnp.asarray(mask * np.linspace(0.25, 1, mask.size).reshape(mask.shape), jnp.float32)
    packed = formats.pack(w, soft, format)
    assert_holds(packed, sparsejax.apply_masks(w, soft), mask)


@pytest.mark.parametrize("format", CASES)
def test_numpy_sees_the_dense_array(format):
    _, _, packed = example(format, CASES[format][1][0])
    found = np.asarray(packed)
    assert found.dtype == packed.dtype
    np.testing.assert_array_equal(found, packed.to_dense())
    assert np.array(packed, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="is packed, so that its dense array is a copy$"):
        np.asarray(packed, copy=False)


@pytest.mark.parametrize("format", CASES)
def test_integers_are_no_weights(format):
    w, mask, _ = example(format, CASES[format][1][0])
    packed = formats.pack(jnp.ones(w.shape, jnp.int8), mask, format)
    with pytest.raises(
        ValueError, match="^packed weights must be floats to be multiplied, but those of .* are int8$"
    ):
        formats.matmul(jnp.ones((2, packed.matrix_shape[0])), packed)


@pytest.mark.parametrize("format", CASES)
def test_bad_input(format):
    w, mask, packed = example(format, CASES[format][1][0])
    message = f"the mask of a/kernel has shape (3,), but it must be of the weight's shape {w.shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        formats.pack(w, mask.ravel()[:3], format, name="a/kernel")
    with pytest.raises(
        ValueError, match=r"a/kernel of shape \(0, 4\) holds nothing that a format could pack"
    ):
        formats.pack(jnp.zeros((0, 4)), np.zeros((0, 4), bool), format, name="a/kernel")
    huge = np.broadcast_to(np.float16(1), (2**16, 2**15))
    with pytest.raises(
        ValueError, match="weight has 2147483648 entries, but formats hold at most 2147483647"
    ):
        formats.pack(huge, np.broadcast_to(True, huge.shape), format)
    message = f"x of shape (2, 7) does not fit a weight of shape {w.shape}: the last axis of x must be"
    with pytest.raises(ValueError, match=re.escape(message)):
        formats.matmul(jnp.ones((2, 7)), packed)
    with pytest.raises(ValueError, match=r"(data|inputs|values|blocks) of a/kernel must have shape \("):
        packed.with_data(packed.data[:-1]).check("a/kernel")


@pytest.mark.parametrize("format", ["nm", "block", "block:4x8", "bitmap", "csr", None])
def test_packing_inside_jit_is_one_sentence(format):
    w, mask = jnp.ones((8, 8)), jnp.ones((8, 8), bool)
    message = "a/kernel can(not)? be packed .*inside jax.jit"
    for function in (
        lambda w, mask: formats.pack(w, mask, format, name="a/kernel"),
        lambda w, _: formats.pack(w, np.ones((8, 8), bool), format, name="a/kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(function)(w, mask)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_any_shape_and_pattern(data):
    format = data.draw(st.sampled_from(["nm", "block", "bitmap", "csr"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    if format == "nm":
        m = 2 ** data.draw(st.integers(1, 5))
        n = data.draw(st.integers(1, m))
        shape, format = (rows * m, columns), f"{n}:{m}"
        mask = nm_mask(n, m)(rng, shape)
    elif format == "block":
        bk, bn = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
        shape, format = (rows * bk, columns * bn), f"block:{bk}x{bn}"
        mask = block_mask(bk, bn)(rng, shape)
    else:
        shape = (rows, columns)
        mask = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    w = jnp.asarray(rng.normal(size=shape), data.draw(st.sampled_from(DTYPES)))
    packed = formats.pack(w, mask, format)
    assert_holds(packed, w, mask)
    x = weight(rng, (2, shape[0]))
    expected = np.asarray(x, np.float64) @ np.where(mask, np.asarray(w, np.float64), 0)
    np.testing.assert_allclose(formats.matmul(x, packed), expected, atol=1e-4)


@pytest.mark.parametrize(("inputs", "index"), [(7, 2), (2**16, 2), (2**16 + 1, 4)])
def test_bytes_by_hand(inputs, index):
    w, mask = jnp.zeros((inputs, 4)), np.zeros((inputs, 4), bool)
    mask[:5, 1] = True
    assert formats.pack(w, mask, "csr").nbytes == 5 * (4 + index) + 5 * 4
    assert formats.pack(w, mask, "bitmap").nbytes == 5 * 4 + -(-4 * inputs // 8)


SHARDING = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests/formats")
import test_formats_contract as contract
from sparsejax import formats

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
placed = lambda spec: NamedSharding(mesh, spec)
x = contract.weight(np.random.default_rng(9), (8, 32))
for format, spec in [
    ("2:4", P(None, "model")),
    ("1:8", P(None, ("data", "model"))),
    ("block:4x8", P("model")),
    ("bitmap", P()),
    ("csr", P()),
]:
    w, mask, packed = contract.example(format, (32, 48))
    spread = jax.device_put(packed, placed(spec))
    assert all(leaf.sharding.is_equivalent_to(placed(spec), leaf.ndim) for leaf in jax.tree.leaves(spread))
    contract.assert_same_bits(jax.jit(lambda p: p.to_dense())(spread), packed.to_dense())
    contract.assert_same_bits(jax.jit(lambda p: p.mask())(spread), packed.mask())
    y = jax.jit(formats.matmul)(jax.device_put(x, placed(P("data"))), spread)
    np.testing.assert_allclose(y, formats.matmul(x, packed), atol=1e-5)
    contract.assert_holds(formats.pack(jax.device_put(w, placed(P("data", "model"))), mask, format), w, mask)
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SHARDING)
