"""What `experiments.compress` does: opens a folder, compresses its model, compares both, writes the new folder."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
from tqdm import tqdm

from experiments.compression import apply_method, parameters, peak_memory, read_text
from sparsejax import compress, formats
from sparsejax.interop import huggingface, native
from sparsejax.masks import choose, map_with_name
from sparsejax.training.config import resolve
from sparsejax.training.loop import load as load_problem
from sparsejax.training.pretrained import restore
from sparsejax.training.summary import read_summary
from sparsejax.training.workdir import read_json

LONGEST = 2048
DTYPES = ("float32", "bfloat16")


class Source(NamedTuple):
    """A model from a folder.

    Attributes:
      model, params: a decoder, and its parameters by part, which may be read when asked for.
      config: what `sparsejax.interop.huggingface.save` needs.
      tokenizer: a `tokenizers.Tokenizer`, or None for a model of bytes.
      folder: whose tokenizer files are copied, or None.
    """

    model: Any
    params: Mapping[str, Any]
    config: dict[str, Any]
    tokenizer: Any
    folder: Path | None


def open_model(folder, dtype: str | None = None) -> Source:
    """Opens a Hugging Face folder, one of ours, or the workdir of a finished run.

    Args:
      folder: the folder.
      dtype: of the parameters; None leaves them as they are.

    Raises:
      ValueError: one sentence, for a folder that is none of these, or what its loader says of it.
    """
    folder = Path(folder).expanduser()
    path = folder / huggingface.CONFIG
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no {huggingface.CONFIG}")
    config = read_json(path)
    if "optimizer" in config:
        model, params = _of_run(folder, config)
        source = Source(model, params, _like(model), None, None)
    elif config.get("model_type") == native.MODEL_TYPE:
        model, params = native.load(folder)
        source = Source(model, formats.unpack(params), _like(model), None, folder)
    else:
        found = huggingface.load(folder, dtype, lazy=True)
        return Source(*found, _tokenizer(folder, found.model), folder)
    if dtype is not None:
        source = source._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), dict(source.params)))
    return source._replace(tokenizer=None if folder is None else _tokenizer(folder, source.model))


def _of_run(folder: Path, config: Mapping):
    if read_summary(folder) is None:
        raise ValueError(f"{str(folder)!r} holds no finished run; train it first")
    problem = load_problem(resolve(config), folder / "pretrained", None, False)
    found = restore(problem, folder)
    return found.model, found.variables["params"]


def _like(model) -> dict[str, str]:
    """The Hugging Face family whose blocks a decoder of ours has."""
    if getattr(model, "positions", None) != "rotary":
        return {"model_type": "gpt2"}
    if model.experts:
        return {"model_type": "mixtral"}
    return {"model_type": "qwen3" if model.qk_norm else "llama"}


def _tokenizer(folder: Path, model):
    """The folder's tokenizer; None where there is none and the vocabulary is that of bytes."""
    try:
        return huggingface.tokenizer(folder)
    except ValueError:
        if model.classes == 256 and not (folder / "tokenizer.json").exists():
            return None
        raise


# --- the command -------------------------------------------------------------------------------------


def compress_folder(folder, out, settings: Mapping, progress: bool = True) -> dict[str, Any]:
    """Compresses the model of a folder into a new one; see `experiments.compress`.

    Args:
      folder: of the model, see `open_model`.
      out: the new folder; it must not exist, or be empty.
      settings: `seed`, `method`, `options`, `sparsity`, `pattern`, `allocation`, `calibration` (`corpus`, `samples`,
        `length` or None), `evaluation` (`corpus`, `windows`), `format` and `dtype`.
      progress: show progress bars on stderr and the findings on stdout.

    Returns:
      What `summary.json` holds.

    Raises:
      ValueError, OSError: one sentence; nothing is left of the new folder.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists already; remove it or name another folder")
    choose("method", settings["method"], compress.METHODS)
    if settings["dtype"] is not None:
        choose("dtype", settings["dtype"], DTYPES)
    source = open_model(folder, settings["dtype"])
    if not hasattr(source.model, "max_length"):
        raise ValueError(
            f"{str(folder)!r} holds a {type(source.model).__name__}, and only decoders have a next token"
        )
    settings = _with_length(settings, source.model)
    text = read_text(settings, source.tokenizer)
    before = compress.perplexity(
        source.model, source.params, text.held_out, size=text.size, progress=progress
    )
    begun = time.perf_counter()
    resume = out.with_name(out.name + ".resume")
    with _new_folder(out) as partial:
        found, kind = _compress_into(partial, source, text.calibration, settings, resume, progress)
        seconds = time.perf_counter() - begun
        after = compress.perplexity(
            found.model, found.params, text.held_out, size=text.size, progress=progress
        )
        summary = {
            "model": str(folder),
            **settings,
            "before": before,
            "after": after,
            "sparsity_reached": found.report["sparsity"],
            "parameters_before": parameters(source.params),
            "parameters": parameters(found.params),
            "seconds": round(seconds, 2),
            "peak_memory_bytes": peak_memory(),
            "folder": kind,
            "report": found.report,
        }
        _write_findings(partial, found, summary)
    shutil.rmtree(resume, ignore_errors=True)
    if progress:
        tqdm.write(_lines(summary, out))
    return summary


def _with_length(settings: Mapping, model) -> dict[str, Any]:
    """The settings with a length of calibration windows that the model can read."""
    length = settings["calibration"]["length"] or min(LONGEST, model.max_length)
    if not 2 <= length <= model.max_length:
        raise ValueError(f"length must be from 2 to the model's {model.max_length} tokens, got {length}")
    return {**settings, "calibration": {**settings["calibration"], "length": length}}


@contextlib.contextmanager
def _new_folder(out: Path):
    """A folder beside `out` that takes its name when the context ends without an error, and else disappears."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _compress_into(partial: Path, source: Source, tokens, settings: Mapping, resume: Path, progress: bool):
    """Compresses a model and writes it; (what came out, the kind of folder that it is in).

    A layer-wise method's blocks go to the folder one by one and are read back when they are needed, so that the model
    need not fit into memory.
    """
    keywords = {"resume": resume, "progress": progress}
    writer, reason = _writer(partial, source, source.model)
    layerwise = isinstance(compress.build(settings["method"], **settings["options"]), compress.Layerwise)
    if layerwise and reason is None:
        with writer as sink:
            found = apply_method(source.model, source.params, tokens, settings, sink=sink, **keywords)
        written = huggingface.load(partial, lazy=True)
        return compress.Compressed(written.model, written.params, None, found.report), "huggingface"
    found = apply_method(source.model, source.params, tokens, settings, **keywords)
    writer, reason = _writer(partial, source, found.model)
    if reason is None:
        with writer as sink:
            for part in found.model.parts():
                sink[part] = found.params[part]
        return found, "huggingface"
    tqdm.write(f"written as a folder of sparsejax's own: {reason}")
    partial.mkdir()
    native.save(partial, found.model, found.params)
    return found, native.MODEL_TYPE


