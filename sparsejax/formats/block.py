"""Block-sparse arrays: blocks of (bk, bn) weights are stored or dropped whole.

Block-ELL, by column of blocks, is the form that is computed with: every column of blocks has room for L of them,
the most that any column keeps (at least 1), so that all shapes are rectangles.

  blocks   (N / bn, L, bk, bn)   the kept blocks of each column, from the top; padding is zero
  indices  (N / bn, L) int32     their rows of blocks, ascending; padding is -1

Block-CSR, by row of blocks, stores no padding: `BlockSparseArray.to_block_csr` and `.from_block_csr`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.formats.base import (
    Packed,
    check_shape,
    expect,
    index_of,
    inner_rows,
    matrix_shape,
    on_host,
    register,
    static,
)

MAX_SIDE = 128  # of the blocks that `find_block` finds: the largest tile that kernels like


class BlockCSR(NamedTuple):
    """Kept blocks by rows of blocks, as in scipy's BSR.

    Attributes:
      blocks: `(nnz, bk, bn)`.
      indices: int32 `(nnz,)`, the columns of blocks, ascending in each row.
      indptr: int32 `(K / bk + 1,)`: row i of blocks holds `indptr[i]` up to `indptr[i + 1]`.
    """

    blocks: jax.Array
    indices: jax.Array
    indptr: jax.Array


@register
class BlockSparseArray(Packed):
    """An array in block-ELL form; see the module for the layout.

    Attributes:
      blocks: the kept blocks.
      indices: int32, their rows.
      shape: the dense shape.
    """

    blocks: jnp.ndarray
    indices: jnp.ndarray
    shape: tuple[int, ...] = static()
    block: tuple[int, int] = static()

    NAME = "block"
    DATA = "blocks"

    @property
    def format(self):
        return f"block:{self.block[0]}x{self.block[1]}"

    @property
    def data(self):
        """`blocks`."""
        return self.blocks

    @classmethod
    def from_dense(cls, w, mask, *, block: tuple[int, int] | None = None, name: str = "weight"):
        """Packs the blocks that `mask` keeps.

        Args:
          w: array of any dtype with at least one axis.
          mask: bool (or soft) array of the same shape that keeps or drops whole blocks.
          block: `(bk, bn)` over the last two axes, which it divides; None finds the largest blocks, of sides
            up to `MAX_SIDE`.
          name: what errors call the weight.

        Raises:
          ValueError: under `jax.jit`; if a block is kept in part, naming the first; or if the mask has no blocks
            of more than one weight and `block` is None.
        """
        w_host, mask_host = on_host(w, mask, name, "blocks")
        shape = np.shape(w)
        if block is None:
            block = find_block(mask_host, inner_rows(shape))
            if block == (1, 1):
                raise ValueError(
                    f"{name} keeps no whole blocks of two or more weights" + _difference(mask_host, shape)
                )
        keeps = _kept_blocks(mask_host, shape, block, name)
        (bk, bn), (rows, columns) = block, keeps.shape
        counts = keeps.sum(axis=0)
        length = max(1, int(counts.max()))
        order = np.argsort(~keeps.T, axis=1, kind="stable")[:, :length]
        stored = np.arange(length) < counts[:, None]
        tiles = w_host.reshape(rows, bk, columns, bn)
        blocks = tiles[order, :, np.arange(columns)[:, None], :]
        blocks[~stored] = 0
        indices = np.where(stored, order, -1).astype(np.int32)
        return cls(jnp.asarray(blocks), jnp.asarray(indices), tuple(shape), (int(bk), int(bn)))

    @classmethod
    def from_block_csr(cls, csr: BlockCSR, shape):
        """The same array from block-CSR; host only.

        Args:
          csr: the blocks, or a triple in its order.
          shape: the dense shape.

        Raises:
          ValueError: if the arrays are not block-CSR of that shape.
        """
        blocks, indices, indptr = map(np.asarray, csr)
        bk, bn = blocks.shape[1:]
        _check_divides(shape, (bk, bn), "array")
        rows, columns = _grid(shape, (bk, bn))
        expect("array", "indptr", indptr, (rows + 1,))
        expect("array", "indices", indices, (len(blocks),))
        row = np.repeat(np.arange(rows), np.diff(indptr))
        if len(row) != len(blocks) or len(blocks) and not 0 <= indices.min() <= indices.max() < columns:
            raise ValueError(
                f"indptr and indices do not address {len(blocks)} blocks of a {rows}x{columns} grid"
            )
        counts = np.bincount(indices, minlength=columns)
        length = max(1, int(counts.max()))
        order = np.lexsort((row, indices))
        slot = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        ell = np.zeros((columns, length, bk, bn), blocks.dtype)
        rows_of = np.full((columns, length), -1, np.int32)
        ell[indices[order], slot] = blocks[order]
        rows_of[indices[order], slot] = row[order]
        array = cls(jnp.asarray(ell), jnp.asarray(rows_of), tuple(shape), (bk, bn))
        array.check()
        return array

    def to_block_csr(self) -> BlockCSR:
        """The same blocks without padding, by rows; host only, as the count of blocks is data."""
        rows, columns = _grid(self.shape, self.block)
        found, slots = np.asarray(self.indices), np.asarray(self.blocks)
        column, slot = np.nonzero(found >= 0)
        row = found[column, slot]
        order = np.lexsort((column, row))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int32)
        return BlockCSR(
            jnp.asarray(slots[column[order], slot[order]]),
            jnp.asarray(column[order].astype(np.int32)),
            jnp.asarray(indptr),
        )

    @property
    def block_density(self) -> float:
        """Stored blocks, padding included, over blocks of the dense array."""
        rows, columns = _grid(self.shape, self.block)
        return self.indices.size / (rows * columns)

    def _scatter(self, stored):
        """(K / bk, N / bn, ...) from one entry per stored block; zeros where none is."""
        rows, columns = _grid(self.shape, self.block)
        beyond = rows + jnp.arange(self.indices.shape[1], dtype=jnp.int32)
        target = jnp.where(self.indices < 0, beyond, self.indices)  # padding is out of bounds, and dropped
        dense = jnp.zeros((rows, columns, *stored.shape[2:]), stored.dtype)
        return dense.at[target, jnp.arange(columns)[:, None]].set(stored, mode="drop", unique_indices=True)

    def to_dense(self):
        return self._scatter(self.blocks).swapaxes(1, 2).reshape(self.shape)

    def mask(self):
        keeps = self._scatter(jnp.ones(self.indices.shape, bool))
        (bk, bn), (rows, columns) = self.block, keeps.shape
        return jnp.broadcast_to(keeps[:, None, :, None], (rows, bk, columns, bn)).reshape(self.shape)

    def check(self, name="array"):
        check_shape(self.shape, name)
        _check_divides(self.shape, self.block, name)
        rows, columns = _grid(self.shape, self.block)
        length = self.blocks.shape[1] if self.blocks.ndim == 4 else 1
        expect(name, "indices", self.indices, (columns, length), "int32")
        expect(name, "blocks", self.blocks, (columns, length, *self.block))
        found = np.asarray(self.indices)
        padding = found < 0
        last = np.where(padding, rows + np.arange(length), found)  # padding must follow
        if not length or (np.diff(last, axis=1) <= 0).any() or found.max() >= rows or found.min() < -1:
            raise ValueError(
                f"indices of {name} must ascend from 0 to at most {rows - 1} in each column, then be -1"
            )
        if np.asarray(self.blocks)[padding].any():
            raise ValueError(f"{name} has padding that is not zero")


def find_block(mask, inner: int) -> tuple[int, int]:
    """The largest blocks, of sides up to `MAX_SIDE`, that a mask keeps or drops whole; (1, 1) if there are none.

    The rows at which any column of the mask changes are multiples of a block's height, and so are K and `inner`;
    the height is their greatest common divisor, or a divisor of that. Widths likewise.

    Args:
      mask: bool numpy array `(K, N)`.
      inner: entries of axis -2 of the weight, which the height must divide.
    """
    return (
        _side(np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1, inner),
        _side(np.flatnonzero((mask[:, 1:] != mask[:, :-1]).any(axis=0)) + 1, mask.shape[1]),
    )


def _difference(mask, shape) -> str:
    """For errors: the first neighbours along the last two axes of which one weight is kept and the other is not."""
    below = mask[1:] != mask[:-1]
    below[inner_rows(shape) - 1 :: inner_rows(shape)] = False  # neighbours in the matrix view alone
    beside = mask[:, 1:] != mask[:, :-1]
    found = [
        (*np.argwhere(each)[0], *step) for each, step in ((beside, (0, 1)), (below, (1, 0))) if each.any()
    ]
    if not found:
        return ""
    row, column, down, right = min(found)
    pair = index_of(row, column, shape), index_of(row + down, column + right, shape)
    kept, dropped = pair if mask[row, column] else pair[::-1]
    return f": it keeps the one at {kept} and not its neighbour at {dropped}"


def _side(changes, length: int) -> int:
    common = math.gcd(length, *changes.tolist())
    return max(side for side in range(1, min(common, MAX_SIDE) + 1) if common % side == 0)


def ell_length(mask, block) -> int:
    """L of the block-ELL form of a mask that has these blocks: bool numpy `(K, N)`."""
    return max(1, int(mask[:: block[0], :: block[1]].sum(axis=0).max()))


def _grid(shape, block) -> tuple[int, int]:
    k, n = matrix_shape(shape)
    return k // block[0], n // block[1]


def _kept_blocks(mask, shape, block, name):
    """One bool per block; every block must be whole."""
    _check_divides(shape, block, name)
    (bk, bn), (rows, columns) = block, _grid(shape, block)
    counts = mask.reshape(rows, bk, columns, bn).sum(axis=(1, 3))
    partial = (counts > 0) & (counts < bk * bn)
    if partial.any():
        row, column = np.unravel_index(np.argmax(partial), partial.shape)
        raise ValueError(
            f"{name} does not keep or drop whole {bk}x{bn} blocks: the one from "
            f"{index_of(row * bk, column * bn, shape)} keeps {counts[row, column]} of {bk * bn} weights"
        )
    return counts > 0


def _check_divides(shape, block, name):
    sides = (inner_rows(shape), shape[-1])
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"a packed block needs two positive sides, got {tuple(block)}")
    if any(length % side for length, side in zip(sides, block, strict=True)):
        raise ValueError(
            f"blocks of {block[0]}x{block[1]} do not divide the last two axes of {name}, whose shape is {tuple(shape)}"
        )
