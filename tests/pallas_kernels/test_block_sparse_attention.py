"""Block-sparse attention: the definition against numpy, every implementation against the definition, and its bounds."""

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

from pallas_kernels.block_sparse_attention import (
    Config,
    block_lists,
    block_sparse_attention,
    pallas_gpu,
    pallas_tpu,
    reference,
)
from pallas_kernels.ragged import fold_rows

ON_GPU = jax.default_backend() == "gpu"
interpreted = pytest.mark.skipif(
    not ON_GPU and not hasattr(plgpu, "InterpretGPUParams"),
    reason="JAX before 0.11 cannot interpret Mosaic GPU kernels",
)


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


# batch, queries, keys, heads, heads of keys, channels, block_q, block_k, density; causal, soft cap, dtype
CASES = {
    "ragged": ((2, 40, 52, 4, 2, 16, 16, 8, 0.5), False, None, jnp.float32),
    "causal, capped": ((1, 45, 45, 2, 1, 16, 16, 16, 0.6), True, 2.0, jnp.float32),
    "blocks of keys are smaller": ((1, 64, 64, 2, 2, 8, 32, 8, 0.4), True, None, jnp.float32),
    "one query": ((2, 1, 50, 4, 1, 16, 16, 16, 0.5), False, None, jnp.float32),
    "nothing selected": ((1, 32, 32, 2, 2, 16, 16, 16, 0.0), False, None, jnp.float32),
    "all selected, bfloat16": ((1, 48, 48, 2, 1, 16, 16, 16, 1.0), True, None, jnp.bfloat16),
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


def close(found, expected, dtype):
    """Equal up to the rounding of the dtype, -inf where the other is."""
    tolerance = 2e-5 if dtype == jnp.float32 else 4e-2
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_xla_equals_the_definition_and_so_do_its_gradients(case):
    shape, causal, soft_cap, dtype = CASES[case]
    *args, mask = make(*shape, dtype=dtype)
    config = dict(block_q=shape[6], block_k=shape[7], causal=causal, soft_cap=soft_cap)
    found, expected = (
        jax.jit(jax.grad(objective(name, mask, config), (0, 1, 2), has_aux=True))(*args)
        for name in ("xla", "reference")
    )
    close(found, expected, dtype)
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


def canonical(shape, dtype, causal, soft_cap, seed=0):
    """Arguments of the kernels: heads split into groups."""
    q, k, v, mask = make(*shape, dtype=dtype, seed=seed)
    groups = k.shape[2], q.shape[2] // k.shape[2]
    config = Config(shape[6], shape[7], causal, q.shape[-1] ** -0.5, soft_cap)
    return (
        q.reshape(*q.shape[:2], *groups, -1),
        k,
        v,
        mask.reshape(mask.shape[0], *groups, *mask.shape[2:]),
        config,
    )


def check_kernels(module, shape, dtype, causal, soft_cap, interpret):
    """Both passes of a module against the definition and its gradients."""
    q, k, v, mask, config = canonical(shape, dtype, causal, soft_cap)
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])

    def definition(q, k, v):
        out, lse = reference.attention(q, k, v, mask.reshape(q.shape[0], -1, *mask.shape[3:]), config)
        return out, lse

    (out, lse), pull = jax.vjp(definition, flat, k, v)
    out, lse = out.reshape(q.shape), lse.reshape(*mask.shape[:3], -1)
    found = jax.jit(lambda *args: module.forward(*args, config, interpret=interpret))(q, k, v, mask)
    close(found, (out, lse), dtype)
    rng = np.random.default_rng(1)
    d_out, d_lse = (jnp.asarray(rng.normal(size=x.shape), t) for x, t in ((out, dtype), (lse, jnp.float32)))
    expected = pull((d_out.reshape(flat.shape), d_lse.reshape(d_lse.shape[0], -1, d_lse.shape[-1])))
    backward = jax.jit(lambda *args: module.backward(*args, config, interpret=interpret))
    found = backward(q, k, v, mask, out, lse, d_out, d_lse)
    close(found, (expected[0].reshape(q.shape), *expected[1:]), dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "causal", "soft_cap"),
    [
        ((2, 40, 52, 4, 2, 16, 16, 8, 0.5), jnp.float32, True, 2.0),
        ((1, 1, 50, 2, 2, 16, 16, 16, 0.7), jnp.bfloat16, False, None),
    ],
)
def test_tpu_kernels_interpreted(shape, dtype, causal, soft_cap):
    check_kernels(pallas_tpu, shape, dtype, causal, soft_cap, interpret=True)