def _writer(partial: Path, source: Source, model):
    """(writer, None), or (None, the reason why no Hugging Face folder can hold the model)."""
    try:
        return huggingface.writer(partial, model, source.config, source=source.folder), None
    except ValueError as reason:
        return None, reason


def _write_findings(folder: Path, found: compress.Compressed, summary: dict) -> None:
    if summary["format"] is not None:
        params = dict(found.params)
        format = None if summary["format"] == "auto" else summary["format"]
        packed, report = formats.pack_tree(params, _masks(params, summary["report"]), format)
        formats.save(folder / "packed.safetensors", packed)
        summary["packed_bytes"], summary["dense_bytes"] = report.packed_bytes, report.dense_bytes
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    (folder / "README.md").write_text(_card(summary))
    if summary["report"].get("layers"):
        _draw(folder / "compression.png", summary)


def _masks(params, report: Mapping):
    """What a method kept of the layers it compressed: their nonzero weights."""
    layers = report.get("layers", {})

    def mask(name, leaf):
        return leaf != 0 if name in layers and leaf.ndim == 2 else jnp.asarray(True)

    return map_with_name(mask, params)


def _lines(summary: Mapping, out: Path) -> str:
    """What is printed at the end."""
    before, after = summary["before"], summary["after"]
    left = summary["parameters"] / summary["parameters_before"]
    lines = [
        f"loss        {before['loss']:.4f} -> {after['loss']:.4f} nats per token "
        f"(perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f})",
        f"sparsity    {100 * summary['sparsity_reached']:.2f} % by {summary['method']}, {summary['pattern']}; "
        f"{100 * left:.1f} % of {summary['parameters_before']:,} parameters are stored",
        f"time        {summary['seconds']:.1f} s, peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB",
    ]
    if "packed_bytes" in summary:
        lines.append(f"packed      {summary['packed_bytes']:,} bytes of {summary['dense_bytes']:,}")
    return "\n".join((*lines, f"written     {out} ({', '.join(sorted(p.name for p in out.iterdir()))})"))


def _card(summary: Mapping) -> str:
    """The model card: what was done, and what it did."""
    before, after, chosen = summary["before"], summary["after"], summary["calibration"]
    rows = [
        ("compressed from", f"`{summary['model']}`"),
        ("method", f"`{summary['method']}` {summary['options'] or ''}"),
        ("sparsity", f"{summary['sparsity_reached']:.4f} reached, {summary['sparsity']} asked, {summary['pattern']}"),
        ("allocation", f"`{summary['allocation']}`"),
        ("calibration", f"{chosen['samples']} windows of {chosen['length']} tokens of `{chosen['corpus']}`, seed {summary['seed']}"),
        ("parameters stored", f"{summary['parameters']:,} of {summary['parameters_before']:,}"),
    ]  # fmt: skip
    losses = [
        f"| {name} | {before[name]:.4f} | {after[name]:.4f} |"
        for name in ("loss", "perplexity", "bits_per_byte")
    ]
    return (
        "---\nlibrary_name: transformers\ntags:\n- sparsejax\n---\n\n# A compressed language model\n\n"
        + "| | |\n| --- | --- |\n"
        + "".join(f"| {name} | {value} |\n" for name, value in rows)
        + f"\nHeld-out text of `{summary['evaluation']['corpus']}`, {before['tokens']:,} predictions:\n\n"
        + "| | before | after |\n| --- | ---: | ---: |\n"
        + "\n".join(losses)
        + "\n\nZeros are stored as zeros; `summary.json` has every layer's density and error.\n"
    )


def _draw(path: Path, summary: Mapping) -> None:
    """Density and relative output error of every layer."""
    layers = summary["report"]["layers"]
    names = list(layers)
    figure = matplotlib.figure.Figure(figsize=(max(6.4, 0.16 * len(names) + 2), 5.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, key, title in zip(
        axes, ("density", "error"), ("density", "relative output error"), strict=True
    ):
        axis.bar(range(len(names)), [layers[name].get(key, 0.0) for name in names], color="#0072b2")
        axis.set_ylabel(title)
        axis.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(
        range(len(names)), [name.removesuffix("/kernel") for name in names], rotation=90, fontsize=7
    )
    figure.suptitle(f"{summary['method']}, {100 * summary['sparsity_reached']:.1f} % of the weights removed")
    figure.savefig(path, dpi=150)
