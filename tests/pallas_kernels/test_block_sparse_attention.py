"""Block-sparse attention: the definition against numpy, every implementation against the definition, and its bounds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import assert_close, running
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_lowers

from pallas_kernels import block_sparse_attention, dispatch
from pallas_kernels.block_sparse_attention import (
    Config,
    pallas_gpu,
    pallas_tpu,
    reasons,
)

MODULES = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}


def make(
    batch, queries, keys, heads, kv_heads, channels, block_q, block_k, density, dtype=jnp.float32, seed=0
):
    """q, k, v and a random block mask whose first row selects nothing."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, queries, heads, channels)] + [(batch, keys, kv_heads, channels)] * 2
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    mask = rng.random((batch, heads, -(-queries // block_q), -(-keys // block_k))) < density
    if mask.shape[2] > 1 and density < 1:
        mask[:, :, 0] = False
    return q, k, v, jnp.asarray(mask)


def brute_force(q, k, v, mask, block_q, block_k, causal, scale, soft_cap):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)
    for b, t, h in np.ndindex(q.shape[:3]):
        group = h // (q.shape[2] // k.shape[2])
        seen = [
            s for s in range(k.shape[1]) if mask[b, h, t // block_q, s // block_k] and not (causal and s > t)
        ]
        if not seen:
            continue
        logits = scale * k[b, seen, group] @ q[b, t, h]
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits)
        lse[b, h, t] = np.log(weights.sum())
        out[b, t, h] = weights @ v[b, seen, group] / weights.sum()
    return out, lse


@pytest.mark.parametrize(("causal", "soft_cap"), [(False, None), (True, 2.0)])
def test_the_definition_is_a_softmax_over_the_selected_keys(causal, soft_cap):
    q, k, v, mask = make(2, 13, 17, 4, 2, 8, 4, 3, 0.5)
    expected = brute_force(q, k, v, np.asarray(mask), 4, 3, causal, 0.7, soft_cap)
    found = block_sparse_attention(
        q, k, v, mask, block_q=4, block_k=3, causal=causal, scale=0.7, soft_cap=soft_cap, return_lse=True,
        implementation="reference",
    )  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_of_all_blocks_it_is_dense_attention():
    q, k, v, mask = make(2, 40, 40, 4, 2, 16, 16, 8, 1)
    for causal in (False, True):
        found = block_sparse_attention(q, k, v, mask, block_q=16, block_k=8, causal=causal)
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# implementation, (batch, queries, keys, heads, heads of keys, channels, block_q, block_k, density), causal, soft cap, dtype
CASES = {
    "xla: ragged": ((2, 40, 52, 4, 2, 16, 16, 8, 0.5), False, None, jnp.float32),
    "xla: causal, capped": ((1, 45, 45, 2, 1, 16, 16, 16, 0.6), True, 2.0, jnp.float32),
    "xla: blocks of keys are smaller": ((1, 64, 64, 2, 2, 8, 32, 8, 0.4), True, None, jnp.float32),
    "xla: one query": ((2, 1, 50, 4, 1, 16, 16, 16, 0.5), False, None, jnp.float32),
    "xla: nothing selected": ((1, 32, 32, 2, 2, 16, 16, 16, 0.0), False, None, jnp.float32),
    "xla: all selected, bfloat16": ((1, 48, 48, 2, 1, 16, 16, 16, 1.0), True, None, jnp.bfloat16),
    "pallas_tpu: ragged, causal, capped": ((2, 40, 52, 4, 2, 16, 16, 8, 0.5), True, 2.0, jnp.float32),
    "pallas_tpu: one query": ((1, 1, 50, 2, 2, 16, 16, 16, 0.7), False, None, jnp.bfloat16),
    "pallas_tpu: nothing selected": ((1, 16, 20, 1, 1, 8, 16, 16, 0.0), False, None, jnp.float32),
    "pallas_gpu: ragged, causal, capped": ((1, 200, 130, 2, 1, 64, 128, 64, 0.6), True, 2.0, jnp.bfloat16),
    "pallas_gpu: one query, few keys": ((1, 1, 3, 1, 1, 64, 64, 128, 1.0), False, None, jnp.float16),
    "pallas_gpu: nothing selected": ((1, 64, 64, 1, 1, 64, 64, 64, 0.0), False, None, jnp.bfloat16),
    "pallas_gpu: many heads": ((2, 256, 256, 2, 2, 128, 64, 128, 0.5), True, None, jnp.bfloat16),
}


def objective(implementation, mask, config):
    """A scalar that depends on every entry of both results, and them."""

    def function(q, k, v):
        out, lse = block_sparse_attention(
            q, k, v, mask, **config, return_lse=True, implementation=implementation
        )
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return (weights * out).sum() + jnp.sin(finite).sum(), (out, lse)

    return function


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_and_so_do_its_gradients(case, monkeypatch):
    shape, causal, soft_cap, dtype = CASES[case]
    *args, mask = make(*shape, dtype=dtype)
    config = dict(block_q=shape[6], block_k=shape[7], causal=causal, soft_cap=soft_cap)

    def results(implementation):
        function = jax.grad(objective(implementation, mask, config), (0, 1, 2), has_aux=True)
        return jax.block_until_ready(jax.jit(function)(*args))

    implementation = case.split(":")[0]
    with running(implementation, monkeypatch):
        found = results(implementation)
    assert_close(found, results("reference"), dtype)
    assert all(one.dtype == x.dtype for one, x in zip(found[0], args, strict=True))


def test_rows_without_keys_give_zeros_and_no_gradient():
    q, k, v, mask = make(1, 32, 32, 2, 2, 16, 16, 16, 0.5)
    config = dict(block_q=16, block_k=16)
    for name in ("xla", "reference"):
        (out, lse), pull = jax.vjp(
            lambda q, k, v, name=name: block_sparse_attention(
                q, k, v, mask, **config, return_lse=True, implementation=name
            ),
            q, k, v,
        )  # fmt: skip
        assert (out[:, :16] == 0).all() and (lse[:, :, :16] == -jnp.inf).all()
        gradients = pull((jnp.ones_like(out), jnp.ones_like(lse)))
        assert (gradients[0][:, :16] == 0).all() and all(jnp.isfinite(g).all() for g in gradients)


@pytest.mark.slow
def test_tpu_kernels_take_long_lists_in_chunks(monkeypatch):
    monkeypatch.setattr("pallas_kernels.flash_tpu._SCALARS", 12)  # three rows of four entries
    q, k, v, mask = make(1, 40, 52, 2, 1, 8, 16, 16, 0.6)
    config = dict(block_q=16, block_k=16, return_lse=True)
    with running("pallas_tpu", monkeypatch):
        found = block_sparse_attention(q, k, v, mask, **config, implementation="pallas_tpu")
    assert_close(
        found, block_sparse_attention(q, k, v, mask, **config, implementation="reference"), jnp.float32
    )


@pytest.mark.parametrize("implementation", MODULES)
def test_the_device_picks_its_kernels(implementation, monkeypatch):
    q, config = jax.ShapeDtypeStruct((1, 8, 4, 128), jnp.bfloat16), Config(128, 64, False, 1.0, None)
    monkeypatch.setattr(dispatch, f"{implementation[-3:]}_reason", lambda *generations, at=None: None)
    assert dispatch.pick("", None, reasons(q, config)) == implementation
    assert dispatch.pick("", None, reasons(q.update(dtype=jnp.float16), config._replace(block_q=32))) == "xla"


@pytest.mark.parametrize(
    ("implementation", "dtype", "blocks"),
    [
        ("pallas_gpu", jnp.bfloat16, (128, 128)),
        ("pallas_gpu", jnp.float16, (64, 64)),
        ("pallas_tpu", jnp.bfloat16, (128, 128)),
        ("pallas_tpu", jnp.float32, (64, 32)),
    ],
)
def test_kernels_are_lowered_without_the_device(implementation, dtype, blocks):
    module = MODULES[implementation]
    config = Config(*blocks, True, 0.1, 30.0)
    q, k = (1, 256, 2, 2, 128), (1, 200, 2, 128)
    mask, lse = (1, 2, 2, 256 // blocks[0], -(-200 // blocks[1])), (1, 2, 2, 256)
    arrays = [(q, dtype), (k, dtype), (k, dtype), (mask, jnp.bool_)]
    assert_lowers(implementation, lambda *args: module.forward(*args, config), *arrays)
    arrays += [(q, dtype), (lse, jnp.float32), (q, dtype), (lse, jnp.float32)]
    assert_lowers(implementation, lambda *args: module.backward(*args, config), *arrays)


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(st.data())
def test_any_shape_and_mask(data):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2)]))
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_k = data.draw(st.sampled_from([1, 5, 8])), data.draw(st.sampled_from([3, 16]))
    causal = data.draw(st.booleans())
    q, k, v, _ = make(1, queries, keys, heads, kv_heads, 4, block_q, block_k, 0)
    shape = (1, data.draw(st.sampled_from([1, heads])), -(-queries // block_q), -(-keys // block_k))
    bits = data.draw(st.lists(st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    mask = jnp.asarray(bits).reshape(shape)
    found, expected = (
        block_sparse_attention(
            q,
            k,
            v,
            mask,
            block_q=block_q,
            block_k=block_k,
            causal=causal,
            return_lse=True,
            implementation=name,
        )
        for name in ("xla", "reference")
    )
    assert_close(found, expected, jnp.float32)


@pytest.mark.slow
def test_mapped_over_any_axis():
    q, k, v, mask = make(6, 20, 20, 2, 1, 8, 8, 8, 0.6)
    config = dict(block_q=8, block_k=8, causal=True, return_lse=True)
    whole = block_sparse_attention(q, k, v, mask, **config)
    split = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v, mask)]
    mapped = jax.vmap(lambda *args: block_sparse_attention(*args, **config))(*split)
    assert_close([x.reshape(6, *x.shape[2:]) for x in mapped], whole, jnp.float32)
    # keys and the mask are shared here, queries lie along another axis
    mapped = jax.vmap(lambda x: block_sparse_attention(x, k[:2], v[:2], mask[:2], **config)[0], 2, 1)
    found = mapped(jnp.moveaxis(split[0], 0, 2))
    for i in range(3):
        assert_close(
            found[:, i], block_sparse_attention(split[0][i], k[:2], v[:2], mask[:2], **config)[0], jnp.float32
        )


@pytest.mark.slow
def test_gradients_are_mapped():
    q, k, v, mask = make(4, 16, 16, 2, 1, 8, 8, 8, 0.8)
    config = dict(block_q=8, block_k=8, causal=True)
    gradient = jax.grad(lambda q, k, v, mask: objective("xla", mask, config)(q, k, v)[0], (0, 1, 2))
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v, mask)]
    found = jax.jit(jax.vmap(gradient))(*split)
    for i in range(2):
        assert_close([x[i] for x in found], gradient(*(x[i] for x in split)), jnp.float32)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels import block_sparse_attention

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.normal(size=(8, 24, heads, 8)), jnp.float32) for heads in (4, 2, 2))
mask = jnp.asarray(rng.random((8, 4, 3, 3)) < 0.6)

