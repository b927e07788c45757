"""Packing by format name, and of whole trees, where the smallest sensible format is picked for every leaf.

The pick for a leaf, from its mask alone; the first that applies:

  1. dense      the mask is a scalar: the leaf is not sparsified
  2. block      whole blocks of at least 8x8 are kept, at most half of them, and padded they are smaller than dense
  3. N:M        N of every M along axis -2 are kept, M of 2 ... 32, and the result is smaller than dense
  4. the smallest of dense, bitmap and CSR, by bytes

Blocks and N:M go first because kernels gain from their regularity, blocks before N:M because a mask of blocks
may be N:M by chance, and never the other way round.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.formats.base import Packed, check_mask, inner_rows, is_packed, matrix_shape, on_host
from sparsejax.formats.bitmap import BitmapArray
from sparsejax.formats.block import BlockSparseArray, ell_length, find_block
from sparsejax.formats.csr import CSRArray, input_dtype
from sparsejax.formats.nm import NMArray, find_nm
from sparsejax.masks import (
    best_rule,
    check_masks,
    flatten,
    is_sparsified,
    map_with_name,
    mask_weight,
    matches,
)

FORMATS = {cls.NAME: cls for cls in (NMArray, BlockSparseArray, BitmapArray, CSRArray)}
MIN_SIDE = 8  # smaller blocks gain nothing over single weights
MAX_BLOCK_DENSITY = 0.5
_KNOWN = "dense, nm, N:M such as 2:4, block, block:AxB such as block:32x32, bitmap, csr"


class Record(NamedTuple):
    """What became of one leaf: its path, format, why that format, and its bytes before and after."""

    path: str
    format: str
    reason: str
    dense_bytes: int
    packed_bytes: int


class Report(list):
    """A list of `Record`s in tree order that prints as a table."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of all leaves before packing."""
        return sum(record.dense_bytes for record in self)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all leaves after packing."""
        return sum(record.packed_bytes for record in self)

    def __str__(self):
        rows = [("path", "format", "dense bytes", "packed bytes", "ratio", "reason")]
        rows += [_row(*record[:2], *record[3:], record.reason) for record in self]
        rows.append(_row("total", "", self.dense_bytes, self.packed_bytes, ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def _row(path, format, dense, packed, reason):
    return path, format, f"{dense:,}", f"{packed:,}", f"{dense / max(packed, 1):.2f}x", reason


def pack(w, mask, format: str | None = None, *, name: str = "weight"):
    """The weights of an array that a mask keeps, in a packed format.

    Args:
      w: array.
      mask: bool (or soft) array of the same shape, or the scalar True, which leaves `w` dense.
      format: `nm` or `block` (of which the pattern is found), `2:4`, `block:32x32`, `bitmap`, `csr`, `dense`; or
        None to pick, see the module.
      name: what errors call the weight.

    Returns:
      An `NMArray`, `BlockSparseArray`, `BitmapArray` or `CSRArray`, or a masked dense array.

    Raises:
      ValueError: for an unknown format, a mask that is not of the format's pattern (with the first violation),
        or under `jax.jit` (but for N:M with N and M given).
    """
    if is_packed(w):
        raise ValueError(
            f"{name} is packed already, as {w.format}; sparsejax.formats.convert changes the format"
        )
    w, mask = (each if hasattr(each, "dtype") else jnp.asarray(each) for each in (w, mask))
    if not is_sparsified(mask):
        return jnp.asarray(w)
    return _build(w, mask, format or _pick(w, mask, name)[0], name)


def pack_tree(params, masks, format: str | Mapping[str, str] | None = None):
    """Packs every sparsified leaf of a tree of parameters; `sparsejax.pack`.

    Args:
      params: any pytree of arrays.
      masks: its masks.
      format: None picks a format per leaf (see the module); a name as for `pack`, for all sparsified leaves; or
        {rule on paths: name}, of which the most specific one that matches counts.

    Returns:
      The tree with formats in place of the packed leaves (dense ones are masked), and a `Report` that says which
      format each leaf has and why: `print(report)`.

    Raises:
      ValueError: as `pack`, naming the leaf; if the masks do not fit; for a rule that matches nothing.
    """
    check_masks(masks, params)
    names = flatten(params)
    rules = format if isinstance(format, Mapping) else {} if format is None else {"*": format}
    for rule in rules:
        if not any(matches(name, (rule,)) for name in names):
            raise ValueError(f"format rule {rule!r} matches no parameter (parameters: {', '.join(names)})")
    report = Report()

    def pack_leaf(name, leaf, mask):
        rule = best_rule(name, rules)
        if not is_sparsified(mask):
            packed, reason = leaf, "not sparsified"
        elif rule is not None:
            packed, reason = _build(leaf, mask, rules[rule], name), "asked for"
        else:
            chosen, reason = _pick(leaf, mask, name)
            packed = _build(leaf, mask, chosen, name)
        kind = packed.format if is_packed(packed) else "dense"
        report.append(Record(name, kind, reason, _dense_bytes(leaf), _bytes(packed)))
        return packed

    return map_with_name(pack_leaf, params, masks), report


def unpack(packed):
    """The dense array of a packed one, or the tree of dense arrays of a packed tree; jit-safe."""
    return jax.tree.map(lambda leaf: leaf.to_dense() if is_packed(leaf) else leaf, packed, is_leaf=is_packed)


def unpack_masks(packed):
    """The masks of a packed tree: a bool array for every packed leaf, the scalar True for those that are dense."""
    return jax.tree.map(
        lambda leaf: leaf.mask() if is_packed(leaf) else jnp.asarray(True), packed, is_leaf=is_packed
    )


def convert(w: Packed, format: str, *, name: str = "weight"):
    """The same weights and mask in another format, named as for `pack`; host only, with the same errors."""
    return pack(w.to_dense(), w.mask(), format, name=name)


def check_format(format: str, name: str = "weight") -> None:
    """Raises ValueError, which lists the known ones, for a name that is no format's."""
    _parse(format, name)


