"""The loss of a language model on held-out tokens, streamed through the model one block at a time."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from sparsejax.compress.stream import Stream


def perplexity(
    model, params: Mapping, tokens, batch: int = 8, *, size: int | None = None, progress: bool | None = None
) -> dict[str, float]:
    """Mean loss over all predictions of a next token.

    Args:
      model: a decoder with the block interface (`start`, `block`, `context`, `finish`, `parts`).
      params: its parameters by part; any mapping, one block is read at a time.
      tokens: int32 `(sequences, length)`; the first of every sequence is not predicted.
      batch: sequences that go through a block at once.
      size: bytes that the predicted tokens stand for, for "bits_per_byte" (of a model of bytes: their number,
        sequences * (length - 1)).
      progress: whether a bar is shown; None: if stderr is a terminal.

    Returns:
      "loss" in nats per token, "perplexity" = exp(loss), "tokens" predicted and, with `size`, "bits_per_byte".

    Raises:
      ValueError: for sequences of fewer than two tokens or none, size < 1, and as `Stream`.
    """
    if np.ndim(tokens) != 2 or np.shape(tokens)[1] < 2:
        raise ValueError(
            f"a loss needs sequences of at least two tokens, (sequences, length), got the shape {np.shape(tokens)}"
        )
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 byte, got {size}")
    stream = Stream(model, params, tokens, batch)
    disable = None if progress is None else not progress
    for name in tqdm(stream.blocks, disable=disable, unit="block", desc="loss"):
        stream.advance(stream.block(name), params[name])
    total = math.fsum(float(np.asarray(part, np.float64).sum()) for part in stream.finish(params, _losses))
    count = stream.tokens.shape[0] * (stream.tokens.shape[1] - 1)
    loss = total / count
    found = {
        "loss": loss,
        "perplexity": math.inf if loss > math.log(np.finfo(np.float64).max) else math.exp(loss),
        "tokens": count,
    }
    return found if size is None else {**found, "bits_per_byte": total / math.log(2) / size}


def _losses(logits, tokens):
    """The loss of every prediction of a sequence, float32 `(length - 1,)`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:-1].astype(jnp.float32), tokens[1:])


__all__ = ["perplexity"]
