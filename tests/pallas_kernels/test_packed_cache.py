"""Packed vectors against numpy, decoding over them in Triton's interpreter, and their bounds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparse_decode_attention import make_bitmap

from pallas_kernels import sparse_decode_attention as decode


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_packing_keeps_the_largest_and_is_exact(data):
    channels = data.draw(st.integers(1, 20))
    budget = data.draw(st.integers(1, channels))
    entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-3])
    x = np.array(data.draw(st.lists(entries, min_size=channels, max_size=channels)), np.float32)
    packed = decode.pack(jnp.asarray(x)[None], budget)
    order = np.lexsort((np.arange(channels), -np.abs(x)))[:budget]
    kept = np.sort(order[x[order] != 0])
    bits = np.unpackbits(np.asarray(packed.bitmap[0]), bitorder="little")
    np.testing.assert_array_equal(np.flatnonzero(bits), kept)
    np.testing.assert_array_equal(packed.values[0], np.append(x[kept], np.zeros(budget - kept.size)))
    expected = np.zeros(channels)
    expected[kept] = x[kept]
    np.testing.assert_array_equal(decode.unpack(packed, channels)[0], expected)
    assert packed.bitmap.shape == (1, -(-channels // 8)) and packed.bitmap.dtype == jnp.uint8


TRITON = """
import sys
import jax
import jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests/pallas_kernels")
import test_sparse_decode_attention as cases
from attention_checks import assert_close
from kernel_checks import InMemory
from pallas_kernels import sparse_decode_attention as decode
from pallas_kernels.sparse_decode_attention import Config, triton, triton_kernel

for shape, soft_cap in [((2, 6, 2, 20, 150, (7, 20)), 2.0), ((1, 1, 1, 64, 40, (32, 24)), None)]:
    q, keys, values, lengths = cases.make_bitmap(*shape)
    expected = decode.bitmap(q, keys, values, lengths, soft_cap=soft_cap, implementation="reference")
    q = q.reshape(shape[0], shape[2], -1, shape[3])
    outs = [np.zeros((3, *q.shape), np.float32), np.zeros((3, *q.shape[:3]), np.float32)]
    inputs = [np.array(x) for x in (q, *keys, *values, lengths)]
    known = triton.constants(q, keys.bitmap, keys.values, values.values, Config(shape[3] ** -0.5, soft_cap))
    triton_kernel.bitmap_kernel[(3, q.shape[0] * q.shape[1])](*map(InMemory, inputs + outs), **known)
    assert_close(decode.merge(*outs), expected, np.float32)
print("same")
"""


def test_bitmap_in_triton_interpreted(assert_prints_same):
    pytest.importorskip("triton")
    assert_prints_same(TRITON, devices=1, TRITON_INTERPRET="1")  # read when Triton is imported


def test_bad_packed_caches_are_told_in_one_sentence():
    q, keys, values, lengths = make_bitmap(2, 4, 2, 16, 9, (8, 8))
    for args, message in [
        (
            (q, keys._replace(bitmap=keys.bitmap[..., :1]), values),
            "keys.bitmap is uint8 of shape (2, 2, 9, 1)",
        ),
        ((q, keys, values._replace(values=values.values[:, :, :4])), "values.values has shape (2, 2, 4, 8)"),
        ((q[0], keys, values), "they must be (B, H, D), (B, Hkv, T, ceil(D / 8)) and (B, Hkv, T, budget)"),
        (
            (q, type(keys)(keys.bitmap[:, :, :0], keys.values[:, :, :0]), values),
            "keys.values has shape (2, 2, 0, 8); no axis may be empty",
        ),
        ((q[:, :3], keys, values), "its heads must be a multiple of the 2 heads of the cache"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            decode.bitmap(*args, lengths)
    for budget in (0, 17):
        with pytest.raises(ValueError, match=f"budget is {budget}; it must be from 1 to the 16 channels"):
            decode.pack(jnp.zeros((2, 16)), budget)
    with pytest.raises(ValueError, match="it is a single number"):
        decode.pack(jnp.float32(1), 1)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_lengths_beyond_the_cache_count_as_all_of_it(implementation):
    q, keys, values, lengths = make_bitmap(2, 4, 2, 16, 9, (8, 8))
    whole = decode.bitmap(q, keys, values, jnp.full_like(lengths, 9), implementation=implementation)
    beyond = decode.bitmap(q, keys, values, jnp.asarray([10, 200], jnp.int32), implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, whole, beyond)
