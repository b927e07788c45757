"""Decoding over selected pages and packed caches: the definition against numpy, and implementations against it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import assert_close, running
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_lowers

from pallas_kernels import dispatch
from pallas_kernels import sparse_decode_attention as decode
from pallas_kernels.sparse_decode_attention import (
    Config,
    bitmap_reasons,
    paged_reasons,
    pallas_gpu,
    pallas_tpu,
)

MODULES = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}


def make_paged(batch, heads, kv_heads, channels, pages, page, slots, dtype=jnp.float32, seed=0):
    """q, pools, a table per head with holes, and lengths, from 0 to nearly the whole table."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, heads, channels)), dtype)
    pools = [jnp.asarray(rng.normal(size=(pages, page, kv_heads, channels)), dtype) for _ in range(2)]
    table = rng.integers(-1, pages, size=(batch, kv_heads, slots))
    lengths = rng.integers(1, slots * page + 1, size=batch)
    lengths[-1] = slots * page - 3
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
        assert_close((found[0][b, h], found[1][b, h]), expected, jnp.float32)


def test_a_cache_that_is_read_as_a_whole_is_dense_attention():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, t, h, 16)), jnp.float32) for t, h in ((1, 4), (12, 2), (12, 2))
    )
    lengths = jnp.asarray([12, 7])
    expected = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)[:, 0]
    pools = [x.reshape(6, 4, 2, 16) for x in (k, v)]
    table = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    assert_close(decode.paged(q[:, 0], *pools, table, lengths)[0], expected, jnp.float32)
    packed = [decode.pack(x.swapaxes(1, 2), 16) for x in (k, v)]
    assert_close(decode.bitmap(q[:, 0], *packed, lengths)[0], expected, jnp.float32)


# implementation: what; (batch, heads, heads of keys, channels, pages, page, slots), soft cap, dtype
PAGED = {
    "xla: holes, an empty sequence": ((3, 4, 2, 16, 9, 4, 7), 2.0, jnp.float32),
    "xla: long pages": ((2, 2, 2, 8, 3, 200, 2), None, jnp.float32),
    "xla: one head": ((1, 1, 1, 32, 9, 16, 5), None, jnp.bfloat16),
    "pallas_tpu: holes, an empty sequence": ((3, 6, 2, 128, 9, 8, 5), None, jnp.bfloat16),
    "pallas_tpu: odd pages": ((2, 2, 1, 16, 9, 5, 3), 2.0, jnp.float32),
    "pallas_gpu: holes, an empty sequence": ((3, 6, 2, 64, 9, 16, 14), 2.0, jnp.bfloat16),
    "pallas_gpu: long pages": ((1, 1, 1, 128, 9, 128, 2), None, jnp.float16),
}
# (batch, heads, heads of keys, channels, tokens, budgets), soft cap, dtype
BITMAP = {
    "xla: odd channels": ((2, 4, 2, 13, 150, (5, 7)), 2.0, jnp.float32),
    "xla: one token": ((1, 1, 1, 16, 1, (1, 16)), None, jnp.float32),
    "xla: bfloat16": ((2, 2, 1, 64, 40, (32, 24)), None, jnp.bfloat16),
    "pallas_tpu: bfloat16": ((2, 4, 2, 128, 150, (64, 48)), 2.0, jnp.bfloat16),
    "pallas_tpu: odd budgets": ((1, 2, 2, 128, 9, (30, 128)), 2.0, jnp.float32),
    "pallas_gpu: bfloat16": ((1, 3, 1, 64, 150, (32, 24)), None, jnp.bfloat16),
}


def objective(function, *rest, **options):
    def scalar(*floats):
        out, lse = function(*floats, *rest, **options)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return (weights * out).sum() + jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0)).sum(), (out, lse)

    return scalar


def check(case, dtype, monkeypatch, scalar, floats):
    """Results and gradients of an implementation are those of the definition."""

    def results(implementation):
        function = jax.grad(scalar(implementation), (0, 1, 2), has_aux=True)
        return jax.block_until_ready(jax.jit(function)(*floats))

    implementation = case.split(":")[0]
    monkeypatch.setattr(pallas_gpu, "_BLOCKS", 2)  # splits hold several tiles
    with running(implementation, monkeypatch):
        found = results(implementation)
    assert_close(found, results("reference"), dtype)