def test_tpu_kernels_take_long_lists_in_chunks(monkeypatch):
    monkeypatch.setattr("pallas_kernels.flash_tpu._SCALARS", 12)  # three rows of four entries
    check_kernels(pallas_tpu, (1, 40, 52, 2, 1, 8, 16, 16, 0.6), jnp.float32, True, None, interpret=True)


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype", "causal", "soft_cap"),
    [
        ((1, 200, 130, 2, 1, 64, 128, 64, 0.6), jnp.bfloat16, True, 2.0),
        ((1, 1, 140, 1, 1, 64, 64, 128, 1.0), jnp.float16, False, None),
        pytest.param(
            (2, 256, 256, 2, 2, 128, 64, 128, 0.5), jnp.bfloat16, True, None, marks=pytest.mark.slow
        ),
    ],
)
def test_gpu_kernels(shape, dtype, causal, soft_cap):
    interpret = None if ON_GPU else plgpu.InterpretGPUParams()
    check_kernels(pallas_gpu, shape, dtype, causal, soft_cap, interpret)


@pytest.mark.parametrize(
    ("module", "platform", "dtype", "blocks", "call"),
    [
        (pallas_gpu, "cuda", jnp.bfloat16, (128, 128), "mosaic_gpu"),
        (pallas_gpu, "cuda", jnp.float16, (64, 64), "mosaic_gpu"),
        (pallas_tpu, "tpu", jnp.bfloat16, (128, 128), "tpu_custom_call"),
        (pallas_tpu, "tpu", jnp.float32, (64, 32), "tpu_custom_call"),
    ],
)
def test_kernels_are_lowered_without_the_device(module, platform, dtype, blocks, call):
    q, k, v, mask, config = canonical((1, 256, 200, 4, 2, 128, *blocks, 0.5), dtype, True, 30.0)
    lse = jnp.zeros(q.shape[:1] + q.shape[2:4] + q.shape[1:2])
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]

    def lowered(function, *args):
        export = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
        return export(*args).mlir_module()

    assert call in lowered(lambda *args: module.forward(*args, config), q, k, v, mask)
    text = lowered(lambda *args: module.backward(*args, config), q, k, v, mask, q, lse, q, lse)
    assert text.count(f"call @{call}") == 2  # one for dq, one for dk and dv


@settings(deadline=None, max_examples=12)
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
    close(found, expected, jnp.float32)


def test_mapped_over_any_axis():
    q, k, v, mask = make(6, 20, 20, 2, 1, 8, 8, 8, 0.6)
    config = dict(block_q=8, block_k=8, causal=True, return_lse=True)
    whole = block_sparse_attention(q, k, v, mask, **config)
    split = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v, mask)]
    mapped = jax.vmap(lambda *args: block_sparse_attention(*args, **config))(*split)
    close([x.reshape(6, *x.shape[2:]) for x in mapped], whole, jnp.float32)
    # keys and the mask are shared here, queries lie along another axis
    mapped = jax.vmap(lambda x: block_sparse_attention(x, k[:2], v[:2], mask[:2], **config)[0], 2, 1)
    found = mapped(jnp.moveaxis(split[0], 0, 2))
    for i in range(3):
        close(
            found[:, i], block_sparse_attention(split[0][i], k[:2], v[:2], mask[:2], **config)[0], jnp.float32
        )


def test_gradients_are_mapped():
    q, k, v, mask = make(4, 16, 16, 2, 1, 8, 8, 8, 0.8)
    config = dict(block_q=8, block_k=8, causal=True)
    gradient = jax.grad(lambda q, k, v, mask: objective("xla", mask, config)(q, k, v)[0], (0, 1, 2))
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v, mask)]
    found = jax.jit(jax.vmap(gradient))(*split)
    for i in range(2):
        close([x[i] for x in found], gradient(*(x[i] for x in split)), jnp.float32)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.block_sparse_attention import block_sparse_attention

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


def test_sharded_equals_unsharded():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]


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
        (dict(block_q=0), "block_q is 0; it must be at least 1"),
        (dict(soft_cap=-1.0), "soft_cap is -1.0; it must be positive and finite, or None"),
        (dict(block_mask=np.ones((2, 3), bool)), "must be bool and broadcastable to (1, 4, 2, 2)"),
        (dict(block_mask=np.ones((2, 2), np.int32)), "block_mask is int32 of shape (2, 2)"),
        pytest.param(
            dict(implementation="pallas_gpu"),
            "cannot run 'pallas_gpu' here: it needs a GPU and the default",
            marks=pytest.mark.skipif(ON_GPU, reason="here it has another reason"),
        ),
        (dict(implementation="pallas_tpu"), "cannot run 'pallas_tpu' here: it needs a TPU and the default"),
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


def test_why_gpu_kernels_do_not_take_some_arguments():
    config = Config(128, 64, False, 1.0, None)
    q = jax.ShapeDtypeStruct((1, 8, 4, 128), jnp.bfloat16)
    assert pallas_gpu.unsupported(q, config) is None
    assert "multiples of 64, not 32 x 64" in pallas_gpu.unsupported(q, config._replace(block_q=32))
    assert "not float32" in pallas_gpu.unsupported(q.update(dtype=jnp.float32), config)
    assert "not 80" in pallas_gpu.unsupported(q.update(shape=(1, 8, 4, 80)), config)
