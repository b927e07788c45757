"""Packed vectors in shared memory to dense ones in registers, on GPUs.

Pallas has no gather from shared memory, so this goes one floor lower, to MLIR: every thread finds, for each matrix
element that its registers hold, the word of the bitmap and counts the stored channels before.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref


def expand(bits_ref, values_ref, channels):
    """Packed vectors as (tokens, channels).

    Args:
      bits_ref: (tokens * channels / 32,) int32, the bitmaps as little-endian words, in shared memory.
      values_ref: (tokens, budget) of a 16-bit type, in shared memory.
    """
    result = plgpu.ShapeDtypeStruct(
        (values_ref.shape[0], channels), values_ref.dtype, layout=plgpu.Layout.WGMMA
    )
    types = (plgpu.RefType(), plgpu.RefType())
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(_expand_registers)(bits_ref, values_ref)


def _expand_registers(ctx, words, values):
    del ctx
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    tokens, _ = ir.MemRefType(values.type).shape
    per_token = ir.MemRefType(words.type).shape[0] // tokens
    dtype = ir.MemRefType(values.type).element_type
    zero = mgpu.c(0, dtype)

    def number(value):
        return mgpu.c(value, i32)

    def element(_, position):
        token, channel = position
        first = arith.muli(token, mgpu.c(per_token, index))
        channel = arith.index_cast(i32, channel)
        word_index, bit = arith.shrui(channel, number(5)), arith.andi(channel, number(31))
        before, word = number(0), number(0)
        for i in range(per_token):  # after unrolling, which word it is is known, and the others fold away
            this = memref.load(words, [arith.addi(first, mgpu.c(i, index))])
            is_before = arith.cmpi(arith.CmpIPredicate.ult, number(i), word_index)
            before = arith.addi(before, arith.select(is_before, math.ctpop(this), number(0)))
            is_it = arith.cmpi(arith.CmpIPredicate.eq, number(i), word_index)
            word = arith.select(is_it, this, word)
        flag = arith.shli(number(1), bit)
        lower = arith.andi(word, arith.subi(flag, number(1)))
        stored = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(word, flag), number(0))
        place = arith.select(stored, arith.addi(before, math.ctpop(lower)), number(0))
        value = memref.load(values, [token, arith.index_cast(index, place)])
        return arith.select(stored, value, zero)

    shape = (tokens, 32 * per_token)
    empty = mgpu.FragmentedArray.splat(zero, shape, layout=mgpu.WGMMA_LAYOUT)
    return empty.foreach(element, create_array=True)
