"""Bitmap and CSR arrays against Python's integers and scipy."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import formats
from sparsejax.formats import BitmapArray, CSRArray


def case(seed, rows, columns, density):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)).astype(np.float32), rng.random((rows, columns)) < density


DENSITY = st.sampled_from([0.0, 0.05, 0.5, 1.0])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 11), DENSITY)
def test_bitmap_layout(seed, rows, columns, density):
    w, mask = case(seed, rows, columns, density)
    packed = BitmapArray.from_dense(w, mask)
    bits = sum(int(keep) << i for i, keep in enumerate(mask.ravel()))
    assert packed.bitmap.shape == (-(-mask.size // 8),)
    assert int.from_bytes(np.asarray(packed.bitmap).tobytes(), "little") == bits
    np.testing.assert_array_equal(
        packed.data, [x for x, keep in zip(w.ravel(), mask.ravel(), strict=True) if keep]
    )
    assert packed.nbytes == 4 * mask.sum() + -(-mask.size // 8)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 11), DENSITY)
def test_csr_layout_is_that_of_scipys_transposed(seed, rows, columns, density):
    w, mask = case(seed, rows, columns, density)
    packed, reference = CSRArray.from_dense(w, mask), scipy.sparse.csr_array((w * mask).T)
    np.testing.assert_array_equal(packed.data, reference.data)
    np.testing.assert_array_equal(packed.indices, reference.indices)
    np.testing.assert_array_equal(packed.indptr, reference.indptr)
    assert packed.inputs.dtype == jnp.uint16 and packed.indices.dtype == packed.indptr.dtype == jnp.int32
    assert packed.nbytes == mask.sum() * (4 + 2) + 4 * (columns + 1)
    np.testing.assert_array_equal(packed.output_of_entries(), np.nonzero(mask.T)[0])


@pytest.mark.parametrize(("inputs", "dtype"), [(2**16, jnp.uint16), (2**16 + 1, jnp.int32)])
def test_inputs_are_as_wide_as_needed(inputs, dtype):
    mask = np.zeros((inputs, 2), bool)
    mask[-1, 1] = True
    packed = CSRArray.from_dense(np.full(mask.shape, 3.0, np.float32), mask)
    assert packed.inputs.dtype == dtype and packed.indices.tolist() == [inputs - 1]
    assert packed.to_dense()[-1, 1] == 3.0 and packed.mask().sum() == 1


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_csr_product_is_that_of_scipy(batch):
    w, mask = case(0, 40, 30, 0.1)
    packed = CSRArray.from_dense(w, mask)
    x = np.random.default_rng(1).normal(size=(batch, 40)).astype(np.float32)
    np.testing.assert_allclose(formats.matmul(x, packed), x @ scipy.sparse.csr_array(w * mask), atol=1e-5)


def test_sums_of_half_precision_are_in_float32():
    # 1 + 300 * 2**-9 in bfloat16 stays 1 if each sum is rounded
    w = np.full((301, 1), 2.0**-9)
    w[0] = 1
    packed = CSRArray.from_dense(jnp.asarray(w, jnp.bfloat16), np.ones(w.shape, bool))
    y = formats.matmul(jnp.ones((1, 301), jnp.bfloat16), packed)
    assert float(y[0, 0]) == pytest.approx(1 + 300 * 2.0**-9, rel=2**-8)


def test_broken_leaves_are_found():
    w, mask = case(2, 5, 3, 0.0)
    mask[2, 0] = mask[4, 0] = mask[1, 2] = True
    good = CSRArray.from_dense(w, mask)
    for inputs in ([4, 2, 1], [2, 2, 1], [2, 5, 1]):
        with pytest.raises(
            ValueError, match="inputs of x must ascend for each output and lie between 0 and 4"
        ):
            CSRArray.from_parts(good.data, inputs, good.indptr, good.shape).check("x")
    for indptr in ([0, 2, 2, 2], [1, 2, 2, 3], [0, 3, 2, 3]):
        with pytest.raises(ValueError, match="indptr of x must ascend from 0 to its 3 entries"):
            CSRArray.from_parts(good.data, good.inputs, indptr, good.shape).check("x")
    with pytest.raises(ValueError, match="inputs of x must be uint16, but it is int32"):
        CSRArray(good.data, good.indices, good.indptr, good.shape).check("x")

    good = BitmapArray.from_dense(w, mask)
    with pytest.raises(ValueError, match="the bitmap of x has bits set beyond its 15 entries"):
        BitmapArray(good.data, good.bitmap.at[1].set(0x80), good.shape).check("x")
    with pytest.raises(ValueError, match=r"data of x must have shape \(4,\), but its shape is \(3,\)"):
        BitmapArray(good.data, good.bitmap.at[0].set(good.bitmap[0] | 1), good.shape).check("x")
