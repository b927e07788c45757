"""Decoding over selected pages and packed caches: the definition against numpy, and implementations against it."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sparse_decode_attention as decode
from pallas_kernels.sparse_decode_attention import Config, pallas_gpu, pallas_tpu, reference

ON_GPU = jax.default_backend() == "gpu"
interpreted = pytest.mark.skipif(
    not ON_GPU and not hasattr(plgpu, "InterpretGPUParams"),
    reason="JAX before 0.11 cannot interpret Mosaic GPU kernels",
)


def make_paged(batch, heads, kv_heads, channels, pages, page, slots, dtype=jnp.float32, seed=0):
    """q, pools, a table per head with holes, and lengths, the first of them 0."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, heads, channels)), dtype)
    pools = [jnp.asarray(rng.normal(size=(pages, page, kv_heads, channels)), dtype) for _ in range(2)]
    table = rng.integers(-1, pages, size=(batch, kv_heads, slots))
    lengths = rng.integers(1, slots * page + 1, size=batch)
    lengths[0] = 0 if batch > 1 else lengths[0]
    return q, *pools, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


def make_bitmap(batch, heads, kv_heads, channels, tokens, budgets, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, heads, channels)), dtype)
    shape = (batch, kv_heads, tokens, channels)
    packed = [decode.pack(jnp.asarray(rng.normal(size=shape), dtype), budget) for budget in budgets]
    lengths = rng.integers(1, tokens + 1, size=batch)
    lengths[0] = tokens
    return q, *packed, jnp.asarray(lengths, jnp.int32)


def one_query(q, keys, values, scale, soft_cap):
    """Attention of one head over its keys, in float64."""
    if not len(keys):
        return np.zeros_like(q), -np.inf
    logits = scale * keys @ q
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    weights = np.exp(logits)
    return weights @ values / weights.sum(), np.log(weights.sum())


def close(found, expected, dtype):
    """Equal up to the rounding of the dtype, -inf where the other is."""
    tolerance = 2e-5 if dtype == jnp.float32 else 3e-2
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(x, np.float32).reshape(np.shape(other)) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_the_definition_reads_the_selected_pages():
    q, k, v, table, lengths = make_paged(3, 4, 2, 8, 9, 4, 5)
    table = table.at[2, 1].set(-1)
    found = decode.paged(q, k, v, table, lengths, scale=0.6, soft_cap=3.0, implementation="reference")
    for b, h in np.ndindex(3, 4):
        group = h // 2
        seen = [
            (table[b, group, s], o)
            for s in range(5)
            for o in range(4)
            if table[b, group, s] >= 0 and s * 4 + o < lengths[b]
        ]
        keys, values = (np.array([x[p, o, group] for p, o in seen], np.float64) for x in (k, v))
        expected = one_query(np.asarray(q[b, h], np.float64), keys, values, 0.6, 3.0)
        close((found[0][b, h], found[1][b, h]), expected, jnp.float32)


def test_a_cache_that_is_read_as_a_whole_is_dense_attention():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, t, h, 16)), jnp.float32) for t, h in ((1, 4), (12, 2), (12, 2))
    )
    lengths = jnp.asarray([12, 7])
    expected = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)[:, 0]
    pools = [x.reshape(6, 4, 2, 16) for x in (k, v)]
    table = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    close(decode.paged(q[:, 0], *pools, table, lengths)[0], expected, jnp.float32)
    packed = [decode.pack(x.swapaxes(1, 2), 16) for x in (k, v)]
    close(decode.bitmap(q[:, 0], *packed, lengths)[0], expected, jnp.float32)


PAGED = {
    "holes, an empty sequence": ((3, 4, 2, 16, 9, 4, 7), 2.0, jnp.float32),
    "long pages": ((2, 2, 2, 8, 3, 200, 2), None, jnp.float32),
    "one head, bfloat16": ((1, 1, 1, 32, 9, 16, 5), None, jnp.bfloat16),
}
BITMAP = {
    "odd channels": ((2, 4, 2, 13, 150, (5, 7)), 2.0, jnp.float32),
    "one token": ((1, 1, 1, 16, 1, (1, 16)), None, jnp.float32),
    "bfloat16": ((2, 2, 1, 64, 40, (32, 24)), None, jnp.bfloat16),
}


