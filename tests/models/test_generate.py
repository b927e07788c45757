"""Generated tokens are those of running the whole sequence again, for every family."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import BASE, FAMILIES, LLAMA, TOKENS, start

from sparsejax.models import build, generate, init_cache
from sparsejax.models.generate import _generate, advance

CASES = {
    **{family: FAMILIES[family] for family in ("opt", "mistral", "mixtral", "qwen3")},
    "shrunk": {**LLAMA, "layers": [{"heads": 0}, {"heads": 2, "kv_heads": 1, "stream": (8, 6, 5)}]},
}
PROMPT = TOKENS[:, :3]


def whole(model, params, tokens):
    """Logits of the tokens after the prompt, from one run over all of them (causality has its own tests)."""
    logits = jax.jit(model.apply)({"params": params}, tokens)
    return logits[:, PROMPT.shape[1] - 1 : -1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    model, params = start(**{**CASES[case], "max_length": 20})
    out = generate(model, params, PROMPT, 6)  # well beyond Mistral's window of 3
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out[:, :3], PROMPT)
    np.testing.assert_array_equal(out[:, 3:], jnp.argmax(whole(model, params, out), -1))


def test_tokens_are_drawn_from_the_softmax():
    model, params = start(**LLAMA, depth=1, max_length=20)
    key = jax.random.key(3)
    out = generate(model, params, np.repeat(PROMPT[:1], 4000, axis=0), 2, temperature=2.0, key=key)
    for step in range(2):
        first = np.asarray(out[:, 3]) == np.asarray(out[0, 3])  # sequences with one past
        rows = np.arange(4000) if step == 0 else np.flatnonzero(first)
        found = np.bincount(np.asarray(out[rows, 3 + step]), minlength=11) / len(rows)
        expected = jax.nn.softmax(whole(model, params, out[:1])[0, step] / 2.0)
        assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / len(rows))
    same = generate(model, params, np.repeat(PROMPT[:1], 4000, axis=0), 2, temperature=2.0, key=key)
    np.testing.assert_array_equal(out, same)


def test_pieces_of_any_length_give_the_logits_of_the_whole():
    model, params = start(**FAMILIES["mistral"])
    cache, offset = init_cache(model, 2, 9), 0
    expected = jax.jit(model.apply)({"params": params}, TOKENS)
    piece = jax.jit(advance, static_argnums=0)
    for length in (3, 1, 3):
        logits, cache = piece(model, params, TOKENS[:, offset : offset + length], cache, offset)
        offset += length
        np.testing.assert_allclose(logits, expected[:, offset - 1], rtol=1e-4, atol=1e-4)


def test_a_sequence_ends_with_its_stop():
    model, params = start(**LLAMA, depth=1, max_length=20)
    free = np.asarray(generate(model, params, PROMPT, 6))[:, 3:]
    stop = int(free[0, 1])
    found = np.asarray(generate(model, params, PROMPT, 6, stop=stop))[:, 3:]
    for row, wanted in zip(found, free, strict=True):
        ends = np.flatnonzero(wanted == stop)
        length = ends[0] if len(ends) else 6
        np.testing.assert_array_equal(row[:length], wanted[:length])
        assert (row[length:] == stop).all()
    assert (found != free).any()


def test_the_cache_has_the_dtype_of_the_hidden_states(monkeypatch):
    model, params = start(**LLAMA, depth=1)
    dtypes = []

    def record(*args):
        dtypes.append(args[-1])
        return init_cache(*args)

    monkeypatch.setitem(generate.__globals__, "init_cache", record)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    generate(model, half, PROMPT, 1)
    generate(model.clone(dtype="bfloat16"), params, PROMPT, 1)
    assert dtypes == [jnp.bfloat16, jnp.bfloat16]


def test_lazy_parameters():
    model, params = start(**LLAMA, depth=1)
    expected = generate(model, params, PROMPT, 2)
    np.testing.assert_array_equal(generate(model, MappingProxyType(params), PROMPT, 2), expected)


def test_a_cache_takes_no_more_tokens_than_it_has_places():
    model, params = start(**LLAMA, depth=1, max_length=20)
    cache = init_cache(model, 2, 5)
    with pytest.raises(ValueError, match="3 positions after 3 exceed the cache's capacity of 5"):
        advance(model, params, PROMPT, cache, 3)
    with pytest.raises(ValueError, match="sequences of 21 tokens exceed max_length=20"):
        advance(model, params, PROMPT, cache, 18)


def test_tokens_may_be_traced():
    model, params = start(**LLAMA, depth=1)
    traced = jax.jit(lambda tokens: generate(model, params, tokens, 2))(PROMPT)
    np.testing.assert_array_equal(traced, generate(model, params, PROMPT, 2))


def test_the_cache_has_the_heads_of_each_block_and_the_dtype():
    model, _ = start(**CASES["shrunk"])
    cache = init_cache(model, 3, 5, "bfloat16")
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), cache)
    one = ((3, 5, 1, 2), "bfloat16")
    assert shapes == {"block_0": {}, "block_1": {"key": one, "value": one}}


def test_one_compilation_serves_every_temperature():
    model, params = start(**LLAMA, depth=1)
    before = _generate._cache_size()
    for temperature in (0.5, 0.6):
        generate(model, params, TOKENS[:, :4], 2, temperature=temperature, key=jax.random.key(0))
    assert _generate._cache_size() == before + 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 3}, "7 tokens and 3 more exceed the model's max_length=9"),
        ({"steps": -1}, "steps=-1 and temperature=0.0 must not be negative"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1.0}, "temperature=1.0 draws tokens at random and needs a key"),
        ({"tokens": TOKENS[:, :0]}, r"must be \(batch, length > 0\), got shape \(2, 0\)"),
        ({"tokens": TOKENS + 1}, "a token to go on from must be from 0 to 10, got 11"),
        ({"tokens": -TOKENS}, "a token to go on from must be from 0 to 10, got -"),
        ({"stop": 11}, "stop must be from 0 to 10, got 11"),
        ({"model": build("encoder", 3)}, "only a Transformer generates tokens, got Encoder"),
    ],
)
def test_bad_input(arguments, message):
    model = build("transformer", 11, **BASE)
    with pytest.raises(ValueError, match=message):
        generate(**{"model": model, "params": None, "tokens": TOKENS, "steps": 1, **arguments})


def test_no_steps_give_the_tokens_themselves():
    np.testing.assert_array_equal(generate(*start(), TOKENS, 0), TOKENS)
