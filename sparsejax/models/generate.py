"""Text from a `Transformer`, one token at a time, with the keys and values of earlier tokens kept.

A cache is a pytree `{"block_i": {"key", "value"}}` of arrays `(batch, capacity, kv_heads, head_width)`; a block
without attention has an empty one. The tokens are those that running the whole sequence again would give.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sparsejax.models.layers import head_width, layer_sizes
from sparsejax.models.transformer import Transformer


def init_cache(model: Transformer, batch: int, length: int, dtype=None):
    """An empty cache for `batch` sequences of at most `length` tokens.

    Args:
      dtype: of the keys and values, None for the model's, or float32 if it leaves that to its parameters.
    """
    dtype = dtype or model.dtype or jnp.float32

    def empty(i):
        sizes = layer_sizes(model, i)
        heads = sizes["kv_heads"] or sizes["heads"]
        shape = (batch, length, heads, head_width(model))
        return {name: jnp.zeros(shape, dtype) for name in ("key", "value")} if sizes["heads"] else {}

    return {f"block_{i}": empty(i) for i in range(model.depth)}


def advance(model: Transformer, params, tokens, cache, offset):
    """Logits of the token after `tokens`, and the cache with them in it.

    Args:
      params: of the model.
      tokens: int32 `(batch, length)`, which follow the `offset` tokens that the cache holds.
      offset: int, or int32 scalar. Only an int is held against the capacity of the cache.

    Returns:
      float32 `(batch, classes)`, and the new cache.

    Raises:
      ValueError: for more tokens than the cache or the model has places for.
    """
    context = model.context(tokens, offset)
    x = model.apply({"params": params}, tokens, offset, method="start")
    new = {}
    for i in range(model.depth):
        name = f"block_{i}"
        x, new[name] = model.block(i).apply(
            {"params": params[name]}, x, cache=cache[name], offset=offset, **context
        )
    return model.apply({"params": params}, x[:, -1:], method="finish")[:, 0], new


def generate(
    model: Transformer,
    params,
    tokens,
    steps: int,
    temperature: float = 0.0,
    key=None,
    stop: int | None = None,
):
    """The tokens with `steps` more after them; compiled once per model and shape.

    Args:
      params: of the model, also packed or lazy ones; the keys and values are kept in the dtype that they give.
      tokens: int32 `(batch, length)`, at least one token. All are read: prompts of one batch have one length.
      steps: how many to add.
      temperature: 0 for the likeliest token (of equal ones the first); otherwise tokens are drawn from
        softmax(logits / temperature).
      key: a `jax.random.key`, for a temperature above 0.
      stop: the token that ends a sequence: once one has been added, all that follow in its row are that token too.

    Returns:
      int32 `(batch, length + steps)`.

    Raises:
      ValueError: for another model, a negative number, no token or key, more tokens than `max_length`, or tokens
        (but traced ones) that are not of the vocabulary.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"only a Transformer generates tokens, got {type(model).__name__}")
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens to go on from must be (batch, length > 0), got shape {tokens.shape}")
    if steps < 0 or not temperature >= 0:
        raise ValueError(f"steps={steps} and temperature={temperature} must not be negative")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens at random and needs a key")
    if tokens.shape[1] + steps > model.max_length:
        raise ValueError(
            f"{tokens.shape[1]} tokens and {steps} more exceed the model's max_length={model.max_length}"
        )
    for token in () if isinstance(tokens, jax.core.Tracer) else (tokens.min(), tokens.max()):
        _check_token("a token to go on from", token, model)
    if stop is not None:
        _check_token("stop", stop, model)
    if not steps:
        return tokens
    return _generate(model, dict(params), tokens, steps, temperature, key if temperature > 0 else None, stop)


def _check_token(name: str, token, model: Transformer) -> None:
    if not 0 <= token < model.classes:
        raise ValueError(f"{name} must be from 0 to {model.classes - 1}, got {token}")


@partial(jax.jit, static_argnames=("model", "steps"))
def _generate(model, params, tokens, steps, temperature, key, stop):
    def pick(logits, step):
        if key is None:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)

    def extend(state, step):
        token, cache = state
        logits, cache = advance(model, params, token[:, None], cache, length + step - 1)
        new = pick(logits, step)
        token = new if stop is None else jnp.where(token == stop, token, new)
        return (token, cache), token

    batch, length = tokens.shape
    hidden = jax.eval_shape(lambda: model.apply({"params": params}, tokens, method="start"))
    cache = init_cache(model, batch, length + steps, hidden.dtype)
    logits, cache = advance(model, params, tokens, cache, 0)
    first = pick(logits, 0)
    _, later = jax.lax.scan(extend, (first, cache), jnp.arange(1, steps))
    return jnp.concatenate([tokens, first[:, None], later.T], axis=1)