def objective(function, *rest, **options):
    def scalar(*floats):
        out, lse = function(*floats, *rest, **options)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return (weights * out).sum() + jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0)).sum(), (out, lse)

    return scalar


@pytest.mark.parametrize("case", PAGED)
def test_paged_in_xla_equals_the_definition_and_so_do_its_gradients(case):
    shape, soft_cap, dtype = PAGED[case]
    *floats, table, lengths = make_paged(*shape, dtype=dtype)
    found, expected = (
        jax.jit(jax.grad(objective(decode.paged, table, lengths, soft_cap=soft_cap, implementation=name), (0, 1, 2), has_aux=True))(*floats)
        for name in ("xla", "reference")
    )  # fmt: skip
    close(found, expected, dtype)


@pytest.mark.parametrize("case", BITMAP)
def test_bitmap_in_xla_equals_the_definition_and_so_do_its_gradients(case):
    shape, soft_cap, dtype = BITMAP[case]
    q, keys, values, lengths = make_bitmap(*shape, dtype=dtype)

    def attend(q, k, v, **options):
        packed = keys._replace(values=k), values._replace(values=v)
        return decode.bitmap(q, *packed, lengths, soft_cap=soft_cap, **options)

    found, expected = (
        jax.jit(jax.grad(objective(attend, implementation=name), (0, 1, 2), has_aux=True))(
            q, keys.values, values.values
        )
        for name in ("xla", "reference")
    )
    close(found, expected, dtype)


def test_gradients_are_those_of_the_softmax():
    """Autodiff of a definition written here, on the unpacked cache."""
    q, keys, values, lengths = make_bitmap(2, 2, 1, 16, 9, (8, 8))

    def dense(q, k, v):
        k, v = (decode.unpack(decode.Packed(p.bitmap, x), 16)[:, 0] for p, x in ((keys, k), (values, v)))
        logits = jnp.einsum("bhd,btd->bht", q, k) / 4 + jnp.where(
            jnp.arange(9) < lengths[:, None, None], 0, -jnp.inf
        )
        return jnp.einsum("bht,btd->bhd", jax.nn.softmax(logits), v), jax.nn.logsumexp(logits, -1)

    def ours(q, k, v):
        return decode.bitmap(q, keys._replace(values=k), values._replace(values=v), lengths)

    args = q, keys.values, values.values
    found, expected = (jax.grad(objective(f), (0, 1, 2), has_aux=True)(*args) for f in (ours, dense))
    close(found, expected, jnp.float32)


def kernel_arguments(q, kv_heads, soft_cap):
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[-1]), Config(q.shape[-1] ** -0.5, soft_cap)


def check_paged(module, shape, dtype, soft_cap, interpret):
    q, k, v, table, lengths = make_paged(*shape, dtype=dtype)
    q, config = kernel_arguments(q, k.shape[2], soft_cap)
    found = jax.jit(lambda *args: module.paged(*args, config, interpret=interpret))(q, k, v, table, lengths)
    close(found, reference.paged(q, k, v, table, lengths, config), dtype)


