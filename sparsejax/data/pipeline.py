"""Batches as a pure function of (seed, step), so that a run resumes exactly from a step number alone.

The data are in memory, so an element of the grain pipeline is a whole batch: one gather per step, made by one
thread a few batches ahead of the training loop. Handling single examples would cost more than a small
model's training step.
"""

import functools

import grain
import numpy as np

from sparsejax.masks import choose

PAD = 4
# One reader is enough to hide a gather behind a training step; more only compete for the interpreter lock.
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def batches(x, y, *, batch_size: int, steps: int, seed: int, augment: str = "none", start: int = 0):
    """An iterator over the batches of steps `start`, ..., `steps - 1`.

    Every epoch visits a new permutation of the examples, whose remainder (less than a batch) is dropped.
    Batch i depends on `seed` and i only: starting at i gives the same batches as skipping to i.

    Args:
      x: array `(n, ...)`; images are `(n, height, width, channels)`.
      y: array `(n, ...)`.
      batch_size: examples per batch, at most n.
      steps: the last step, exclusive.
      seed: a non-negative integer.
      augment: "none", or "crop_flip": a random crop of the image padded by 4 zero pixels on each side, and a
        horizontal flip with probability 1/2.
      start: the first step.

    Returns:
      A grain iterator (it has `get_state` and `set_state`) over `{"x": ..., "y": ...}` of numpy arrays.

    Raises:
      ValueError: if the batch is empty or larger than the data, or the augmentation is unknown or does
        not fit `x`.
    """
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size={batch_size} must be in [1, {len(x)}], the number of examples")
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} examples but y has {len(y)}")
    transform = choose("augmentation", augment, AUGMENTATIONS)
    if augment != "none" and x.ndim != 4:
        raise ValueError(
            f"augment={augment!r} needs images (n, height, width, channels), not shape {x.shape}"
        )
    steps_per_epoch = len(x) // batch_size

    # Only the current epoch's permutation is kept: consecutive steps share it.
    @functools.lru_cache(maxsize=1)
    def permutation(epoch):
        return _generator(seed, 0, epoch).permutation(len(x))

    def batch(step):
        epoch, place = divmod(step, steps_per_epoch)
        rows = permutation(epoch)[place * batch_size : (place + 1) * batch_size]
        return {"x": transform(x[rows], seed, step), "y": y[rows]}

    return iter(grain.MapDataset.range(start, steps).map(batch).to_iter_dataset(READ))


def crop_flip(images: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Random crops of the zero-padded images, half of them mirrored; shape and dtype as `images`."""
    count, height, width, channels = images.shape
    rng = _generator(seed, 1, step)
    tops, lefts = rng.integers(0, 2 * PAD + 1, (2, count, 1))
    flips = rng.integers(0, 2, (count, 1))
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    # One gather of whole pixels: the row of each is in the padded batch seen as a matrix (pixels, channels).
    rows = np.arange(count)[:, None] * (height + 2 * PAD) + tops + np.arange(height)
    columns = lefts + np.where(flips, np.arange(width)[::-1], np.arange(width))
    pixels = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]
    return padded.reshape(-1, channels).take(pixels, axis=0)


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    # The streams keep permutations and augmentations of the same index independent.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, index))))


AUGMENTATIONS = {"none": lambda images, seed, step: images, "crop_flip": crop_flip}
