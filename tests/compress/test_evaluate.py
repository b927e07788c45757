"""Perplexity against the whole model's loss."""

import math

import jax
import numpy as np
import optax
import pytest

from sparsejax.compress import perplexity
from sparsejax.models.transformer import Transformer

MODEL = Transformer(classes=32, depth=2, width=16, heads=4, hidden=32, max_length=24)
TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (6, 20), 0, 32))
PARAMS = jax.jit(MODEL.init)(jax.random.key(1), TOKENS)["params"]


class Once(dict):
    """Blocks that may be read once."""

    def __getitem__(self, part):
        found = super().__getitem__(part)
        if part.startswith("block_"):
            del self[part]
        return found


@pytest.mark.parametrize("batch", [3, 4, 100])
def test_is_the_mean_loss_of_all_predictions(batch):
    logits = jax.jit(MODEL.apply)({"params": PARAMS}, TOKENS)
    expected = float(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean())
    found = perplexity(MODEL, Once(PARAMS), TOKENS, batch, size=6 * 19)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-5)
    assert found["tokens"] == 6 * 19


def test_a_token_of_two_bytes_costs_half_the_bits_per_byte():
    assert "bits_per_byte" not in perplexity(MODEL, PARAMS, TOKENS, 3)
    one, two = (perplexity(MODEL, PARAMS, TOKENS, 3, size=n)["bits_per_byte"] for n in (114, 228))
    assert one == pytest.approx(2 * two)


def test_equal_logits_give_the_size_of_the_vocabulary():
    params = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"] * 0}}
    assert perplexity(MODEL, params, TOKENS, 3)["perplexity"] == pytest.approx(32, rel=1e-5)


def test_messages():
    with pytest.raises(
        ValueError, match=r"at least two tokens, \(sequences, length\), got the shape \(6, 1\)"
    ):
        perplexity(MODEL, PARAMS, TOKENS[:, :1])
    with pytest.raises(ValueError, match="no tokens to read"):
        perplexity(MODEL, PARAMS, TOKENS[:0])
    with pytest.raises(ValueError, match="size must be at least 1 byte, got 0"):
        perplexity(MODEL, PARAMS, TOKENS, size=0)
    with pytest.raises(ValueError, match="token 99 is outside of the vocabulary, 0 to 31"):
        perplexity(MODEL, PARAMS, np.full((2, 4), 99))
