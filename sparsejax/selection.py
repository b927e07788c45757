"""Exact selection of the k largest scores in O(n), without sorting.

Every float is mapped to an unsigned integer of the same order, and the k-th largest integer is found digit
by digit (8 bits at a time, most significant first): each bit of the digit costs one counting pass over a
uint8 array. Equal scores at the threshold are chosen by lowest position, with the same search over
positions, so the number of selected entries is always exactly k.

Each pass only counts. On sharded arrays a pass is therefore one scalar all-reduce (for shards of ordinary
sizes, see `masks.count`), and the same code gives an exact global threshold over a whole tree on a whole
mesh.

Order: +inf is largest, -inf smallest, -0.0 equals 0.0, NaN ranks below everything. Scores may be bfloat16,
float16, float32 or (with x64 enabled) float64, or integers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks import count, flatten

_DIGIT = 8  # bits found per phase; uint8 is what makes a counting pass cheap
_PAIRWISE = 32  # up to this axis length ranks by all-pairs comparison beat the search
_MAX_SIZE = 2**32 - 1  # positions and counts are uint32


def top_k_mask(scores, k, axis: int | None = None, *, candidates=None, keep=None):
    """Bool mask of exactly the `k` largest scores; ties go to the lowest position.

    Args:
      scores: array of any shape.
      k: how many to select: an int, or a traced integer. With `axis` it may be an array that broadcasts
        against `scores` reduced over `axis` with its dimension kept. Clipped to [0, number of entries].
      axis: None selects over the whole array, an int along that axis, independently for each row.
      candidates: optional bool array; entries that are False rank below everything, even NaN.
      keep: optional bool array; entries that are True rank above everything.

    Returns:
      Bool array of the shape of `scores`.

    Raises:
      ValueError: outside `jax.jit`, if the scores contain NaN (inside they rank last), or there are more
        than 2**32 - 1 of them.
    """
    _check({"scores": scores})
    if axis is not None:
        axis = range(jnp.ndim(scores))[axis]
    return _top_k_mask(jnp.asarray(scores), _count_dtype(k), candidates, keep, axis)


def global_top_k_masks(tree, k, *, candidates=None, keep=None):
    """Bool masks of exactly the `k` largest scores over all leaves of a tree together.

    Ties go to the earlier leaf (in tree order), then to the lowest position. `candidates` and `keep` are
    trees like `tree`. Other arguments, order and errors as in `top_k_mask`.
    """
    leaves, structure = jax.tree.flatten(tree)
    _check(flatten(tree))
    flags = [
        structure.flatten_up_to(t) if t is not None else [None] * len(leaves) for t in (candidates, keep)
    ]
    leaves = [jnp.asarray(leaf).astype(jnp.result_type(*leaves)) for leaf in leaves]
    return structure.unflatten(_global_masks(leaves, _count_dtype(k), *flags))


def _count_dtype(k):
    return jnp.asarray(np.uint32(min(max(k, 0), _MAX_SIZE)) if isinstance(k, (int, np.integer)) else k)


def _check(leaves):
    size = sum(math.prod(jnp.shape(leaf)) for leaf in leaves.values())
    if size > _MAX_SIZE:
        raise ValueError(f"cannot select among {size} scores: at most {_MAX_SIZE} are supported")
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        if bool(jnp.isnan(leaf).any()):
            raise ValueError(
                f"{name} of shape {jnp.shape(leaf)} contains NaN; scores must be numbers or infinities"
            )


@jax.jit
def _global_masks(leaves, k, candidates, keep):
    return _select(list(zip(leaves, candidates, keep, strict=True)), k, None)


@jax.jit(static_argnames="axis")
def _top_k_mask(scores, k, candidates, keep, axis):
    if axis is not None and scores.shape[axis] <= _PAIRWISE:
        keys = _ordered(scores, candidates, keep)
        return _pairwise_ranks(keys, axis) < jnp.clip(k, 0, scores.shape[axis]).astype(jnp.int32)
    return _select([(scores, candidates, keep)], k, axis)[0]


def _ordered(scores, candidates, keep):
    """Unsigned integers in the order of the scores: 0 no candidate, 1 NaN, ..., the maximum keep."""
    if jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores if scores.dtype.itemsize > 4 else scores.astype(jnp.float32)
        unsigned = jnp.uint64 if scores.dtype.itemsize == 8 else jnp.uint32
        bits = lax.bitcast_convert_type(jnp.where(scores == 0, jnp.zeros_like(scores), scores), unsigned)
        sign = jnp.asarray(1, unsigned) << (8 * bits.dtype.itemsize - 1)
        keys = jnp.where(bits >= sign, ~bits, bits | sign)
        keys = jnp.where(jnp.isnan(scores), jnp.asarray(1, unsigned), keys)
    else:
        signed = jnp.int64 if scores.dtype.itemsize == 8 else jnp.int32
        unsigned = jnp.uint64 if scores.dtype.itemsize == 8 else jnp.uint32
        if jnp.issubdtype(scores.dtype, jnp.unsignedinteger):
            keys = scores.astype(unsigned)
        else:
            flip = jnp.asarray(1, unsigned) << (8 * jnp.dtype(unsigned).itemsize - 1)
            keys = lax.bitcast_convert_type(scores.astype(signed), unsigned) ^ flip
    top = jnp.asarray(jnp.iinfo(unsigned).max, unsigned)
    if candidates is not None:
        keys = jnp.where(candidates, keys, jnp.asarray(0, unsigned))
    return keys if keep is None else jnp.where(keep, top, keys)


def _pairwise_ranks(keys, axis):
    """How many entries of the row come before each entry; one fused pass for short axes."""
    rank = jnp.zeros(keys.shape, jnp.int32)
    position = lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    for j in range(keys.shape[axis]):
        other = lax.slice_in_dim(keys, j, j + 1, axis=axis)
        rank += (other > keys) | ((other == keys) & (j < position))
    return rank


def _select(leaves, k, axis):
    """Masks of the k largest of a list of (scores, candidates, keep) taken together (along `axis` if any).

    The search is over pairs (key, reversed position), which are all different. It stops as soon as exactly k
    entries reach the threshold, which without ties is before the first digit of the position.
    """
    shapes = [scores.shape for scores, _, _ in leaves]
    sizes = [math.prod(shape) if axis is None else shape[axis] for shape in shapes]
    offsets = np.cumsum([0, *sizes[:-1]]).astype(np.uint32)

    def entries(leaves, offsets):
        return [
            (_ordered(*leaf), ~_position(shape, axis, offset))
            for leaf, shape, offset in zip(leaves, shapes, offsets, strict=True)
        ]

    def entries_of_step(step):
        # Pairs are cheaper to make again in every step than to keep: they would double the memory needed.
        # The barrier ties them to the step, else XLA would make them once, before the loop.
        return entries(*lax.optimization_barrier((leaves, list(map(jnp.asarray, offsets)), step))[:2])

    k = jnp.minimum(jnp.maximum(k, 0).astype(jnp.uint32), jnp.uint32(sum(sizes)))
    unsigned = jax.eval_shape(lambda: entries(leaves, offsets)[0][0]).dtype
    rows = () if axis is None else _row_shape(shapes[0], axis)
    threshold, last = _kth_largest(entries_of_step, k, sum(sizes), axis, unsigned, rows)
    return [
        ((key > threshold) | ((key == threshold) & (order >= last))) & (k > 0)
        for key, order in entries(leaves, offsets)
    ]


def _kth_largest(entries_of_step, k, size: int, axis, unsigned, rows):
    """The k-th largest (key, order), up to digits that do not matter any more (they are 0)."""
    last_digit = unsigned.itemsize + 4  # a position is 4 bytes

    def next_digit(carry):
        i, threshold, last, above, at_least = carry
        in_key = i < unsigned.itemsize
        shift = _DIGIT * (jnp.where(in_key, unsigned.itemsize, last_digit) - 1 - i)
        digits = [_digit(*entry, threshold, last, in_key, shift) for entry in entries_of_step(i)]

        def next_bit(j, found):
            digit, rejected, at_least = found
            trial = digit | (jnp.uint8(1 << (_DIGIT - 1)) >> j.astype(jnp.uint8))
            reached = above + sum(count(values >= trial, axis) for values in digits)
            accept = reached >= k
            return (
                jnp.where(accept, trial, digit),
                jnp.where(accept, rejected, reached),
                jnp.where(accept, reached, at_least),
            )

        # what the last rejected trial reached is what lies above the digit: all later bits are ones
        found = lax.fori_loop(0, _DIGIT, next_bit, (jnp.zeros(rows, jnp.uint8), above, at_least))
        digit, above, at_least = found
        threshold = jnp.where(
            in_key, threshold | (digit.astype(unsigned) << shift.astype(unsigned)), threshold
        )
        last = jnp.where(in_key, last, last | (digit.astype(jnp.uint32) << shift.astype(jnp.uint32)))
        return i + 1, threshold, last, above, at_least

    def unfinished(carry):
        i, *_, at_least = carry
        return (i < last_digit) & jnp.any(at_least != k)

    zero = jnp.zeros(rows, jnp.uint32)
    start = (jnp.int32(0), jnp.zeros(rows, unsigned), zero, zero, jnp.full(rows, size, jnp.uint32))
    _, threshold, last, _, _ = lax.while_loop(unfinished, next_digit, start)
    return threshold, last


def _digit(key, order, threshold, last, in_key, shift):
    """The 8 bits at `shift` of the key (or the order) of entries that share all digits found so far, else 0.

    Entries above were counted in an earlier phase, entries below can no longer matter, and the smallest trial
    is 1. The barrier keeps XLA from recomputing the digits in every counting pass.
    """
    of_key = _byte(key, threshold, shift, True)
    of_order = _byte(order, last, shift, key == threshold)
    return lax.optimization_barrier(jnp.where(in_key, of_key, of_order))


def _byte(values, prefix, shift, candidates):
    shift = shift.astype(values.dtype)
    same = ((values >> shift) >> _DIGIT == (prefix >> shift) >> _DIGIT) & candidates
    return jnp.where(same, (values >> shift).astype(jnp.uint8), jnp.uint8(0))


def _position(shape, axis, offset):
    """uint32 row-major position of every entry (or its index along `axis`), without reshaping shards."""
    if axis is not None:
        return lax.broadcasted_iota(jnp.uint32, shape, axis)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    index = jnp.full(shape, offset, jnp.uint32)
    for i, stride in enumerate(strides):
        index += lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride)
    return index


def _row_shape(shape, axis):
    return shape[:axis] + (1,) + shape[axis + 1 :]
