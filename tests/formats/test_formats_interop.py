"""Formats to and from scipy.sparse and jax.experimental.sparse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse

from sparsejax import formats, patterns

FORMATS = ("2:4", "block:4x3", "bitmap", "csr")


def case(format, dtype=jnp.float32, shape=(16, 9)):
    w = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    mask = {
        "2:4": lambda: patterns.NM(2, 4).mask(jnp.abs(w)),
        "block:4x3": lambda: patterns.Block((4, 3)).mask(jnp.abs(w), 0.5),
    }.get(format, lambda: patterns.Unstructured().mask(jnp.abs(w), 0.8))()
    w = jnp.where(jnp.arange(w.size).reshape(shape) % 7 == 0, 0, w)  # some kept weights are zero
    return jnp.where(mask, w, 0), mask, formats.pack(w, mask, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_scipy(format, dtype):
    dense, mask, packed = case(format, dtype)
    matrix = formats.to_scipy(packed)
    assert matrix.format == ("bsr" if format.startswith("block") else "csr") and matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), np.asarray(dense, np.float32))
    assert matrix.nnz == mask.sum()  # kept zeros stay
    back = formats.from_scipy(matrix)
    back.check()
    np.testing.assert_array_equal(back.mask(), mask)
    chex.assert_trees_all_equal(back.to_dense().astype(dtype), dense)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "dia", "bsr"])
def test_all_of_scipys_formats_come_in(kind):
    random = np.random.default_rng(0)
    dense = random.normal(size=(6, 8)).astype(np.float32) * (random.random((6, 8)) < 0.4)
    packed = formats.from_scipy(scipy.sparse.coo_array(dense).asformat(kind))
    packed.check()
    assert isinstance(packed, formats.BlockSparseArray if kind == "bsr" else formats.CSRArray)
    np.testing.assert_array_equal(packed.to_dense(), dense)


def test_duplicates_and_disorder_of_scipy():
    coo = scipy.sparse.coo_array(([1.0, 2.0, 4.0], ([1, 0, 1], [2, 1, 2])), (2, 3))
    packed = formats.from_scipy(coo)
    assert packed.data.tolist() == [2.0, 5.0]
    csr = scipy.sparse.csr_array((np.array([1.0, 2.0]), [2, 0], [0, 2]), (1, 3))
    assert formats.from_scipy(csr).to_dense().tolist() == [[2.0, 0.0, 1.0]]
    assert csr.indices.tolist() == [2, 0]  # what is given is left as it is
    blocks = np.arange(12.0).reshape(3, 2, 2)
    bsr = scipy.sparse.bsr_array((blocks, [1, 0, 1], [0, 3]), (2, 4))
    np.testing.assert_array_equal(formats.from_scipy(bsr).to_dense(), bsr.toarray())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jax_sparse(format, dtype):
    dense, mask, packed = case(format, dtype)
    for out, into in ((formats.to_bcoo, formats.from_bcoo), (formats.to_bcsr, formats.from_bcsr)):
        matrix = out(packed)
        assert matrix.nse == mask.sum() and matrix.dtype == dtype
        chex.assert_trees_all_equal(matrix.todense(), dense)
        back = into(matrix)
        back.check()
        chex.assert_trees_all_equal(back.to_dense(), dense)
        np.testing.assert_array_equal(back.mask(), mask)
    x = jax.random.normal(jax.random.key(1), (3, 16)).astype(dtype)
    chex.assert_trees_all_close(
        (x @ formats.to_bcoo(packed)).astype(jnp.float32),
        formats.matmul(x, packed).astype(jnp.float32),
        atol=1e-5 if dtype == jnp.float32 else 0.1,
    )


@pytest.mark.slow
def test_duplicates_and_padding_of_bcoo():
    indices = jnp.array([[1, 2], [0, 1], [1, 2], [2, 3]])  # out of bounds is padding
    matrix = sparse.BCOO((jnp.array([1.0, 2.0, 4.0, 9.0], jnp.bfloat16), indices), shape=(2, 3))
    packed = formats.from_bcoo(matrix)
    packed.check()
    assert packed.data.tolist() == [2.0, 5.0] and packed.dtype == jnp.bfloat16
    padded = sparse.BCOO.fromdense(jnp.eye(3), nse=5)
    np.testing.assert_array_equal(formats.from_bcoo(padded).to_dense(), jnp.eye(3))
    padded = sparse.BCSR.fromdense(jnp.eye(3), nse=5)
    np.testing.assert_array_equal(formats.from_bcsr(padded).to_dense(), jnp.eye(3))


def test_csr_goes_out_inside_jit():
    dense, _, packed = case("csr")
    for out in (formats.to_bcoo, formats.to_bcsr):
        chex.assert_trees_all_equal(jax.jit(lambda p, out=out: out(p).todense())(packed), dense)


def test_kernels_of_convolutions_are_their_matrix_view():
    dense, _, packed = case("csr", shape=(2, 3, 8, 9))
    assert formats.to_scipy(packed).shape == formats.to_bcoo(packed).shape == (48, 9)
    np.testing.assert_array_equal(formats.to_scipy(packed).toarray(), dense.reshape(48, 9))


def test_bad_input():
    with pytest.raises(ValueError, match="^from_scipy needs a sparse matrix with two axes, got ndarray$"):
        formats.from_scipy(np.eye(2))
    message = "^from_bcoo needs two sparse axes and no others, got 1 batch, 1 sparse and 0 dense axes$"
    with pytest.raises(ValueError, match=message):
        formats.from_bcoo(sparse.BCOO.fromdense(jnp.eye(2), n_batch=1))
