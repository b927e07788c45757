"""Masks as lists, and loops over lists of different lengths."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lists import block_lists
from pallas_kernels.ragged import fold_rows


def test_lists_name_what_a_mask_selects():
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.4
    lists = block_lists(jnp.asarray(mask))
    for row in np.ndindex(2, 5):
        selected = np.flatnonzero(mask[row])
        assert lists.counts[row] == selected.size
        np.testing.assert_array_equal(lists.indices[row], [*selected] + [-1] * (7 - selected.size))
    short = jax.jit(lambda mask: block_lists(mask, 3))(jnp.asarray(mask))
    np.testing.assert_array_equal(short.indices, lists.indices[..., :3])
    np.testing.assert_array_equal(short.counts, mask.sum(-1))
    with pytest.raises(ValueError, match=re.escape(f"selects {mask.sum(-1).max()} blocks in one row")):
        block_lists(jnp.asarray(mask), int(mask.sum(-1).max()) - 1)


def test_the_cost_follows_the_sum_of_the_counts():
    counts = jnp.asarray([1, 0, 9, 1, 2])
    taken = []

    def step(t, rows, state):
        jax.debug.callback(lambda t: taken.append(int(t)), t)
        return jnp.where(t < counts[rows], state + t, state)

    sums = fold_rows(counts, lambda rows: jnp.zeros(rows.size, jnp.int32), step, elements=2**18)
    np.testing.assert_array_equal(sums, [0, 0, 36, 0, 1])
    jax.effects_barrier()
    assert len(taken) == counts.sum()
