"""The stream of hidden states: errors of layers, outputs in place, tied models with grouped heads."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import compress
from sparsejax.compress.stream import Stream
from sparsejax.models.encoder import Encoder
from sparsejax.models.transformer import Transformer

TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (4, 12), 1, 32))
TINY = {"depth": 1, "width": 16, "heads": 4, "hidden": 16, "max_length": 12}


def initial(model, tokens=TOKENS):
    return jax.jit(model.init)(jax.random.key(1), tokens)["params"]


def output_of(norm, model, params, tokens=TOKENS):
    """float64 `(sequences, length, width)`."""
    apply = jax.jit(
        lambda p: model.apply({"params": p}, tokens, capture_intermediates=True, mutable=["intermediates"])
    )
    return np.asarray(apply(params)[1]["intermediates"]["block_0"][norm]["__call__"][0], np.float64)


def halved(params, name):
    new = jax.tree.map(lambda x: x, params["block_0"])
    kernel = new["mlp"][name]["kernel"]
    new["mlp"][name]["kernel"] = jnp.where(jnp.arange(kernel.size).reshape(kernel.shape) % 3 > 0, kernel, 0)
    return new


def error_of_up(model, params, tokens):
    stream, new = Stream(model, params, tokens), halved(params, "up")
    found = stream.errors(stream.block("block_0"), params["block_0"], new, ["mlp/up/kernel"])
    kernels = (np.asarray(tree["mlp"]["up"]["kernel"], np.float64) for tree in (params["block_0"], new))
    return found["mlp/up/kernel"], *kernels


@pytest.mark.slow
def test_errors_of_experts_are_those_over_all_experts():
    model = Transformer(classes=32, experts=3, gated=True, **TINY)
    params = initial(model)
    found, old, new = error_of_up(model, params, TOKENS)
    x = output_of("norm_1", model, params).reshape(-1, 16)
    router = np.asarray(params["block_0"]["mlp"]["router"]["kernel"], np.float64)
    chosen = np.argsort(-(x @ router), axis=1)[:, :2]
    rows = [x[(chosen == expert).any(1)] for expert in range(3)]
    off, size = (
        sum(np.sum((r @ k) ** 2) for r, k in zip(rows, kernel, strict=True)) for kernel in (old - new, old)
    )
    assert found == pytest.approx(np.sqrt(off / size), rel=1e-4)


def test_errors_do_not_count_padding():
    model = Encoder(classes=0, vocabulary=32, pad=0, **TINY)
    padded = np.where(np.arange(12) < 7, TOKENS, 0)
    params = initial(model, padded)
    found, old, new = error_of_up(model, params, padded)
    x = output_of("norm_0", model, params, padded)[:, :7].reshape(-1, 16)
    assert found == pytest.approx(np.linalg.norm(x @ (old - new)) / np.linalg.norm(x @ old), rel=1e-4)


def test_it_advances_in_its_own_memory():
    model = Transformer(classes=32, **TINY)
    params = initial(model)
    stream = Stream(model, params, TOKENS, 3)
    block, memory = stream.block("block_0"), stream.hidden
    expected = stream.run(block, params["block_0"])
    assert (memory != expected).any()
    _, outputs = stream.observe(block, params["block_0"], {}, ())
    np.testing.assert_array_equal(outputs, expected)
    assert stream.observe(block, params["block_0"], {}, (), outputs=False)[1] is None
    stream.advance(block, params["block_0"])
    assert stream.hidden is memory
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.slow
def test_a_tied_model_with_grouped_heads():
    model = Transformer(classes=32, tied=True, kv_heads=2, positions="rotary", **TINY)
    params = initial(model)
    result = compress.prune_layers(compress.wanda(), model, params, TOKENS, np.float32(0.5), batch=3)
    assert result.report["layers"]["block_0/attention/key/kernel"]["size"] == 16 * 8
    assert type(result.report["asked"]) is float and result.report["sparsity"] == 0.5
    logits = jax.jit(model.apply)({"params": result.params}, TOKENS)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()
    found = compress.perplexity(model, result.params, TOKENS, 3)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    broken = {**result.params, "norm": {"scale": jnp.full(16, jnp.nan), "bias": jnp.zeros(16)}}
    assert math.isnan(compress.perplexity(model, broken, TOKENS, 3)["perplexity"])


def test_one_sequence_without_its_axis_is_refused():
    model = Transformer(classes=32, **TINY)
    with pytest.raises(
        ValueError, match=r"tokens must be sequences, \(sequences, length\), got the shape \(12,\)"
    ):
        Stream(model, initial(model), TOKENS[0])