def check_bitmap(module, shape, dtype, soft_cap, interpret):
    q, keys, values, lengths = make_bitmap(*shape, dtype=dtype)
    q, config = kernel_arguments(q, keys.values.shape[1], soft_cap)
    args = (q, *keys, *values, lengths)
    found = jax.jit(lambda *args: module.bitmap(*args, config, interpret=interpret))(*args)
    close(found, reference.bitmap(*args, config), dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "soft_cap"),
    [((3, 6, 2, 128, 9, 8, 5), jnp.bfloat16, None), ((2, 2, 1, 16, 9, 5, 3), jnp.float32, 2.0)],
)
def test_paged_on_tpus_interpreted(shape, dtype, soft_cap):
    check_paged(pallas_tpu, shape, dtype, soft_cap, interpret=True)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 4, 2, 128, 150, (64, 48)), jnp.bfloat16), ((1, 2, 2, 128, 9, (30, 128)), jnp.float32)],
)
def test_bitmap_on_tpus_interpreted(shape, dtype):
    check_bitmap(pallas_tpu, shape, dtype, 2.0, interpret=True)


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype", "soft_cap"),
    [
        ((2, 6, 2, 64, 9, 16, 7), jnp.bfloat16, 2.0),
        ((1, 1, 1, 128, 9, 128, 2), jnp.float16, None),
    ],
)
def test_paged_on_gpus(shape, dtype, soft_cap, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "_BLOCKS", 8)  # some splits are empty, some hold two tiles
    check_paged(pallas_gpu, shape, dtype, soft_cap, None if ON_GPU else plgpu.InterpretGPUParams())


@interpreted
def test_bitmap_on_gpus(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "_BLOCKS", 4)
    interpret = None if ON_GPU else plgpu.InterpretGPUParams()
    check_bitmap(pallas_gpu, (1, 3, 1, 64, 150, (32, 24)), jnp.bfloat16, None, interpret)


class InMemory:
    """What Triton's interpreter asks of a PyTorch tensor, for a numpy array that it reads and writes in place."""

    def __init__(self, array):
        self.array = array
        self.dtype = f"torch.{array.dtype.name}"

    def data_ptr(self):
        return self.array.ctypes.data

    untyped_storage = cpu = new_empty = lambda self, *args, **kwargs: self
    storage_offset = size = stride = set_ = copy_ = lambda self, *args: None


TRITON = """
import sys
import jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests/pallas_kernels")
import test_sparse_decode_attention as cases
from pallas_kernels.sparse_decode_attention import reference, triton, xla

for shape, soft_cap in [((2, 6, 2, 20, 150, (7, 20)), 2.0), ((1, 1, 1, 64, 40, (32, 24)), None)]:
    q, keys, values, lengths = cases.make_bitmap(*shape)
    q, config = cases.kernel_arguments(q, shape[2], soft_cap)
    splits = 3
    outs = [np.zeros((splits, *q.shape), np.float32), np.zeros((splits, *q.shape[:3]), np.float32)]
    inputs = [np.array(x) for x in (q, *keys, *values, lengths)]
    known = triton.constants(q, keys.bitmap, keys.values, values.values, config)
    triton.kernel[(splits, q.shape[0] * q.shape[1])](*map(cases.InMemory, inputs + outs), **known)
    found = xla.merge(*map(jnp.asarray, outs))
    cases.close(found, reference.bitmap(q, *keys, *values, lengths, config), np.float32)
print("same")
"""


def test_bitmap_in_triton_interpreted():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    done = subprocess.run(
        [sys.executable, "-c", TRITON], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]


def lowered(platform, function, *args):
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(
        *args
    ).mlir_module()


@pytest.mark.parametrize(
    ("module", "platform", "page", "call"),
    [(pallas_gpu, "cuda", 16, "mosaic_gpu"), (pallas_gpu, "cuda", 128, "mosaic_gpu"), (pallas_tpu, "tpu", 16, "tpu_custom_call")],
)  # fmt: skip
def test_paged_is_lowered_without_the_device(module, platform, page, call):
    q, k, v, table, lengths = make_paged(2, 8, 2, 128, 9, page, 6, dtype=jnp.bfloat16)
    q, config = kernel_arguments(q, 2, 30.0)
    assert call in lowered(platform, lambda *args: module.paged(*args, config), q, k, v, table, lengths)


