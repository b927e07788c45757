"""Block-sparse arrays against loops over the blocks and against scipy's BSR."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import formats, patterns
from sparsejax.formats.block import MAX_SIDE, ell_length, find_block


def case(seed, rows, columns, bk, bn, density=0.4):
    rng = np.random.default_rng(seed)
    keeps = rng.random((rows, columns)) < density
    w = rng.normal(size=(rows * bk, columns * bn)).astype(np.float32)
    return w, keeps, np.kron(keeps, np.ones((bk, bn))).astype(bool)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_layout_against_loops_and_scipy(seed, rows, columns, bk, bn):
    w, keeps, mask = case(seed, rows, columns, bk, bn)
    packed = formats.BlockSparseArray.from_dense(w, mask, block=(bk, bn))
    length = max(1, max(int(keeps[:, c].sum()) for c in range(columns)))
    assert packed.blocks.shape == (columns, length, bk, bn) and packed.indices.shape == (columns, length)
    assert packed.indices.dtype == jnp.int32 and length == ell_length(mask, (bk, bn))
    assert packed.block_density == length / rows
    for c in range(columns):
        kept = [r for r in range(rows) if keeps[r, c]]
        assert packed.indices[c].tolist() == kept + [-1] * (length - len(kept))
        for slot in range(length):
            tile = np.zeros((bk, bn), np.float32)
            if slot < len(kept):
                tile = w[kept[slot] * bk :, c * bn :][:bk, :bn]
            np.testing.assert_array_equal(packed.blocks[c, slot], tile)

    csr = packed.to_block_csr()
    bsr = scipy.sparse.bsr_array(w * mask, blocksize=(bk, bn))
    bsr.sort_indices()
    np.testing.assert_array_equal(csr.blocks, bsr.data)
    np.testing.assert_array_equal(csr.indices, bsr.indices)
    np.testing.assert_array_equal(csr.indptr, bsr.indptr)
    assert {leaf.dtype for leaf in csr[1:]} == {jnp.dtype(jnp.int32)}
    back = formats.BlockSparseArray.from_block_csr(csr, packed.shape)
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bytes_by_hand():
    w, keeps, mask = case(0, 4, 3, 8, 16)
    keeps[:] = [[1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0]]
    mask = np.kron(keeps, np.ones((8, 16))).astype(bool)
    packed = formats.pack(w, mask, "block:8x16")
    assert packed.nbytes == 3 * 3 * (8 * 16 * 4 + 4)  # three columns, each with room for three
    assert sum(leaf.nbytes for leaf in packed.to_block_csr()) == 5 * (8 * 16 * 4 + 4) + 5 * 4


@pytest.mark.parametrize("block", [(4, 8), (8, 4), (16, 2), (1, 8), (24, 16)])
def test_the_largest_blocks_are_found(block):
    bk, bn = block
    w, keeps, mask = case(3, 48 // bk, 48 // bn, bk, bn, 0.5)
    found = find_block(mask, 48)

    def whole(sides):  # brute force
        tiles = mask.reshape(48 // sides[0], sides[0], 48 // sides[1], sides[1])
        return bool((tiles.all((1, 3)) == tiles.any((1, 3))).all())

    divisors = [side for side in range(1, 49) if 48 % side == 0]
    assert found == max((a, b) for a in divisors for b in divisors if whole((a, b)))
    assert formats.pack(w, mask, "block").block == found


def test_found_blocks_are_bounded_and_stay_inside_the_inputs():
    mask = np.zeros((512, 600), bool)
    assert find_block(mask, 512) == (MAX_SIDE, 120) and find_block(mask, 16) == (16, 120)
    mask[256:, :300] = True
    assert find_block(mask, 512) == (128, 100)


def test_patterns_give_such_masks():
    w = jax.random.normal(jax.random.key(0), (3, 2, 16, 24))
    mask = patterns.Block((8, 4)).mask(jnp.abs(w), 0.75)
    packed = formats.pack(w, mask, "block:8x4")
    np.testing.assert_array_equal(packed.to_dense(), jnp.where(mask, w, 0))


def test_bad_blocks():
    w, mask = np.ones((2, 8, 12)), np.ones((2, 8, 12), bool)
    pack = lambda format: formats.pack(w, mask, format, name="a/kernel")  # noqa: E731
    message = "blocks of 3x4 do not divide the last two axes of a/kernel, whose shape is (2, 8, 12)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack("block:3x4")
    with pytest.raises(ValueError, match=r"a packed block needs two positive sides, got \(0, 4\)"):
        pack("block:0x4")
    mask[1, 5, 9] = False
    message = "a/kernel does not keep or drop whole 4x6 blocks: the one from (1, 4, 6) keeps 23 of 24 weights"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack("block:4x6")
    message = "a/kernel keeps no whole blocks of two or more weights: it keeps the one at "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.* and not its neighbour at "):
        pack("block")


@pytest.mark.parametrize(
    ("wrong", "kept", "dropped"),
    [([(1, 3)], (0, 3), (1, 3)), ([(0, 0)], (0, 1), (0, 0)), ([(3, 3)], (2, 3), (3, 3))],
)
def test_the_first_neighbours_that_differ(wrong, kept, dropped):
    mask = np.ones((4, 4), bool)
    mask[tuple(zip(*wrong, strict=True))] = False
    message = f": it keeps the one at {kept} and not its neighbour at {dropped}"
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        formats.pack(np.ones((4, 4)), mask, "block")
    with pytest.raises(ValueError, match="^weight keeps no whole blocks of two or more weights$"):
        formats.pack(np.ones((4, 1)).reshape(4, 1, 1), mask[:, :1].reshape(4, 1, 1), "block")


@pytest.mark.parametrize(
    ("indices", "indptr", "message"),
    [
        ([0, 3], [0, 1, 2], "do not address 2 blocks of a 2x3 grid"),
        ([0, 1], [0, 1, 1], "do not address 2 blocks of a 2x3 grid"),
        ([0, 1], [0, 2], r"indptr of array must have shape \(3,\), but its shape is \(2,\)"),
        ([1, 1], [0, 2, 2], "indices of array must ascend from 0 to at most 1 in each column, then be -1"),
    ],
)
def test_bad_block_csr(indices, indptr, message):
    with pytest.raises(ValueError, match=message):
        formats.BlockSparseArray.from_block_csr((np.ones((2, 4, 2)), indices, indptr), (8, 6))


def test_broken_leaves_are_found():
    w, _, mask = case(1, 3, 2, 2, 2)
    good = formats.pack(w, mask, "block:2x2")
    blocks = jnp.ones((2, 2, 2, 2))
    for indices in ([[1, 0], [0, 1]], [[-1, 0], [0, 1]], [[0, 3], [0, 1]], [[-2, -1], [0, 1]]):
        broken = formats.BlockSparseArray(blocks, jnp.asarray(indices, jnp.int32), good.shape, (2, 2))
        with pytest.raises(ValueError, match="indices of x must ascend"):
            broken.check("x")
    broken = formats.BlockSparseArray(blocks, jnp.array([[0, -1], [0, 1]], jnp.int32), good.shape, (2, 2))
    with pytest.raises(ValueError, match="x has padding that is not zero"):
        broken.check("x")
