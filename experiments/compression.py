"""Compression of a trained decoder: calibrated, compressed, and compared with itself; the runs of the tables on
post-training compression, and what `experiments.compress` does with a folder."""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import stdlib_decoder
from experiments.tables import Metric
from pallas_kernels.timing import blocking, measure
from sparsejax import compress, patterns, training
from sparsejax.allocator import keep_freed_memory
from sparsejax.compress.base import check_pattern, layer_budget
from sparsejax.data import text
from sparsejax.masks import check_sparsity, choose
from sparsejax.training.config import resolve
from sparsejax.training.pretrained import obtain

ALLOCATIONS = ("uniform", "owl")
BITS = Metric("bits_per_byte", "held-out loss", 1, 3, "bits per byte")
DAMAGE = Metric("damage", "loss above the dense model's", 1, 3, "bits per byte")
REACHED = Metric("sparsity", "sparsity reached", 100, 2, "%")
STORED = Metric("parameters_left", "parameters that are stored", 100, 1, "% of dense")
SPEEDUP = Metric("speedup", "forward pass, times faster than dense", 1, 2)
SECONDS = Metric("seconds", "compression", 1, 1, "s")
QUICK = {
    "decoder.steps": 30,
    "decoder.optimizer.warmup_steps": 10,
    "decoder.model.depth": 2,
    "decoder.model.width": 32,
    "decoder.model.hidden": 64,
    "decoder.data.size": 100_000,
    "calibration.samples": 8,
    "calibration.length": 32,
    "evaluation.windows": 8,
}
ABOUT = (
    "A byte-level decoder of the Llama family (four blocks of width 128) is trained for 600 steps on the sources of "
    "Python's standard library. It is compressed with 128 windows of 128 bytes of training text; embeddings and head stay "
    "as they are. The loss is that of 256 windows of files that were not trained on. Seeds are trainings. "
)