@pytest.mark.parametrize("case", PAGED)
def test_paged_equals_the_definition_and_so_do_its_gradients(case, monkeypatch):
    shape, soft_cap, dtype = PAGED[case]
    *floats, table, lengths = make_paged(*shape, dtype=dtype)

    def scalar(name):
        return objective(decode.paged, table, lengths, soft_cap=soft_cap, implementation=name)

    check(case, dtype, monkeypatch, scalar, floats)


@pytest.mark.parametrize("case", BITMAP)
def test_bitmap_equals_the_definition_and_so_do_its_gradients(case, monkeypatch):
    shape, soft_cap, dtype = BITMAP[case]
    q, keys, values, lengths = make_bitmap(*shape, dtype=dtype)

    def attend(q, k, v, **options):
        packed = keys._replace(values=k), values._replace(values=v)
        return decode.bitmap(q, *packed, lengths, soft_cap=soft_cap, **options)

    def scalar(name):
        return objective(attend, implementation=name)

    check(case, dtype, monkeypatch, scalar, (q, keys.values, values.values))


@pytest.mark.slow
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
    assert_close(found, expected, jnp.float32)


@pytest.mark.parametrize(
    ("implementation", "page", "channels"),
    [("pallas_gpu", 16, 128), ("pallas_gpu", 128, 128), ("pallas_gpu", 64, 256), ("pallas_tpu", 16, 128)],
)
def test_paged_is_lowered_without_the_device(implementation, page, channels):
    *args, table, lengths = make_paged(2, 8, 2, channels, 9, page, 6, dtype=jnp.bfloat16)
    args[0] = args[0].reshape(2, 2, 4, channels)
    shapes = [(x.shape, x.dtype) for x in (*args, table, lengths)]
    paged = MODULES[implementation].paged
    assert_lowers(implementation, lambda *args: paged(*args, Config(0.1, 30.0)), *shapes)


@pytest.mark.parametrize("implementation", MODULES)
def test_bitmap_is_lowered_without_the_device(implementation):
    q, keys, values, lengths = make_bitmap(2, 8, 2, 128, 256, (64, 48), dtype=jnp.bfloat16)
    shapes = [(x.shape, x.dtype) for x in (q.reshape(2, 2, 4, 128), *keys, *values, lengths)]
    bitmap = MODULES[implementation].bitmap
    assert_lowers(implementation, lambda *args: bitmap(*args, Config(0.1, None)), *shapes)


@pytest.mark.slow
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
    assert_close(found, expected, jnp.float32)


def test_merged_parts_are_the_whole():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape) for shape in ((4,), (9, 4), (9, 4)))
    parts = [one_query(q, k[part], v[part], 1.0, None) for part in (slice(0, 4), slice(4, 4), slice(4, 9))]
    outs, lses = (jnp.asarray(np.array(x), jnp.float32) for x in zip(*parts, strict=True))
    assert_close(decode.merge(outs, lses), one_query(q, k, v, 1.0, None), jnp.float32)
    out, lse = decode.merge(jnp.ones((2, 3, 4)), jnp.full((2, 3), -jnp.inf))
    assert (out == 0).all() and (lse == -jnp.inf).all()
    with pytest.raises(ValueError, match="with at least one part"):
        decode.merge(jnp.zeros((0, 3, 4)), jnp.zeros((0, 3)))
    with pytest.raises(ValueError, match=re.escape("they must be (parts, ..., D) and (parts, ...)")):
        decode.merge(outs, lses[:2])


