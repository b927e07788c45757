"""Group-quantised arrays: packing is exact, the product is that of the dense kernel, and files keep every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import formats, nn
from sparsejax.formats.group_quantised import (
    GroupQuantisedArray,
    group_quantised_matmul,
    pack_int4,
    unpack_int4,
)

RNG = np.random.default_rng(0)


def parts(inputs=24, outputs=10, group=4, density=0.5):
    """Codes, scales, zeros and kept groups, with an output that keeps none and one that keeps all."""
    grid = (inputs // group, outputs)
    keep = RNG.random(grid) < density
    keep[:, 2], keep[:, 5] = False, True
    return (
        RNG.integers(0, 16, (inputs, outputs)),
        RNG.gamma(2.0, size=grid).astype(np.float32),
        RNG.normal(size=grid).astype(np.float32),
        keep,
    )


def dense_of(codes, scale, zero, keep):
    group = len(codes) // len(scale)
    scale, zero, keep = (np.repeat(leaf, group, axis=0) for leaf in (scale, zero, keep))
    return np.where(keep, scale * (codes.astype(np.float32) - zero), np.float32(0))


def test_codes_are_packed_two_a_byte():
    codes = np.arange(16).reshape(2, 8)
    packed = np.asarray(pack_int4(jnp.asarray(codes)))
    np.testing.assert_array_equal(packed, codes[:, ::2] + 16 * codes[:, 1::2])
    np.testing.assert_array_equal(unpack_int4(packed), codes)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_packing_is_exact(group):
    given = parts(group=group)
    array = GroupQuantisedArray.from_codes(*given)
    array.check()
    np.testing.assert_array_equal(array.to_dense(), dense_of(*given))
    np.testing.assert_array_equal(array.mask(), np.repeat(given[3], group, axis=0))
    codes, scale, zero, keep = array.to_codes()
    np.testing.assert_array_equal(keep, given[3])
    np.testing.assert_array_equal(np.where(keep, scale, 0), np.where(keep, given[1], 0))
    again = GroupQuantisedArray.from_codes(codes, scale, zero, keep)
    for old, new in zip(jax.tree.leaves(array), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(old, new)
    kept = int(given[3].sum())
    assert array.nbytes == kept * (group // 2 + 4 + 4 + 2) + 4 * 11


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_the_product_is_that_of_the_dense_kernel(chunk):
    given = parts()
    array = GroupQuantisedArray.from_codes(*given)
    x = RNG.normal(size=(2, 3, 24)).astype(np.float32)
    found = jax.jit(lambda x, w: group_quantised_matmul(x, w, chunk=chunk))(x, array)
    np.testing.assert_allclose(found, x @ dense_of(*given), atol=1e-4)
    assert not np.any(found[..., 2])
    rounded = array.with_data(array.data.astype(jnp.bfloat16))
    half = formats.matmul(x.astype(jnp.bfloat16), rounded)
    assert half.dtype == rounded.to_dense().dtype == jnp.bfloat16
    exact = formats.matmul(x, rounded)
    np.testing.assert_allclose(exact, x @ rounded.to_dense().astype(jnp.float32), atol=1e-4)


def test_empty_arrays_and_gradients():
    codes, scale, zero, keep = parts()
    empty = GroupQuantisedArray.from_codes(codes, scale, zero, np.zeros_like(keep))
    x = RNG.normal(size=(3, 24)).astype(np.float32)
    np.testing.assert_array_equal(formats.matmul(x, empty), np.zeros((3, 10)))
    array = GroupQuantisedArray.from_codes(codes, scale, zero, keep)
    assert formats.matmul(x[:0], array).shape == (0, 10)
    weights = RNG.normal(size=(3, 10)).astype(np.float32)

    def total(x, scales, matmul):
        return jnp.sum(weights * matmul(x, array.with_data(scales)))

    found, expected = (
        jax.grad(total, (0, 1))(x, array.scales, matmul)
        for matmul in (formats.matmul, lambda x, w: x @ w.to_dense())
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_files_and_layers(tmp_path):
    given = parts()
    tree = {"kernel": GroupQuantisedArray.from_codes(*given), "bias": jnp.ones(10)}
    formats.save(tmp_path / "a.safetensors", {"layer": tree})
    loaded = formats.load(tmp_path / "a.safetensors")["layer"]
    assert loaded["kernel"].group == 4
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)
    x = RNG.normal(size=(3, 24)).astype(np.float32)
    found = nn.Dense(10).apply({"params": loaded}, x)
    np.testing.assert_allclose(found, x @ dense_of(*given) + 1, atol=1e-4)


def test_bad_input():
    codes, scale, zero, keep = parts()
    with pytest.raises(ValueError, match="codes of w must be 0 ... 15, but range from 0 to 16"):
        GroupQuantisedArray.from_codes(np.where(codes == codes.max(), 16, codes), scale, zero, keep, name="w")
    with pytest.raises(ValueError, match="codes of w must be integers, got float64"):
        GroupQuantisedArray.from_codes(codes + 0.5, scale, zero, keep, name="w")
    with pytest.raises(ValueError, match="8 groups do not divide the inputs .* into groups of even size"):
        GroupQuantisedArray.from_codes(codes, np.repeat(scale, 2, 0)[:8], zero, np.ones((8, 10), bool))
    with pytest.raises(ValueError, match=r"zero of weight must have shape \(6, 10\)"):
        GroupQuantisedArray.from_codes(codes, scale, zero[:3], keep)
    with pytest.raises(ValueError, match="cannot be packed inside jax.jit"):
        jax.jit(lambda codes: GroupQuantisedArray.from_codes(codes, scale, zero, keep).codes)(codes)
    array = GroupQuantisedArray.from_codes(codes, scale, zero, keep)
    leaves = dict(scales=array.scales, zeros=array.zeros, codes=array.codes, groups=array.groups)
    broken = GroupQuantisedArray(
        **leaves | {"groups": array.groups[::-1]}, indptr=array.indptr, shape=(24, 10), group=4
    )
    with pytest.raises(
        ValueError, match="groups of array must ascend for each output and lie between 0 and 5"
    ):
        broken.check()
    broken = GroupQuantisedArray(**leaves, indptr=array.indptr + 1, shape=(24, 10), group=4)
    with pytest.raises(ValueError, match="indptr of array must ascend from 0 to its"):
        broken.check()
