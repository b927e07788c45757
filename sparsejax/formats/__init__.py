"""Packed sparse arrays: N:M, block-sparse, bitmap and CSR, as pytrees.

w = formats.pack(kernel, mask)          # or pack(kernel, mask, "2:4"), "block:32x32", "bitmap", "csr"
y = formats.matmul(x, w)                # under jit, differentiable
formats.unpack(w), w.mask(), w.nbytes, w.compression_ratio

packed, report = sparsejax.pack(params, masks)
formats.save("model.safetensors", packed)
"""

from sparsejax.formats.base import Packed, is_packed
from sparsejax.formats.bitmap import BitmapArray
from sparsejax.formats.block import BlockCSR, BlockSparseArray
from sparsejax.formats.csr import CSRArray
from sparsejax.formats.files import load, save
from sparsejax.formats.group_quantised import GroupQuantisedArray
from sparsejax.formats.interop import from_bcoo, from_bcsr, from_scipy, to_bcoo, to_bcsr, to_scipy
from sparsejax.formats.matmul import matmul
from sparsejax.formats.nm import NMArray
from sparsejax.formats.packing import (
    FORMATS,
    Record,
    Report,
    check_format,
    convert,
    pack,
    pack_tree,
    unpack,
    unpack_masks,
)

__all__ = [
    "FORMATS",
    "BitmapArray",
    "BlockCSR",
    "BlockSparseArray",
    "CSRArray",
    "GroupQuantisedArray",
    "NMArray",
    "Packed",
    "Record",
    "Report",
    "check_format",
    "convert",
    "from_bcoo",
    "from_bcsr",
    "from_scipy",
    "is_packed",
    "load",
    "matmul",
    "pack",
    "pack_tree",
    "save",
    "to_bcoo",
    "to_bcsr",
    "to_scipy",
    "unpack",
    "unpack_masks",
]