def base() -> ml_collections.ConfigDict:
    """What tables start from: the decoder of `configs/stdlib_decoder.py`, and text to calibrate it."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "decoder": stdlib_decoder.get_config().to_dict(),
            "method": "dense",
            "options": {},
            "sparsity": ml_collections.config_dict.placeholder(float),
            "pattern": ml_collections.config_dict.placeholder(str),
            "allocation": "uniform",
            "calibration": {"corpus": "stdlib", "samples": 128, "length": 128},
            "evaluation": {"corpus": "stdlib", "windows": 256},
            "repeats": 0,
        }
    )


class Text(NamedTuple):
    """Tokens of a corpus: int32 `(sequences, length)` for calibration and for evaluation, and the bytes that the
    predicted tokens of the latter stand for."""

    calibration: np.ndarray
    held_out: np.ndarray
    size: int


def read_text(config: Mapping, tokenizer=None) -> Text:
    """The tokens that a configuration asks for.

    Args:
      config: `seed`; `calibration` with `corpus`, `samples` and `length`; `evaluation` with `corpus` and `windows` of
        the same length.
      tokenizer: a `tokenizers.Tokenizer`; None for bytes.

    Raises:
      ValueError, FileNotFoundError: as `sparsejax.data.text`.
    """
    chosen, held_out = config["calibration"], config["evaluation"]
    length = chosen["length"]
    train = text.encode(text.read(chosen["corpus"], "train"), tokenizer)
    calibration = text.sample(train, chosen["samples"], length, config["seed"])
    test = text.encode(text.read(held_out["corpus"], "test"), tokenizer)
    windows = text.windows(test, length, held_out["windows"])
    return Text(calibration, windows, _bytes(windows[:, 1:], tokenizer))


def _bytes(tokens, tokenizer) -> int:
    if tokenizer is None:
        return tokens.size
    return sum(len(words.encode()) for words in tokenizer.decode_batch(tokens.tolist()))


def apply_method(model, params: Mapping, tokens, config: Mapping, **keywords) -> compress.Compressed:
    """Compresses a model as a configuration says.

    Args:
      model, params: a decoder and its parameters by part.
      tokens: int32 `(sequences, length)`, for calibration.
      config: `method` and its `options`; `sparsity` and `pattern`, or None for the method's own; `allocation`:
        "uniform", "owl", or a mapping of layer patterns to sparsities.
      keywords: `resume`, `sink` and `progress` of `sparsejax.compress.prune_layers`.

    Raises:
      ValueError: one sentence, for what the method cannot do.
    """
    method = check_method(config)
    sparsity, pattern, allocation = config["sparsity"], config["pattern"], config["allocation"]
    if isinstance(method, compress.Whole):
        return method.run(model, params, tokens, sparsity, pattern, progress=keywords.get("progress"))
    pattern = pattern or "unstructured"
    if allocation == "owl":
        allocation = compress.owl(model, params, tokens, sparsity, pattern=pattern)
    return compress.prune_layers(
        method, model, params, tokens, sparsity, pattern, allocation=allocation, **keywords
    )


def check_method(config: Mapping) -> compress.Layerwise | compress.Whole:
    """The method that a configuration asks for; what can be known to be wrong before a model is read, is.

    Args:
      config: as for `apply_method`.

    Raises:
      ValueError: one sentence, for a method, keyword, sparsity, pattern or allocation that cannot be.
    """
    method = compress.build(config["method"], **config["options"])
    sparsity, pattern, allocation = config["sparsity"], config["pattern"], config["allocation"]
    if isinstance(allocation, str):
        choose("allocation", allocation, ALLOCATIONS)
    if isinstance(method, compress.Whole):
        if allocation != "uniform":
            raise ValueError(
                f"{config['method']} decides by itself how much of each layer it removes; leave out the allocation"
            )
        if sparsity is not None:
            check_sparsity(sparsity)
        if pattern is not None:
            patterns.parse(pattern)
    elif allocation == "uniform":
        layer_budget(config["method"], sparsity, pattern or "unstructured", method.patterns)
    else:
        check_pattern(config["method"], pattern or "unstructured", method.patterns)
    return method


def parameters(params: Mapping) -> int:
    """How many parameters there are, zeros included; part by part, of which one need be in memory."""
    return sum(int(np.prod(leaf.shape)) for part in params for leaf in jax.tree.leaves(params[part]))


def latency(networks: Mapping[str, tuple], tokens, repeats: int) -> dict[str, float]:
    """Median milliseconds of a forward pass of each of {name: (model, params)} on the same tokens, taking turns."""
    inputs = jnp.asarray(tokens)
    functions = {
        name: blocking(lambda p, x, model=model: model.apply({"params": p}, x), dict(params), inputs)
        for name, (model, params) in networks.items()
    }
    return measure(functions, repeats)


def decoder(config: Mapping, runs: pathlib.Path):
    """The decoder that a table's configuration describes under `decoder`, trained with its `seed`, or found in `runs`.

    Returns:
      (model, params).
    """
    wanted = dict(config["decoder"])
    wanted |= {"seed": config["seed"], "eval_every": 0, "curves": False, "keep_checkpoints": 1}
    found = obtain(
        resolve(wanted | {"checkpoint_every": wanted["steps"]}),
        runs,
        None,
        lambda each, folder: training.run(each, folder, progress=False, runs=runs),
    )
    return found.model, found.variables["params"]


def run(config: Mapping, workdir: pathlib.Path) -> dict[str, Any]:
    """Executes one row of a table; see `sparsejax.training.run` for the face of such a function.

    Args:
      config: `seed`; `decoder`, a training configuration; what `read_text` and `apply_method` read, where the method
        "dense" leaves the model as it is; `repeats` of the latency, 0 to leave it out.
      workdir: where `summary.json` is left; decoders lie beside it.

    Returns:
      `loss` in nats and `bits_per_byte` on held-out text, with those of the dense model (`dense_...`) and their
      difference `damage` in bits; `sparsity` as the method counts it; `parameters_left`, the share of parameters that are
      still stored; `speedup` of a forward pass, measured against the dense model; `seconds` of compression; and
      what else the method reports as single numbers, as `report_...`.
    """
    keep_freed_memory()
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    model, params = decoder(config, workdir.parent)
    tokens = read_text(config)
    dense = compress.perplexity(model, params, tokens.held_out, size=tokens.size, progress=False)
    begun = time.perf_counter()
    if config["method"] == "dense":
        found = compress.Compressed(model, params, None, {"sparsity": 0.0})
    else:
        found = apply_method(model, params, tokens.calibration, config, progress=False)
    seconds = time.perf_counter() - begun
    loss = compress.perplexity(found.model, found.params, tokens.held_out, size=tokens.size, progress=False)
    summary = {f"dense_{name}": value for name, value in dense.items()} | loss
    summary |= {
        "damage": loss["bits_per_byte"] - dense["bits_per_byte"],
        "sparsity": found.report["sparsity"],
        "parameters_left": parameters(found.params) / parameters(params),
        "seconds": round(seconds, 2),
    }
    if config["repeats"]:
        networks = {"dense": (model, params), "ours": (found.model, found.params)}
        times = latency(networks, tokens.held_out[:1], config["repeats"])
        summary |= {"speedup": times["dense"] / times["ours"], "milliseconds": times["ours"]}
    numbers = {name: value for name, value in found.report.items() if isinstance(value, int | float)}
    summary |= {f"report_{name}": value for name, value in numbers.items() if name != "sparsity"}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def peak_memory() -> int:
    """The most memory that this process has used so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