@pytest.mark.parametrize(
    ("module", "platform", "call"),
    [(pallas_gpu, "cuda", "mosaic_gpu"), (pallas_tpu, "tpu", "tpu_custom_call")],
)
def test_bitmap_is_lowered_without_the_device(module, platform, call):
    q, keys, values, lengths = make_bitmap(2, 8, 2, 128, 256, (64, 48), dtype=jnp.bfloat16)
    q, config = kernel_arguments(q, 2, None)
    assert call in lowered(platform, lambda *args: module.bitmap(*args, config), q, *keys, *values, lengths)


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


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_table(data):
    page, slots, kv_heads = (data.draw(st.integers(1, n)) for n in (6, 5, 2))
    per_head = data.draw(st.booleans())
    q, k, v, _, _ = make_paged(2, 2, kv_heads, 4, 5, page, slots)
    shape = (2, kv_heads, slots) if per_head else (2, slots)
    size = int(np.prod(shape))
    entries = data.draw(st.lists(st.integers(-1, 4), min_size=size, max_size=size))
    table = jnp.asarray(entries, jnp.int32).reshape(shape)
    lengths = jnp.asarray([data.draw(st.integers(0, page * slots + 2)) for _ in range(2)], jnp.int32)
    found, expected = (
        decode.paged(q, k, v, table, lengths, implementation=name) for name in ("xla", "reference")
    )
    close(found, expected, jnp.float32)


def test_merged_parts_are_the_whole():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape) for shape in ((4,), (9, 4), (9, 4)))
    parts = [one_query(q, k[part], v[part], 1.0, None) for part in (slice(0, 4), slice(4, 4), slice(4, 9))]
    outs, lses = (jnp.asarray(np.array(x), jnp.float32) for x in zip(*parts, strict=True))
    close(decode.merge(outs, lses), one_query(q, k, v, 1.0, None), jnp.float32)
    out, lse = decode.merge(jnp.ones((2, 3, 4)), jnp.full((2, 3), -jnp.inf))
    assert (out == 0).all() and (lse == -jnp.inf).all()
    with pytest.raises(ValueError, match=re.escape("they must be (parts, ..., D) and (parts, ...)")):
        decode.merge(outs, lses[:2])


def test_mapped():
    q, k, v, table, lengths = make_paged(4, 4, 2, 8, 9, 4, 5)
    whole = decode.paged(q, k, v, table, lengths)
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, table, lengths)]
    shared = jax.vmap(lambda q, table, lengths: decode.paged(q, k, v, table, lengths))(*split)
    close([x.reshape(-1, *x.shape[2:]) for x in shared], whole, jnp.float32)
    pools = [jnp.stack([x, 2 * x]) for x in (k, v)]
    own = jax.vmap(decode.paged)(split[0], *pools, *split[1:])
    for i in range(2):
        close(
            [x[i] for x in own],
            decode.paged(split[0][i], pools[0][i], pools[1][i], *(x[i] for x in split[1:])),
            jnp.float32,
        )
    mixed = jax.vmap(decode.paged, (0, 0, None, 0, 0))(split[0], pools[0], v, *split[1:])
    close([x[1] for x in mixed], decode.paged(split[0][1], 2 * k, v, *(x[1] for x in split[1:])), jnp.float32)
    q, keys, values, lengths = make_bitmap(4, 2, 1, 16, 9, (8, 8))
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (q, keys, values, lengths))
    mapped = jax.vmap(decode.bitmap)(*split)
    close([x.reshape(-1, *x.shape[2:]) for x in mapped], decode.bitmap(q, keys, values, lengths), jnp.float32)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests/pallas_kernels")
import test_sparse_decode_attention as cases
from pallas_kernels import sparse_decode_attention as decode

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

def place(tree, *specs):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(leaves, specs, strict=True)])