def attend(q, k, v, mask):
    out, lse = block_sparse_attention(q, k, v, mask, block_q=8, block_k=8, causal=True, return_lse=True)
    return (jnp.cos(out) + out).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), out

step = jax.jit(jax.value_and_grad(attend, (0, 1, 2), has_aux=True))
expected = step(q, k, v, mask)
for spec, mask_spec in [
    (P("data", None, "model"), P("data", "model")), (P(("data", "model")), P()), (P(None, None, "model"), P()),
    (P(None, "data"), P("data")),
]:
    args = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    args.append(jax.device_put(mask, NamedSharding(mesh, mask_spec)))
    found = step(*args)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    if spec == P("data", None, "model"):
        text = step.lower(*args).compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text, "sequences and heads are independent"
print("same")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded(assert_prints_same):
    assert_prints_same(SHARDED)


def test_no_array_is_as_large_as_queries_times_keys():
    shape = (1, 512, 512, 1, 1, 8, 16, 16, 0.1)
    q, k, v, mask = make(*shape)
    step = jax.jit(jax.grad(objective("xla", mask, dict(block_q=16, block_k=16)), (0, 1, 2), has_aux=True))
    text = step.lower(q, k, v).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)f32>", text)
    sizes = [int(np.prod([int(n) for n in shape[:-1].split("x")])) for shape in shapes]
    assert sizes and max(sizes) < 512 * 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=np.zeros((1, 8, 2, 5), np.float32)), "they must be (B, Tq, H, D) and twice (B, Tk, Hkv, D)"),
        (
            dict(k=np.zeros((1, 8, 3, 4), np.float32), v=np.zeros((1, 8, 3, 4), np.float32)),
            "no multiple of the 3",
        ),
        (dict(q=np.zeros((1, 0, 4, 4), np.float32)), "no axis may be empty"),
        (dict(q=np.zeros((1, 8, 4, 4), np.float16)), "they must be one of bfloat16, float16 and float32"),
        (dict(block_q=0), "block_q is 0; it must be an integer of at least 1"),
        (dict(block_k=4.0), "block_k is 4.0; it must be an integer of at least 1"),
        (dict(soft_cap=-1.0), "soft_cap is -1.0; it must be positive and finite, or None"),
        (dict(block_mask=np.ones((2, 3), bool)), "must be bool and broadcastable to (1, 4, 2, 2)"),
        (dict(block_mask=np.ones((2, 2), np.int32)), "block_mask is int32 of shape (2, 2)"),
        (
            dict(implementation="cuda"),
            "has no implementation 'cuda' (known: pallas_gpu, pallas_tpu, xla, reference)",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(change, message):
    args = dict(q=np.zeros((1, 8, 4, 4), np.float32), k=np.zeros((1, 8, 2, 4), np.float32))
    args |= dict(v=args["k"], block_mask=np.ones((2, 2), bool), block_q=4, block_k=4) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        block_sparse_attention(**args)


@pytest.mark.parametrize(
    ("implementation", "missing"), [("pallas_gpu", "an NVIDIA GPU"), ("pallas_tpu", "a TPU")]
)
def test_naming_what_the_device_lacks_says_so(implementation, missing):
    if jax.default_backend() == implementation[-3:]:
        pytest.skip("the device is here")
    q, k, v, mask = make(1, 8, 8, 1, 1, 4, 4, 4, 1)
    message = (
        f"^block_sparse_attention cannot run '{implementation}' here: it needs {missing}, and JAX runs on "
    )
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, mask, block_q=4, block_k=4, implementation=implementation)


def test_why_kernels_do_not_take_some_arguments():
    config = Config(128, 64, False, 1.0, None)
    q = jax.ShapeDtypeStruct((1, 8, 4, 128), jnp.bfloat16)
    assert pallas_gpu.reason(q, config) is pallas_tpu.reason(q, config) is None
    assert pallas_gpu.reason(q, config._replace(block_q=32)) == "block_q must be a multiple of 64, got 32"
    assert pallas_gpu.reason(q, config._replace(block_k=96)) == "block_k must be a multiple of 64, got 96"
    assert "float16, got float32" in pallas_gpu.reason(q.update(dtype=jnp.float32), config)
    assert "channels, got 80" in pallas_gpu.reason(q.update(shape=(1, 8, 4, 80)), config)
    assert "got float16" in pallas_tpu.reason(q.update(dtype=jnp.float16), config)
