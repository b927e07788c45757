"""What the attention kernels for TPUs share: a grid over rows and, innermost and in sequence, over the list of each row.

The lists are scalars that are known before the blocks are fetched; the index maps look them up, so only listed blocks
travel to the chip. The grid is as long as the longest list. After the end of its own list a row asks for its last
block again, which starts no new transfer, and computes nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30  # finite: a row that has seen no key yet must not subtract infinities
_SCALARS = 2**16  # entries of the lists that one call keeps in scalar memory, 256 KiB


def dot(a, b, axis_of_a, axis_of_b):
    """Contracts one axis of each of two matrices, in float32."""
    contracted = (((axis_of_a,), (axis_of_b,)), ((), ()))
    # by default the matrix unit would round float32 to bfloat16
    precision = lax.Precision.HIGHEST if jnp.float32 in (a.dtype, b.dtype) else None
    return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def over_lists(kernel, lists, lengths, *, rows, entries, outs, scratch, unit=1):
    """Runs a kernel over every row and every entry of its list.

    Args:
      kernel: takes (row, entry, step, length), then the refs of `rows`, `entries`, `outs` and `scratch`; it may rely
        on steps being taken in order, and must initialise at step 0, do nothing in steps past the end, and write its
        results in the last step of the grid.
      lists: (R, limit) int32.
      lengths: (R,) int32; the list of a row ends after ceil(length / unit) entries.
      rows: arrays (R, ...), of which the kernel sees the part of its row.
      entries: (array, block shape, (row, entry) -> index of the block).
      outs: (shape, dtype) of a row's results.
      scratch: shapes of float32 memory that lasts from step to step.
    """
    limit = lists.shape[1]
    steps = jnp.maximum(pl.cdiv(lengths.max(), unit), 1)

    def listed(r, t, first, lists, lengths):
        last = jnp.maximum(pl.cdiv(lengths[r], unit) - 1, 0)
        return first[0] + r, jnp.maximum(lists[r * limit + jnp.minimum(t, last)], 0)

    def body(first, lists, lengths, *refs):
        r, t = pl.program_id(0), pl.program_id(1)
        kernel(*listed(r, t, first, lists, lengths), t, lengths[r], *refs)

    def by_row(shape):
        return pl.BlockSpec((None, *shape), lambda r, t, *_: (r, *(0 for _ in shape)))

    def by_entry(shape, where):
        return pl.BlockSpec(shape, lambda *args: where(*listed(*args)))

    def some_rows(first, lists, lengths, *rows):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(lists.shape[0], steps),
            in_specs=[by_row(x.shape[1:]) for x in rows] + [by_entry(*entry[1:]) for entry in entries],
            out_specs=[by_row(shape) for shape, _ in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )
        return pl.pallas_call(
            body,
            grid_spec=grid,
            out_shape=[jax.ShapeDtypeStruct((lists.shape[0], *shape), dtype) for shape, dtype in outs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        )(first, lists.ravel(), lengths, *rows, *(entry[0] for entry in entries))

    return _in_chunks(some_rows, max(1, _SCALARS // limit), lists, lengths, *rows)


def _in_chunks(function, size, *rows):
    """`function(first row, *rows)`, called for at most `size` rows at a time."""
    total = rows[0].shape[0]
    if total <= size:
        return function(jnp.zeros(1, jnp.int32), *rows)
    chunks = -(-total // size)
    size = -(-total // chunks)
    padded = [jnp.pad(x, ((0, chunks * size - total), *((0, 0),) * (x.ndim - 1))) for x in rows]
    split = [x.reshape(chunks, size, *x.shape[1:]) for x in padded]
    first = jnp.arange(chunks, dtype=jnp.int32)[:, None] * size
    outs = lax.map(lambda args: function(*args), (first, *split))
    return [out.reshape(-1, *out.shape[2:])[:total] for out in outs]


def softmax_start(top_ref, total_ref, acc_ref):
    """Starts an online softmax: nothing seen yet."""
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)


def softmax_step(logits, values, top_ref, total_ref, acc_ref):
    """Adds keys with logits (queries, keys), `MASKED` where not seen, and values (keys, channels)."""
    top = top_ref[:, :1]
    new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - new_top)
    decay = jnp.exp(top - new_top)
    total = decay * total_ref[:, :1] + weights.sum(-1, keepdims=True)
    acc_ref[...] = decay * acc_ref[...] + dot(weights.astype(values.dtype), values, 1, 0)
    top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)


def softmax_end(out_ref, lse_ref, top_ref, total_ref, acc_ref):
    """Writes the weighted mean of the values, and the log-sum-exp to all lanes."""
    empty = top_ref[...] == MASKED  # then the sums hold masked keys, or nothing
    total = jnp.where(empty, 1, total_ref[...])
    lse_ref[...] = jnp.where(empty, -jnp.inf, top_ref[...] + jnp.log(total))
    out_ref[...] = jnp.where(empty[:, :1], 0, acc_ref[...] / total[:, :1]).astype(out_ref.dtype)