rows, pool, table = P("data", "model"), P(None, None, "model"), P("data", "model")
args = cases.make_paged(8, 4, 2, 16, 9, 4, 5)
sharded = place(args, rows, pool, pool, table, P("data"))
step = jax.jit(decode.paged)
cases.close(step(*sharded), decode.paged(*args), np.float32)
assert "all-gather" not in step.lower(*sharded).compile().as_text(), "sequences and heads are independent"
args = cases.make_bitmap(8, 4, 2, 16, 30, (8, 8))
sharded = place(args, rows, *[table] * 4, P("data"))
step = jax.jit(decode.bitmap)
cases.close(step(*sharded), decode.bitmap(*args), np.float32)
assert "all-gather" not in step.lower(*sharded).compile().as_text(), "sequences and heads are independent"
print("same")
"""


def test_sharded_equals_unsharded():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]


F32 = np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=np.zeros((2, 4, 8), F32)), "they must be (B, H, D) and twice (P, page, Hkv, D)"),
        (dict(q=np.zeros((2, 3, 4), F32)), "its heads must be a multiple of the 2 heads of the cache"),
        (dict(q=np.zeros((2, 4, 4), np.float16)), "q and the cache have dtypes float16, float32 and float32"),
        (dict(page_table=np.zeros((2, 0), np.int32)), "no axis may be empty"),
        (
            dict(page_table=np.zeros((3, 5), np.int32)),
            "page_table is int32 of shape (3, 5); it must be int32",
        ),
        (dict(page_table=np.zeros((2, 5), F32)), "page_table is float32 of shape (2, 5); it must be int32"),
        (
            dict(lengths=np.zeros(3, np.int32)),
            "lengths is int32 of shape (3,); it must be int32 of shape (2,)",
        ),
        (dict(soft_cap=0.0), "soft_cap is 0.0; it must be positive and finite, or None"),
        (dict(implementation="pallas_tpu"), "sparse_decode_attention.paged cannot run 'pallas_tpu' here"),
    ],
)
def test_bad_pages_are_told_in_one_sentence(change, message):
    args = dict(
        q=np.zeros((2, 4, 4), F32), k_pages=np.zeros((3, 4, 2, 4), F32), v_pages=np.zeros((3, 4, 2, 4), F32)
    )
    args |= dict(page_table=np.zeros((2, 5), np.int32), lengths=np.zeros(2, np.int32)) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        decode.paged(**args)


def test_bad_packed_caches_are_told_in_one_sentence():
    q, keys, values, lengths = make_bitmap(2, 4, 2, 16, 9, (8, 8))
    for args, message in [
        (
            (q, keys._replace(bitmap=keys.bitmap[..., :1]), values),
            "keys.bitmap is uint8 of shape (2, 2, 9, 1)",
        ),
        ((q, keys, values._replace(values=values.values[:, :, :4])), "values.values has shape (2, 2, 4, 8)"),
        ((q[0], keys, values), "they must be (B, H, D), (B, Hkv, T, ceil(D / 8)) and (B, Hkv, T, budget)"),
        ((q[:, :3], keys, values), "its heads must be a multiple of the 2 heads of the cache"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            decode.bitmap(*args, lengths)
    for budget in (0, 17):
        with pytest.raises(ValueError, match=f"budget is {budget}; it must be from 1 to the 16 channels"):
            decode.pack(jnp.zeros((2, 16)), budget)


def test_why_gpu_kernels_do_not_take_some_arguments():
    q = jax.ShapeDtypeStruct((2, 8, 128), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((9, 16, 2, 128), jnp.bfloat16)
    assert pallas_gpu.paged_unsupported(q, pool) is None
    assert "not 12" in pallas_gpu.paged_unsupported(q, pool.update(shape=(9, 12, 2, 128)))
    assert "not float32" in pallas_gpu.paged_unsupported(q.update(dtype=jnp.float32), pool)
    assert "not 80" in pallas_gpu.paged_unsupported(q.update(shape=(2, 160, 128)), pool)
    packed = decode.Packed(None, jax.ShapeDtypeStruct((2, 2, 9, 20), jnp.bfloat16))
    assert "multiples of 8, not 20" in pallas_gpu.bitmap_unsupported(q, packed, packed)
    assert "not 96" in pallas_gpu.bitmap_unsupported(q.update(shape=(2, 8, 96)), packed, packed)
