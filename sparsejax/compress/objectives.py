"""What compressed models are trained on: the next token, or the dense model's predictions."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.compress.topkld import topkld


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Mean loss of the next token, in nats: `(params, tokens (b, length)) -> float32 ()`."""

    model: Any

    def __call__(self, params, tokens):
        logits = self.model.apply({"params": params}, tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


@dataclasses.dataclass(frozen=True)
class Distilled:
    """Mean TopKLD per token, in nats: `(params, (tokens (b, length), logits of the teacher)) -> float32 ()`.

    Attributes:
      model: of the student.
      keywords: of `topkld`, as sorted pairs.
    """

    model: Any
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, params, batch):
        tokens, teacher = batch
        return topkld(**dict(self.keywords))(teacher, self.model.apply({"params": params}, tokens)).mean()


class Taught(Sequence):
    """Batches (tokens, logits of the teacher); logits are computed when a batch is asked for, and not kept."""

    def __init__(self, model, params, batches: Sequence):
        self._params, self._batches = params, batches
        self._apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int):
        return self._batches[i], self._apply(self._params, self._batches[i])

    def __iter__(self) -> Iterator:
        return map(self.__getitem__, range(len(self)))


def check_distil(distil: Mapping | None) -> None:
    """Raises ValueError unless `distil` is None or keywords of `topkld`."""
    if distil is None:
        return
    try:
        topkld(**distil)
    except TypeError as error:
        raise ValueError(f"distil must be keywords of topkld, got {distil!r} ({error})") from None


def objective(
    model, params: Mapping, tokens, batch: int, distil: Mapping | None = None
) -> tuple[Callable, Sequence]:
    """What a model is trained on.

    Args:
      model: linen module of logits `(b, length, classes)`.
      params: of the dense model, the teacher.
      tokens: int `(sequences, length)`.
      batch: sequences of a batch; the last one may have fewer.
      distil: None for `NextToken`; keywords of `topkld` for `Distilled`.

    Returns:
      `(loss, batches)`: loss is hashable, `(params, batches[i]) -> float32 ()`.

    Raises:
      ValueError: before the model runs, for sequences of one token without `distil`, and as `topkld`.
    """
    tokens = np.asarray(tokens)
    batches = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    if distil is None:
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"the next token is trained on sequences of at least two, got tokens of shape {tokens.shape}"
            )
        return NextToken(model), batches
    check_distil(distil)
    loss, taught = Distilled(model, tuple(sorted(distil.items()))), Taught(model, params, batches)
    jax.eval_shape(lambda: loss(params, taught[0]))
    return loss, taught