@pytest.mark.slow
def test_mapped():
    q, k, v, table, lengths = make_paged(4, 4, 2, 8, 9, 4, 5)
    whole = decode.paged(q, k, v, table, lengths)
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, table, lengths)]
    shared = jax.vmap(lambda q, table, lengths: decode.paged(q, k, v, table, lengths))(*split)
    assert_close([x.reshape(-1, *x.shape[2:]) for x in shared], whole, jnp.float32)
    pools = [jnp.stack([x, 2 * x]) for x in (k, v)]
    own = jax.vmap(decode.paged)(split[0], *pools, *split[1:])
    for i in range(2):
        assert_close(
            [x[i] for x in own],
            decode.paged(split[0][i], pools[0][i], pools[1][i], *(x[i] for x in split[1:])),
            jnp.float32,
        )
    mixed = jax.vmap(decode.paged, (0, 0, None, 0, 0))(split[0], pools[0], v, *split[1:])
    assert_close(
        [x[1] for x in mixed], decode.paged(split[0][1], 2 * k, v, *(x[1] for x in split[1:])), jnp.float32
    )
    q, keys, values, lengths = make_bitmap(4, 2, 1, 16, 9, (8, 8))
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (q, keys, values, lengths))
    mapped = jax.vmap(decode.bitmap)(*split)
    assert_close(
        [x.reshape(-1, *x.shape[2:]) for x in mapped], decode.bitmap(q, keys, values, lengths), jnp.float32
    )


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
cases.assert_close(step(*sharded), decode.paged(*args), np.float32)
assert "all-gather" not in step.lower(*sharded).compile().as_text(), "sequences and heads are independent"
args = cases.make_bitmap(8, 4, 2, 16, 30, (8, 8))
sharded = place(args, rows, *[table] * 4, P("data"))
step = jax.jit(decode.bitmap)
cases.assert_close(step(*sharded), decode.bitmap(*args), np.float32)
assert "all-gather" not in step.lower(*sharded).compile().as_text(), "sequences and heads are independent"
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SHARDED)


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


def test_why_kernels_do_not_take_some_arguments():
    q = jax.ShapeDtypeStruct((2, 8, 128), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((9, 16, 2, 128), jnp.bfloat16)
    assert pallas_gpu.paged_reason(q, pool) is pallas_tpu.paged_reason(q, pool) is None
    assert "tokens, got 12" in pallas_gpu.paged_reason(q, pool.update(shape=(9, 12, 2, 128)))
    assert "got float32" in pallas_gpu.paged_reason(q.update(dtype=jnp.float32), pool)
    assert "may share keys, got 80" in pallas_gpu.paged_reason(q.update(shape=(2, 160, 128)), pool)
    assert "of 128, got 64" in pallas_tpu.paged_reason(q.update(shape=(2, 8, 64)), pool)
    assert "got float16" in pallas_tpu.paged_reason(q.update(dtype=jnp.float16), pool)
    cache = (2, 2, 9, 24)
    assert pallas_gpu.bitmap_reason(q, cache, cache) is pallas_tpu.bitmap_reason(q) is None
    message = "the budget of values must be a multiple of 8, got 20"
    assert pallas_gpu.bitmap_reason(q, cache, (2, 2, 9, 20)) == message
    assert "channels, got 96" in pallas_gpu.bitmap_reason(q.update(shape=(2, 8, 96)), cache, cache)
    assert "128 channels, got 96" in pallas_tpu.bitmap_reason(q.update(shape=(2, 8, 96)))


@pytest.mark.parametrize("implementation", MODULES)
def test_the_device_picks_its_kernels(implementation, monkeypatch):
    q, keys, values, _ = make_bitmap(2, 8, 2, 128, 9, (64, 48), dtype=jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((9, 16, 2, 128), jnp.bfloat16)
    monkeypatch.setattr(dispatch, f"{implementation[-3:]}_reason", lambda *generations, at=None: None)
    assert dispatch.pick("", None, paged_reasons(q, pool)) == implementation
    assert dispatch.pick("", None, bitmap_reasons(q, keys, values)) == implementation
    assert dispatch.pick("", None, paged_reasons(q[..., :80], pool)) == "xla"


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu", "triton"])
def test_naming_what_the_device_lacks_says_so(implementation):
    if jax.default_backend() == ("tpu" if implementation == "pallas_tpu" else "gpu"):
        pytest.skip("the device is here")
    args = make_bitmap(2, 4, 2, 16, 9, (8, 8))
    message = (
        f"^sparse_decode_attention.bitmap cannot run '{implementation}' here: it needs an? .* JAX runs on "
    )
    with pytest.raises(ValueError, match=message):
        decode.bitmap(*args, implementation=implementation)
