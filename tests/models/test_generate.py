"""Generated tokens are those of running the whole sequence again, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import FAMILIES, LLAMA, TOKENS, start

from sparsejax.models import build, generate, init_cache
from sparsejax.models.generate import advance

CASES = {
    **{family: FAMILIES[family] for family in ("gpt2", "opt", "mistral", "mixtral", "qwen3")},
    "shrunk": {**LLAMA, "layers": [{"heads": 0}, {"heads": 2, "kv_heads": 1, "stream": (8, 6, 5)}]},
}


def again(model, params, tokens, steps, pick):
    """The definition: the model on all tokens so far, for every new one."""
    tokens = np.asarray(tokens)
    for step in range(steps):
        logits = model.apply({"params": params}, tokens)[:, -1]
        tokens = np.concatenate([tokens, np.asarray(pick(logits, step))[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    model, params = start(**{**CASES[case], "max_length": 20})
    tokens, steps = TOKENS[:, :3], 6  # well beyond Mistral's window of 3
    out = generate(model, params, tokens, steps)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, again(model, params, tokens, steps, lambda x, _: jnp.argmax(x, -1)))


def test_tokens_are_drawn_from_the_softmax():
    model, params = start(**LLAMA, max_length=20)
    key = jax.random.key(3)

    def pick(logits, step):
        return jax.random.categorical(jax.random.fold_in(key, step), logits / 0.7)

    out = generate(model, params, TOKENS[:, :3], 5, temperature=0.7, key=key)
    np.testing.assert_array_equal(out, again(model, params, TOKENS[:, :3], 5, pick))
    many = generate(model, params, np.repeat(TOKENS[:1, :3], 4000, axis=0), 1, temperature=2.0, key=key)
    found = np.bincount(np.asarray(many[:, -1]), minlength=11) / 4000
    expected = jax.nn.softmax(model.apply({"params": params}, TOKENS[:1, :3])[0, -1] / 2.0)
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_pieces_of_any_length_give_the_logits_of_the_whole(family):
    model, params = start(**FAMILIES[family])
    cache, offset = init_cache(model, 2, 9), 0
    whole = model.apply({"params": params}, TOKENS)
    for length in (2, 1, 4):
        logits, cache = advance(model, params, TOKENS[:, offset : offset + length], cache, offset)
        offset += length
        np.testing.assert_allclose(logits, whole[:, offset - 1], rtol=1e-4, atol=1e-4)


def test_the_cache_has_the_heads_of_each_block_and_the_dtype():
    model, _ = start(**CASES["shrunk"])
    cache = init_cache(model, 3, 5, "bfloat16")
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), cache)
    one = ((3, 5, 1, 2), "bfloat16")
    assert shapes == {"block_0": {}, "block_1": {"key": one, "value": one}}


def test_one_compilation_serves_every_temperature():
    model, params = start(**LLAMA, max_length=21)
    with jax.log_compiles(False):
        size = generate.__globals__["_generate"]._cache_size
        before = size()
        for temperature in (0.5, 0.6):
            generate(model, params, TOKENS, 2, temperature=temperature, key=jax.random.key(0))
        assert size() == before + 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 3}, "7 tokens and 3 more exceed the model's max_length=9"),
        ({"steps": -1}, "steps=-1 and temperature=0.0 must not be negative"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1.0}, "temperature=1.0 draws tokens at random and needs a key"),
        ({"tokens": TOKENS[:, :0]}, r"must be \(batch, length > 0\), got shape \(2, 0\)"),
        ({"model": build("encoder", 3)}, "only a Transformer generates tokens, not a Encoder"),
    ],
)
def test_bad_input(arguments, message):
    model, params = start()
    with pytest.raises(ValueError, match=message):
        generate(**{"model": model, "params": params, "tokens": TOKENS, "steps": 1, **arguments})
    assert generate(model, params, TOKENS, 0) is not None