def _parse(format: str, name: str):
    """(class, keywords) of a format's name; the class of "dense" is None."""
    if format == "dense":
        return None, {}
    if format in FORMATS:
        return FORMATS[format], {}
    if found := re.fullmatch(r"(\d+):(\d+)", str(format)):
        return NMArray, {"n": int(found[1]), "m": int(found[2])}
    if found := re.fullmatch(r"block:(\d+)x(\d+)", str(format)):
        return BlockSparseArray, {"block": (int(found[1]), int(found[2]))}
    raise ValueError(f"unknown format {format!r} for {name} (known: {_KNOWN})")


def _build(w, mask, format: str, name: str):
    cls, keywords = _parse(format, name)
    if cls is None:
        check_mask(w, mask, name)
        return mask_weight(jnp.asarray(w), jnp.asarray(mask))
    return cls.from_dense(w, mask, name=name, **keywords)


def _pick(w, mask, name: str) -> tuple[str, str]:
    """The format for a leaf, and why."""
    if not w.size:
        return "dense", "it has no entries"
    keep = on_host(w, mask, name, "any format")[1]
    item, (k, n), inner = jnp.dtype(w.dtype).itemsize, matrix_shape(w.shape), inner_rows(w.shape)
    dense, kept = keep.size * item, int(keep.sum())
    bk, bn = find_block(keep, inner)
    if min(bk, bn) >= MIN_SIDE and 0 < kept <= MAX_BLOCK_DENSITY * keep.size:
        length = ell_length(keep, (bk, bn))
        if n // bn * length * (bk * bn * item + 4) < dense:
            stored = length * bk / k
            reason = f"{kept / keep.size:.1%} of the blocks are kept, {stored:.1%} with padding"
            return f"block:{bk}x{bn}", reason
    if found := find_nm(keep, inner):
        packed = kept * item + -(-(k // found[1]) * found[0] * (found[1].bit_length() - 1) // 8) * n
        if packed < dense:
            return f"{found[0]}:{found[1]}", f"{found[0]} of every {found[1]} along axis -2 are kept"
    sizes = {
        "dense": dense,
        "bitmap": kept * item + -(-keep.size // 8),
        "csr": kept * (item + input_dtype(k).itemsize) + 4 * (n + 1),
    }
    listed = ", ".join(f"{format} {size:,}" for format, size in sizes.items())
    return min(sizes, key=sizes.get), f"{kept / keep.size:.1%} kept; the smallest of {listed} bytes"


def _dense_bytes(leaf) -> int:
    return int(np.size(leaf)) * jnp.result_type(leaf).itemsize


def _bytes(leaf) -> int:
    return leaf.nbytes if is_packed(leaf) else _dense_bytes(leaf)
