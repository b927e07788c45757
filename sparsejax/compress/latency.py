"""How long the sub-blocks of a Transformer take at every size, measured here."""

from collections.abc import Mapping

import jax
import numpy as np

from pallas_kernels.timing import measure
from sparsejax.compress.groups import STRUCTURES, units_of
from sparsejax.models import Transformer
from sparsejax.models.layers import layer_sizes

REPEATS = 20


def measure_latency(
    model: Transformer,
    sizes: Mapping,
    sequences: int,
    length: int,
    *,
    dtype="float32",
    repeats: int = REPEATS,
) -> dict:
    """A table of median forward times in milliseconds, with compiled functions whose results are awaited.

    Args:
      model: any `Transformer` of dense layers.
      sizes: {(block, "attention" or "mlp"): numbers of head groups or channels}; see `groups.Units`.
      sequences, length: of the input.
      dtype: of the parameters, and of the hidden states of a model that has no dtype of its own.
      repeats: rounds, in each of which every size of a sub-block runs once.

    Returns:
      {"times": {"block_0/attention": {"4": milliseconds, ...}, ...}, "rest": of embedding and head, "dense": of the
      rest and all sub-blocks as they are, "sequences", "length"}; JSON-able. A sub-block's norm and its addition to
      the residual count with it, and one of size 0 takes no time. The shortcuts of a sliced model, which stay
      whatever goes, count with the rest. Sub-blocks of the same shape are measured once.

    Raises:
      ValueError: for sequences or a length below 1, or longer than the model takes.
    """
    if sequences < 1 or not 1 <= length <= model.max_length:
        raise ValueError(
            f"times need at least one sequence of 1 to {model.max_length} tokens, got {sequences} of {length}"
        )
    units, times, known = units_of(model, tuple(STRUCTURES)), {}, {}

    def measured(i, blocks):
        signature = tuple(blocks.items())
        if signature not in known:
            known[signature] = _measure_blocks(model, i, blocks, sequences, length, dtype, repeats)
        return known[signature]

    sliced = [i for i in range(model.depth) if layer_sizes(model, i)["stream"]]
    shortcuts = {i: measured(i, {0: _alone(model, i, "mlp", 0)})["0"] for i in sliced}
    for (i, sub), wanted in sizes.items():
        blocks = {size: _alone(model, i, sub, size) for size in sorted({*wanted, units[i, sub].count} - {0})}
        own = {size: max(time - shortcuts.get(i, 0.0), 0.0) for size, time in measured(i, blocks).items()}
        times[f"block_{i}/{sub}"] = {"0": 0.0, **own}
    outside = {"rest": model.clone(depth=0, layers=())}
    rest = time_models(outside, sequences, length, dtype=dtype, repeats=repeats)["rest"]
    rest += sum(shortcuts.values())
    dense = rest + sum(times[f"block_{i}/{sub}"][str(units[i, sub].count)] for i, sub in sizes)
    return {"times": times, "rest": rest, "dense": dense, "sequences": sequences, "length": length}


def time_of(table: Mapping, key: tuple[int, str], size: int) -> float:
    """Milliseconds of a sub-block `(block, sub-block)` at a size, linear between the measured ones."""
    known = {int(count): time for count, time in table["times"][f"block_{key[0]}/{key[1]}"].items()}
    counts = sorted(known)
    return float(np.interp(size, counts, [known[count] for count in counts]))


def time_models(
    models: Mapping[str, Transformer],
    sequences: int,
    length: int,
    *,
    dtype="float32",
    repeats: int = REPEATS,
) -> dict[str, float]:
    """{name: median milliseconds of a whole forward pass}, measured in turns, with random parameters of a dtype."""
    tokens = np.zeros((sequences, length), np.int32)
    return measure({name: _runner(model, tokens, dtype) for name, model in models.items()}, repeats)


def _alone(model, i: int, sub: str, size: int):
    """Block `i` with nothing but one sub-block of that size."""
    block = model.block(i)
    if sub == "mlp":
        return block.clone(heads=0, hidden_width=size, parent=None)
    group = block.heads // (block.kv_heads or block.heads)
    return block.clone(heads=size * group, kv_heads=size, hidden_width=0, parent=None)


def _measure_blocks(model, i: int, blocks: Mapping, sequences: int, length: int, dtype, repeats: int) -> dict:
    width = (layer_sizes(model, i)["stream"] or (model.width,))[0]
    states = np.random.default_rng(0).normal(size=(sequences, length, width)).astype(model.dtype or dtype)
    context = model.context(length)
    runners = {str(size): _runner(block, states, dtype, **context) for size, block in blocks.items()}
    return measure(runners, repeats)


def _runner(module, x, dtype, **context):
    """A function of no arguments that applies the module with parameters of a dtype, and waits."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, **context))["params"]
    random = np.random.default_rng(0)

    def draw(leaf):
        return jax.numpy.asarray(random.normal(size=leaf.shape, scale=0.02), dtype)

    params, x = jax.tree.map(draw, shapes), jax.numpy.asarray(x)
    apply = jax.jit(module.apply)
    return lambda: jax.block_until_ready(apply({"params": params}, x, **context))


__all__ = ["REPEATS", "measure_latency", "time_models", "time_of"]
