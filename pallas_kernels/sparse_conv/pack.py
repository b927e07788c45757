"""Packing of convolution kernels on the host; a mask that has no such pattern is refused, with its first violation."""

import jax.numpy as jnp
import numpy as np

BLOCKS = (4, 2, 1)  # of output channels, as XNNPACK's microkernels have them


def pack_pointwise(kernel, mask=None, *, block: int | None = None):
    """A 1 x 1 kernel as `(values, indices)` for `sparse_conv`.

    Elsen et al. [2020] take blocks of 4 or 2 if they are filled to 90 percent; here they must be full, so that training
    what is stored cannot bring back a pruned weight.

    Args:
      kernel: `(1, 1, I, O)`.
      mask: bools of that shape; None keeps what is not zero.
      block: how many consecutive output channels keep the same input channels; the last block may have fewer. None
        takes the largest of 4, 2 and 1 for which that is so.

    Returns:
      values `(B, L, block)` in the kernel's dtype and indices `(B, L)` int32, ascending, -1 in padding; `B = ceil(O /
      block)`, L is the largest number of input channels of a block, at least 1.

    Raises:
      ValueError: one sentence, with the first violation of the pattern.
    """
    kernel, mask = _arrays(kernel, mask)
    if kernel.shape[:2] != (1, 1):
        raise ValueError(
            f"the kernel must be of shape (1, 1, input channels, output channels), got {kernel.shape}"
        )
    kernel, mask = kernel[0, 0].T, mask[0, 0].T
    if block is None:
        block = next(size for size in BLOCKS if _violation(mask, size) is None)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if (found := _violation(mask, block)) is not None:
        first, other, channel = found
        kept, dropped = (first, other) if mask[first, channel] else (other, first)
        raise ValueError(
            f"blocks of {block} output channels must keep the same input channels, but input channel {channel} is kept "
            f"for output channel {kept} and not for {dropped}"
        )
    kept = [np.flatnonzero(row) for row in mask[::block]]
    length = max(1, *(row.size for row in kept))
    padded = np.pad(kernel * mask, ((0, -len(kernel) % block), (0, 0)))
    values = np.zeros((len(kept), length, block), kernel.dtype)
    indices = np.full((len(kept), length), -1, np.int32)
    for at, rows in enumerate(kept):
        indices[at, : rows.size] = rows
        values[at, : rows.size] = padded[at * block : (at + 1) * block, rows].T
    return jnp.asarray(values), jnp.asarray(indices)


def pack_pattern(kernel, mask=None, *, block: int | None = None, patterns: int = 16):
    """A k x k kernel as `(values, positions, channels)` for `pattern_conv`.

    Args:
      kernel: `(kh, kw, I, O)`.
      mask: bools of that shape; None keeps the positions of a filter where any of its weights is not zero.
      block: how many filters of one pattern are packed together; None for as many as the most frequent one has.
      patterns: how many different ones there may be.

    Returns:
      values `(B, P, I, block)` in the kernel's dtype, positions `(B, P)` int32, ascending, and channels `(B, block)`
      int32, ascending; -1 in padding. P is the largest number of positions, at least 1.

    Raises:
      ValueError: one sentence, with the first violation of the pattern.
    """
    if mask is None:
        kernel = np.asarray(kernel)
        mask = np.broadcast_to((kernel != 0).any(axis=2, keepdims=True), kernel.shape)
    kernel, mask = _arrays(kernel, mask)
    wrong = np.argwhere((mask != mask[:, :, :1]).transpose(3, 0, 1, 2))
    if wrong.size:
        channel, row, column, input_channel = wrong[0]
        kept, dropped = (0, input_channel) if mask[row, column, 0, channel] else (input_channel, 0)
        raise ValueError(
            f"a filter must keep the same positions in all input channels, but position ({row}, {column}) of output "
            f"channel {channel} is kept for input channel {kept} and not for {dropped}"
        )
    groups = _groups(mask[:, :, 0].reshape(-1, mask.shape[3]).T, patterns)
    block = max(map(len, groups.values())) if block is None else block
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    blocks = [
        (np.flatnonzero(pattern), np.asarray(channels[start : start + block]))
        for pattern, channels in groups.items()
        for start in range(0, len(channels), block)
    ]
    return _blocks_of_filters(kernel, blocks, block)


def _blocks_of_filters(kernel, blocks, block):
    height, width, inputs, features = kernel.shape
    kernel = kernel.reshape(height * width, inputs, features)
    length = max(1, *(kept.size for kept, _ in blocks))
    values = np.zeros((len(blocks), length, inputs, block), kernel.dtype)
    positions = np.full((len(blocks), length), -1, np.int32)
    names = np.full((len(blocks), block), -1, np.int32)
    for at, (kept, channels) in enumerate(blocks):
        positions[at, : kept.size] = kept
        names[at, : channels.size] = channels
        values[at, : kept.size, :, : channels.size] = kernel[kept][..., channels]
    return tuple(map(jnp.asarray, (values, positions, names)))


def _groups(kept, patterns):
    """{pattern: its output channels}, in order of first appearance."""
    groups = {}
    for channel, row in enumerate(kept):
        groups.setdefault(tuple(row.tolist()), []).append(channel)
        if len(groups) > patterns:
            raise ValueError(
                f"filters may follow {patterns} patterns, but output channel {channel} has the {len(groups)}th"
            )
    return groups


def _arrays(kernel, mask):
    kernel = np.asarray(kernel)
    mask = kernel != 0 if mask is None else np.asarray(mask)
    if kernel.ndim != 4 or 0 in kernel.shape:
        raise ValueError(f"the kernel must be of shape (height, width, inputs, outputs), got {kernel.shape}")
    if mask.shape != kernel.shape or mask.dtype != bool:
        raise ValueError(
            f"the mask must be bools of shape {kernel.shape}, got {mask.dtype} of shape {mask.shape}"
        )
    return kernel, mask


def _violation(mask, block):
    """The first (output channel, another of its block, input channel) that differ in a mask `(O, I)`, or None."""
    first = np.arange(len(mask)) // max(1, block) * block
    wrong = np.argwhere(mask != mask[first])
    return None if not wrong.size else (first[wrong[0][0]], *wrong[0])
