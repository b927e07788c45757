"""N:M arrays against bit fiddling with Python's integers and against brute force."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import formats, patterns
from sparsejax.formats.nm import SIZES, find_nm, pack_bits, unpack_bits


def stream(column, bits: int) -> int:
    """The little-endian bit stream of a column of entries as one integer."""
    return sum(int(entry) << (i * bits) for i, entry in enumerate(column))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 21), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_bit_streams(bits, length, columns, seed):
    entries = np.random.default_rng(seed).integers(0, 2**bits, (length, columns), dtype=np.uint8)
    packed = pack_bits(entries, bits, np)
    assert packed.shape == (-(-length * bits // 8), columns) and packed.dtype == np.uint8
    for c in range(columns):
        assert int.from_bytes(packed[:, c].tobytes(), "little") == stream(entries[:, c], bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_streams_on_devices(bits):
    entries = np.random.default_rng(bits).integers(0, 2**bits, (21, 3), dtype=np.uint8)
    packed = pack_bits(entries, bits, np)
    np.testing.assert_array_equal(pack_bits(jnp.asarray(entries), bits), packed)
    np.testing.assert_array_equal(unpack_bits(jnp.asarray(packed), bits, 21), entries)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8), (4, 8), (1, 16), (7, 32), (2, 64), (3, 256)])
def test_layout_against_brute_force(n, m):
    rng = np.random.default_rng(m)
    rows, columns = 2 * m, 3
    w = rng.normal(size=(rows, columns)).astype(np.float32)
    mask = np.asarray(patterns.NM(n, m).mask(jnp.abs(w)))
    packed = formats.NMArray.from_dense(w, mask, n=n, m=m)
    bits = m.bit_length() - 1
    for c in range(columns):
        kept = [r for r in range(rows) if mask[r, c]]
        np.testing.assert_array_equal(packed.values[:, c], w[kept, c])
        np.testing.assert_array_equal(packed.positions()[:, c], [r % m for r in kept])
        in_bytes = np.asarray(packed.indices[:, c]).tobytes()
        assert int.from_bytes(in_bytes, "little") == stream([r % m for r in kept], bits)
    assert packed.nbytes == columns * (2 * n * 4 + -(-2 * n * bits // 8))


def test_2_4_in_bfloat16_takes_nine_sixteenths():
    w = jnp.ones((64, 32), jnp.bfloat16)
    packed = formats.pack(w, np.arange(64)[:, None] % 4 < 2 * np.ones((1, 32)), "2:4")
    assert packed.nbytes * 16 == w.nbytes * 9


def test_convolutions_have_their_groups_along_the_inputs():
    w = jax.random.normal(jax.random.key(0), (3, 3, 8, 5))
    mask = patterns.NM(2, 4).mask(jnp.abs(w))
    packed = formats.pack(w, mask, "nm")
    assert (packed.n, packed.m) == (2, 4) and packed.values.shape == (36, 5)
    # 3 * 3 * 4 rows hold groups of 8, but these would straddle positions of the filter
    with pytest.raises(ValueError, match=re.escape("1:8 needs axis -2 of weight to be divisible by 8")):
        formats.pack(w[:, :, :4], mask[:, :, :4], "1:8")
    patches = jax.random.normal(jax.random.key(1), (7, 72))
    np.testing.assert_allclose(
        formats.matmul(patches, packed), patches @ jnp.where(mask, w, 0).reshape(72, 5), atol=1e-5
    )


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (1, 16), (5, 32)])
def test_the_pattern_is_found(n, m):
    scores = np.random.default_rng(n * m).random((64, 6))
    mask = np.asarray(patterns.NM(n, m).mask(jnp.asarray(scores)))
    assert find_nm(mask, 64) == (n, m)
    packed = formats.NMArray.from_dense(scores, mask)
    assert (packed.n, packed.m) == (n, m)


def test_the_pattern_that_is_found_is_the_smallest():
    # brute force over all masks of one column of four
    for column in itertools.product([False, True], repeat=4):
        mask = np.array(column)[:, None]
        fits = [
            (sum(column[:m]), m)
            for m in SIZES
            if 4 % m == 0 and len({sum(column[i : i + m]) for i in range(0, 4, m)}) == 1
        ]
        fits = [(n, m) for n, m in fits if 0 < n < m]
        assert find_nm(mask, 4) == (fits[0] if fits else None)


@pytest.mark.parametrize("shape", [(16, 5), (2, 3, 8, 4)])
def test_packing_inside_jit(shape):
    w = jax.random.normal(jax.random.key(0), shape).at[..., 0, :].set(-0.0)
    mask = patterns.NM(3, 8).mask(jax.random.uniform(jax.random.key(1), shape))
    outside = formats.NMArray.from_dense(w, mask, n=3, m=8)
    inside = jax.jit(lambda w, mask: formats.NMArray.from_dense(w, mask, n=3, m=8))(w, mask)
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    soft = jax.jit(lambda w, mask: formats.pack(w, mask, "3:8"))(w, mask * 0.5)
    np.testing.assert_array_equal(soft.to_dense(), np.where(mask, w, 0) * 0.5)
    # and it is differentiable: only kept weights have a gradient
    gradient = jax.grad(lambda w: (formats.pack(w, mask, "3:8").values ** 2).sum())(w)
    np.testing.assert_allclose(gradient, np.where(mask, 2 * w, 0))


@pytest.mark.parametrize(("n", "m"), [(2, 6), (0, 4), (5, 4), (1, 512), (1, 1)])
def test_impossible_patterns(n, m):
    with pytest.raises(
        ValueError, match=f"^head cannot be packed as {n}:{m}: m must be a power of two from 2"
    ):
        formats.pack(jnp.ones((1536, 2)), np.ones((1536, 2), bool), f"{n}:{m}", name="head")


def test_half_a_pattern():
    message = "N:M packing of weight needs both n and m or neither, got n=1 and m=None"
    with pytest.raises(ValueError, match=f"^{message}$"):
        formats.NMArray.from_dense(np.ones((4, 2)), np.ones((4, 2), bool), n=1)


def test_a_mask_that_is_not_of_the_pattern():
    mask = np.tile(np.array([1, 0, 1, 0], bool)[:, None], (4, 3))
    mask[9, 1] = mask[13, 0] = True
    pack = lambda format, shape=(16, 3): formats.pack(  # noqa: E731
        np.ones(shape), mask.reshape(shape), format, name="a/kernel"
    )
    message = "a/kernel is not 2:4 along axis -2: the 4 weights from (8, 1) keep 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack("2:4")
    message = "a/kernel is not 2:4 along axis -2: the 4 weights from (1, 0, 0, 1) keep 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack("2:4", (2, 1, 8, 3))
    message = (
        "a/kernel is not N:M along axis -2 for M in 2, 4, 8, 16: the 16 weights from (0, 2) keep 8, those from "
        "(0, 0) 9"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack("nm")
    for kept, word in ((True, "all"), (False, "none")):
        with pytest.raises(ValueError, match=f"for M in 2, 4: it keeps {word} of its weights$"):
            formats.pack(np.ones((4, 2)), np.full((4, 2), kept), "nm")
    with pytest.raises(
        ValueError, match=re.escape("N:M needs axis -2 of weight to be even, but its shape is (3, 2)")
    ):
        formats.pack(np.ones((3, 2)), np.ones((3, 2), bool), "nm")
    with pytest.raises(
        ValueError, match=re.escape("1:4 needs axis -2 of weight to be divisible by 4, but its shape is (8,)")
    ):
        formats.pack(np.ones(8), np.ones(8, bool), "1:4")


def test_positions_that_do_not_ascend_are_found():
    packed = formats.pack(np.ones((4, 1)), np.array([1, 1, 0, 0], bool)[:, None], "2:4")
    assert int(packed.indices[0, 0]) == 0b0100
    broken = formats.NMArray(packed.values, jnp.full((1, 1), 0b0001, jnp.uint8), packed.shape, 2, 4)
    with pytest.raises(ValueError, match="indices of x do not ascend inside every group of 2:4"):
        broken.check("x")
    with pytest.raises(ValueError, match="indices of x must be uint8, but it is int32"):
        formats.NMArray(packed.values, packed.indices.astype(jnp.int32), packed.shape, 2, 4).check("x")
