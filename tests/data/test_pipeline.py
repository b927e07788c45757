"""Batches: epochs are permutations, resuming is exact, crops and flips are windows of the padded image."""

import numpy as np
import pytest

from sparsejax.data.pipeline import batches, crop_flip

X = np.arange(10, dtype=np.float32)[:, None]
Y = np.arange(10, dtype=np.int32) * 7


def take(**kw):
    return list(batches(X, Y, **{"batch_size": 3, "steps": 9, "seed": 0, **kw}))


def rows(items):
    return np.concatenate([batch["x"][:, 0].astype(int) for batch in items])


def test_epochs_are_different_permutations_without_the_remainder():
    items = take()
    assert len(items) == 9 and all(batch["x"].shape == (3, 1) for batch in items)
    epochs = rows(items).reshape(3, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for batch in items:
        np.testing.assert_array_equal(batch["y"], batch["x"][:, 0] * 7)
        assert batch["x"].dtype == np.float32 and batch["y"].dtype == np.int32


def test_every_example_is_drawn_equally_often():
    counts = np.bincount(rows(take(steps=3000)), minlength=10)
    # 900 expected, each with standard deviation sqrt(1000 * 0.9 * 0.1) = 9.5: five of them.
    assert np.abs(counts - 900).max() < 48


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_starting_at_a_step_equals_skipping_to_it(start):
    np.testing.assert_equal(take(start=start), take()[start:])


def test_the_seed_decides_and_nothing_else():
    np.testing.assert_equal(take(), take())
    assert not np.array_equal(rows(take(seed=1)), rows(take()))
    np.testing.assert_equal(take(steps=5), take()[:5])


def test_iterator_state_resumes():
    whole = take()
    iterator = batches(X, Y, batch_size=3, steps=9, seed=0)
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    other = batches(X, Y, batch_size=3, steps=9, seed=0)
    other.set_state(state)
    np.testing.assert_equal(list(other), whole[4:])


def test_batches_are_copies():
    batch = next(batches(X, Y, batch_size=10, steps=1, seed=0))
    batch["x"][:] = -1
    assert X.min() == 0


def test_crops_are_windows_of_the_padded_image():
    images = np.random.default_rng(0).standard_normal((200, 6, 5, 3)).astype(np.float32)
    out = crop_flip(images, seed=0, step=0)
    assert out.shape == images.shape and out.dtype == images.dtype
    found = []
    for image, crop in zip(images, out, strict=True):
        padded = np.zeros((14, 13, 3), np.float32)
        padded[4:10, 4:9] = image
        windows = {
            (top, left, flip): padded[top : top + 6, left : left + 5][:, :: 1 - 2 * flip]
            for top in range(9)
            for left in range(9)
            for flip in (0, 1)
        }
        matches = [key for key, window in windows.items() if np.array_equal(window, crop)]
        assert matches
        found.append(matches[0])
    tops, lefts, flips = np.array(found).T
    assert set(tops) == set(lefts) == set(range(9))
    assert 70 <= flips.sum() <= 130  # 100 expected with deviation 7


def test_augmented_batches_are_a_function_of_seed_and_step():
    images = np.random.default_rng(0).standard_normal((8, 4, 4, 1)).astype(np.float32)
    arguments = {"batch_size": 4, "steps": 6, "augment": "crop_flip"}
    whole = list(batches(images, np.arange(8), seed=0, **arguments))
    np.testing.assert_equal(list(batches(images, np.arange(8), seed=0, start=3, **arguments)), whole[3:])
    plain = list(batches(images, np.arange(8), seed=0, batch_size=4, steps=6))
    for batch, augmented in zip(plain, whole, strict=True):
        np.testing.assert_array_equal(batch["y"], augmented["y"])
    assert not np.array_equal(plain[0]["x"], whole[0]["x"])
    assert not np.array_equal(crop_flip(images, 0, 0), crop_flip(images, 0, 1))
    assert not np.array_equal(crop_flip(images, 0, 0), crop_flip(images, 1, 0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 11}, r"batch_size=11 must be in \[1, 10\]"),
        ({"batch_size": 0}, r"batch_size=0 must be in \[1, 10\]"),
        ({"augment": "crop"}, r"unknown augmentation 'crop'.*\(known: crop_flip, none\)"),
        ({"augment": "crop_flip"}, r"needs images .* not shape \(10, 1\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        take(**change)


def test_mismatched_lengths():
    with pytest.raises(ValueError, match="x has 10 examples but y has 9"):
        batches(X, Y[:9], batch_size=3, steps=1, seed=0)
