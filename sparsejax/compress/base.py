"""What compression methods are, and the selection of weights that they share.

A *layer* is one linear kernel `(in, out)`. What papers call a row (the weights of one output) is a column of it;
N:M patterns run along the inputs, axis -2. A layer-wise method is a function of one layer:

    kernel, mask = method.prune(kernel, stats, sparsity, pattern)

and `sparsejax.compress.prune_layers` takes it through a model block by block. Other methods see the whole model.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.masks import Masks, check_sparsity, choose
from sparsejax.patterns import NM, Block, Pattern, Unstructured, parse
from sparsejax.selection import top_k_mask

PATTERNS = {
    "unstructured": Unstructured,
    "N:M along the inputs such as 2:4": NM,
    "block:AxB such as block:4x4": Block,
}
SCOPES = ("row", "layer")


class Layerwise(NamedTuple):
    """A method that compresses one layer at a time.

    Attributes:
      name: for reports and messages.
      needs: entries of `sparsejax.compress.statistics` that it reads.
      prune: `(kernel (in, out) float32, stats, sparsity, pattern) -> (kernel float32, mask bool)`; the kernel is
        exactly 0 outside the mask, and at sparsity 0 it is the given one. `sparsity` and `pattern` are static.
      patterns: classes of patterns that it can do.
      host: whether a part of it runs on the host, so that `prune` cannot be traced by `jax.jit`.
      rules: {shell pattern on paths in a block: method}, for layers that `prune_layers` gives to another method; the
        most specific pattern wins. None: no layer.
      settings: JSON-able, the arguments that the results depend on; those of a wrapped method are its "initial".
    """

    name: str
    needs: tuple[str, ...]
    prune: Callable
    patterns: tuple[type, ...] = (Unstructured, NM, Block)
    host: bool = False
    rules: Mapping[str, "Layerwise"] | None = None
    settings: Mapping[str, Any] = MappingProxyType({})

    def wrapped_rules(self, wrap: Callable[["Layerwise"], "Layerwise"]) -> dict[str, "Layerwise"] | None:
        """The rules of a method that wraps this one: their methods are wrapped too."""
        return {rule: wrap(method) for rule, method in (self.rules or {}).items()} or None


class Whole(NamedTuple):
    """A method that sees the whole model.

    Attributes:
      name: for reports and messages.
      run: `(model, params, tokens, sparsity, pattern=None, *, progress=None) -> Compressed`.
    """

    name: str
    run: Callable


class Compressed(NamedTuple):
    """What compression gives.

    Attributes:
      model: the linen module of the new parameters (another one if arrays shrank).
      params: parameters in the dtypes of the given ones; zero wherever a mask is zero.
      masks: a tree like `params` as in `sparsejax.masks`, or None for structured methods.
      report: JSON-able findings; of layer-wise methods "sparsity" (reached, over the layers) and "layers".
    """

    model: Any
    params: Any
    masks: Masks | None
    report: dict


class CompressionWarning(UserWarning):
    """A layer was compressed, but not as asked (`prune_layers` puts the layer's name before the sentence)."""


_findings: ContextVar[dict | None] = ContextVar("findings", default=None)


def note(**numbers: float) -> None:
    """Adds findings to the report of the layer that `prune_layers` is at; those of its experts are summed."""
    found = _findings.get()
    if found is not None:
        found.update({name: found.get(name, 0) + number for name, number in numbers.items()})


@contextlib.contextmanager
def collect():
    """Gives the dict to which `note` adds inside the context."""
    token = _findings.set({})
    try:
        yield _findings.get()
    finally:
        _findings.reset(token)


def warn(sentence: str) -> None:
    """Warns with a `CompressionWarning`; also kept in the report of the layer by `prune_layers`."""
    warnings.warn(sentence, CompressionWarning, stacklevel=3)


# --- how many and which ------------------------------------------------------------------------------


def dropped(sparsity: float, n: int) -> int:
    """floor(sparsity * n), where a product that misses an integer only by rounding is that integer."""
    return math.floor(sparsity * n + 1e-6)


def check_pattern(
    name: str, pattern: str | Pattern, allowed: tuple[type, ...] = (Unstructured, NM, Block)
) -> Pattern:
    """The pattern, if the method called `name` can do it.

    Raises:
      ValueError: one sentence that lists the patterns it can do.
    """
    found = parse(pattern)
    if isinstance(found, allowed) and not (isinstance(found, NM) and found.axis not in (-2, 0)):
        return found
    known = ", ".join(text for text, kind in PATTERNS.items() if kind in allowed)
    raise ValueError(f"{name} cannot do the pattern {pattern} (it can do: {known})")


def layer_budget(
    name: str, sparsity: float | None, pattern: str | Pattern, allowed=(Unstructured, NM, Block)
) -> tuple[float, Pattern]:
    """The sparsity and the pattern of one layer, checked; the first lines of every `prune`.

    N:M has its own sparsity, which may be left out (None). Another multiple of 1/M asks for that N of every M
    (allocations over layers do), and 0 for a dense layer.

    Args:
      name: of the method.
      sparsity: in [0, 1), or None with N:M.
      pattern: a pattern or its name.
      allowed: classes of patterns that the method can do.

    Raises:
      ValueError: for a sparsity outside [0, 1) or one that N:M cannot have, and as `check_pattern`.
    """
    pattern = check_pattern(name, pattern, allowed)
    if not isinstance(pattern, NM):
        return check_sparsity(sparsity), pattern
    if sparsity is None:
        return pattern.sparsity, pattern
    kept = (1 - check_sparsity(sparsity)) * pattern.m
    if abs(kept - round(kept)) > 1e-6:
        raise ValueError(
            f"{pattern.n}:{pattern.m} keeps whole weights of every {pattern.m}, so its sparsity must be a multiple "
            f"of 1/{pattern.m}, got {sparsity}"
        )
    return 1 - round(kept) / pattern.m, NM(round(kept), pattern.m, pattern.axis)


def select(scores, sparsity: float, pattern: Pattern, scope: str = "row"):
    """The mask that keeps the highest scores of one layer, with an exact count; jit-able.

    Args:
      scores: `(in, out)`, higher is kept; ties go to the lowest position.
      sparsity: fraction to drop, in [0, 1), static; 0 keeps everything.
      pattern: as `layer_budget` gives it. N:M keeps n of every m inputs of an output, blocks are ranked by
        their mean score over the layer.
      scope: what an unstructured mask is exact in: "row" drops floor(sparsity * in) weights of every output,
        "layer" floor(sparsity * in * out) of all.

    Raises:
      ValueError: for an unknown scope, a layer that the pattern does not fit, and NaN scores (outside `jax.jit`).
    """
    choose("scope", scope, SCOPES)
    if sparsity == 0:
        return jnp.ones(scores.shape, bool)
    pattern.check("the kernel", scores.shape)
    if isinstance(pattern, NM):
        return pattern.select(scores)
    if isinstance(pattern, Unstructured) and scope == "row":
        return top_k_mask(scores, scores.shape[0] - dropped(sparsity, scores.shape[0]), axis=0)
    units = pattern.units(scores.shape)
    return pattern.expand(
        pattern.select(pattern.pool(scores), units - dropped(sparsity, units)), scores.shape
    )


def masked(kernel, mask):
    """The kernel with exact zeros outside the mask."""
    return jnp.where(mask, kernel, 0)


def is_traced(*arrays) -> bool:
    """Whether `jax.jit` (or another transformation) is tracing one of the arrays."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)
