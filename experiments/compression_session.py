"""What `experiments.compress` does: opens a folder, compresses its model, compares both, writes the new folder."""

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
from tqdm import tqdm

from experiments.compression import apply_method, check_method, parameters, peak_memory, read_text
from sparsejax import compress, formats
from sparsejax.compress.resume import STATE
from sparsejax.data.stdlib import BYTES
from sparsejax.interop import huggingface, native, writing
from sparsejax.interop.tokenization import byte_tokenizer
from sparsejax.masks import choose, flatten, map_with_name
from sparsejax.models import Transformer
from sparsejax.training.config import resolve
from sparsejax.training.loop import load as load_problem
from sparsejax.training.pretrained import restore
from sparsejax.training.summary import read_summary
from sparsejax.training.workdir import read_json

LONGEST = 2048
DTYPES = ("float32", "bfloat16")
TOKENIZER = "tokenizer.json"


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
    config = read_json(path) if path.is_file() else {}
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
        if model.classes == BYTES and not (folder / TOKENIZER).exists():
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
    out = Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists already; remove it or name another folder")
    layerwise = isinstance(_checked(settings), compress.Layerwise)
    resume = resume_folder(out) if layerwise else None
    if resume is not None and resume.exists() and any(resume.iterdir()) and not is_resumable(out):
        raise ValueError(f"{str(resume)!r} is needed for finished blocks, but holds something else; move it away")
    source = open_model(folder, settings["dtype"])
    if not isinstance(source.model, Transformer):
        raise ValueError(
            f"{str(folder)!r} holds no decoder, which alone has a next token, but {type(source.model).__name__}"
        )
    settings = _with_length(settings, source.model)
    text = read_text(settings, source.tokenizer)
    before = compress.perplexity(
        source.model, source.params, text.held_out, size=text.size, progress=progress
    )
    begun = time.perf_counter()
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
            "peak_memory_bytes": peak_memory(),
            "parameters_before": parameters(source.params),
            "parameters": parameters(found.params),
            "seconds": round(seconds, 2),
            "folder": kind,
            "report": found.report,
        }
        _write_findings(partial, source, found, summary)
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    if progress:
        tqdm.write(_lines(summary, out))
    return summary


def resume_folder(out: Path) -> Path:
    """Where finished blocks wait for the folder `out`."""
    return out.with_name(out.name + ".resume")


def is_resumable(out) -> bool:
    """Whether blocks are finished of an interrupted compression into `out`."""
    return (resume_folder(Path(out).expanduser().resolve()) / STATE).exists()


def _checked(settings: Mapping):
    """The method; raises for what can be known to be wrong before a model is read."""
    if settings["dtype"] is not None:
        choose("dtype", settings["dtype"], DTYPES)
    if settings["format"] not in (None, "auto"):
        formats.check_format(settings["format"], "--format")
    return check_method(settings)


def _with_length(settings: Mapping, model) -> dict[str, Any]:
    """The settings with a length of calibration windows that the model can read."""
    length = settings["calibration"]["length"]
    length = min(LONGEST, model.max_length) if length is None else length
    if not 2 <= length <= model.max_length:
        raise ValueError(f"length must be from 2 to the model's {model.max_length} tokens, got {length}")
    return {**settings, "calibration": {**settings["calibration"], "length": length}}


@contextlib.contextmanager
def _new_folder(out: Path):
    """A folder that takes the name `out` when the context ends without an error, and else disappears.

    It lies in a hidden one beside `out`, with all that is written on the way.
    """
    around = out.with_name(f".{out.name}.partial")
    shutil.rmtree(around, ignore_errors=True)  # of a call that was killed
    around.mkdir(parents=True)
    try:
        yield around / out.name
        if out.exists():
            out.rmdir()
        (around / out.name).replace(out)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def _compress_into(partial: Path, source: Source, tokens, settings: Mapping, resume: Path | None, progress: bool):
    """Compresses a model and writes it; (what came out, the kind of folder that it is in).

    What came out has the parameters of the folder, read when they are asked for: a layer-wise method's blocks go there
    one by one, so that the model need not fit into memory.
    """
    writer, reason = _writer(partial, source, source.model)
    if resume is not None and reason is None:
        with writer as sink:
            found = apply_method(
                source.model, source.params, tokens, settings, sink=sink, resume=resume, progress=progress
            )
    else:
        keywords = {} if resume is None else {"resume": resume}
        found = apply_method(source.model, source.params, tokens, settings, progress=progress, **keywords)
        writer, reason = _writer(partial, source, found.model)
        if reason is not None:
            tqdm.write(f"written as a folder of sparsejax's own: {reason}")
            partial.mkdir()
            native.save(partial, found.model, found.params)
            if source.folder is not None:
                writing.copy_companions(source.folder, partial)
            return found, native.MODEL_TYPE
        with writer as sink:
            for part in found.model.parts():
                sink[part] = found.params[part]
    written = huggingface.load(partial, lazy=True)
    return found._replace(model=written.model, params=written.params), "huggingface"


def _writer(partial: Path, source: Source, model):
    """(writer, None), or (None, the reason why no Hugging Face folder can hold the model)."""
    try:
        return huggingface.writer(partial, model, source.config, source=source.folder), None
    except ValueError as reason:
        return None, reason


def _write_findings(folder: Path, source: Source, found: compress.Compressed, summary: dict) -> None:
    if summary["format"] is not None:
        _pack(folder, found, summary)
    if source.tokenizer is None:
        byte_tokenizer().save(str(folder / TOKENIZER))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    (folder / "README.md").write_text(_card(summary))
    if _densities(summary):
        _draw(folder / "compression.png", summary)


def _pack(folder: Path, found: compress.Compressed, summary: dict) -> None:
    """Writes `packed.safetensors`; that a kernel does not fit the format is said, and costs no compressed model."""
    params = formats.unpack(dict(found.params))
    format = None if summary["format"] == "auto" else summary["format"]
    try:
        packed, report = formats.pack_tree(params, _masks(params, found), format)
    except ValueError as error:
        summary["format_error"] = str(error)
        tqdm.write(f"no packed.safetensors: {error}")
        return
    formats.save(folder / "packed.safetensors", packed)
    summary["packed_bytes"], summary["dense_bytes"] = report.packed_bytes, report.dense_bytes


def _masks(params, found: compress.Compressed):
    """The masks that the method gives, or the nonzero weights of the layers that it made sparse; matrices only."""
    given = {} if found.masks is None else flatten(found.masks)
    layers = found.report.get("layers", {})

    def mask(name, leaf):
        if leaf.ndim == 2 and name in given:
            return given[name]
        sparse = leaf.ndim == 2 and layers.get(name, {}).get("density", 1.0) < 1
        return leaf != 0 if sparse else jnp.asarray(True)

    masks = map_with_name(mask, params)
    if not any(leaf.ndim for leaf in jax.tree.leaves(masks)):
        raise ValueError("the method left no kernel with zeros, so that there is nothing to pack")
    return masks


def _lines(summary: Mapping, out: Path) -> str:
    """What is printed at the end."""
    before, after = summary["before"], summary["after"]
    left = summary["parameters"] / summary["parameters_before"]
    lines = [
        f"loss        {before['loss']:.4f} -> {after['loss']:.4f} nats per token "
        f"(perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f})",
        f"sparsity    {100 * summary['sparsity_reached']:.2f} % by {_title(summary)}; "
        f"{100 * left:.1f} % of {summary['parameters_before']:,} parameters are stored",
        f"time        {summary['seconds']:.1f} s, peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB",
    ]
    if "packed_bytes" in summary:
        lines.append(f"packed      {summary['packed_bytes']:,} bytes of {summary['dense_bytes']:,}")
    return "\n".join((*lines, f"written     {out} ({', '.join(sorted(p.name for p in out.iterdir()))})"))


def _title(summary: Mapping) -> str:
    """The method, and the pattern if one was asked for."""
    return summary["method"] + (f", {summary['pattern']}" if summary["pattern"] else "")


def _card(summary: Mapping) -> str:
    """The model card: what was done, and what it did."""
    before, after, chosen = summary["before"], summary["after"], summary["calibration"]
    rows = [
        ("compressed from", f"`{summary['model']}`"),
        ("method", f"`{summary['method']}` {summary['options'] or ''}"),
        ("pattern", summary["pattern"]),
        ("sparsity asked", summary["sparsity"]),
        ("sparsity reached", f"{summary['sparsity_reached']:.4f}"),
        ("allocation", f"`{summary['allocation']}`"),
        ("calibration", f"{chosen['samples']} windows of {chosen['length']} tokens of `{chosen['corpus']}`, seed {summary['seed']}"),
        ("parameters stored", f"{summary['parameters']:,} of {summary['parameters_before']:,}"),
    ]  # fmt: skip
    losses = [
        f"| {name} | {before[name]:.4f} | {after[name]:.4f} |"
        for name in ("loss", "perplexity", "bits_per_byte")
    ]
    library = "sparsejax" if summary["folder"] == native.MODEL_TYPE else "transformers"
    details = "has every layer's density and error" if _densities(summary) else "has what the method reports"
    return (
        f"---\nlibrary_name: {library}\ntags:\n- sparsejax\n---\n\n# A compressed language model\n\n"
        + "| | |\n| --- | --- |\n"
        + "".join(f"| {name} | {value} |\n" for name, value in rows if value is not None)
        + f"\nHeld-out text of `{summary['evaluation']['corpus']}`, {before['tokens']:,} predictions:\n\n"
        + "| | before | after |\n| --- | ---: | ---: |\n"
        + "\n".join(losses)
        + f"\n\nZeros are stored as zeros; `summary.json` {details}.\n"
    )


def _densities(summary: Mapping) -> dict[str, float]:
    """The density of every layer whose report has one."""
    layers = summary["report"].get("layers", {})
    return {name: layer["density"] for name, layer in layers.items() if "density" in layer}


def _draw(path: Path, summary: Mapping) -> None:
    """Density and relative output error of every layer."""
    layers = summary["report"]["layers"]
    names = list(_densities(summary))
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
    figure.suptitle(f"{_title(summary)}: sparsity {100 * summary['sparsity_reached']:.1f} %")
    figure.savefig(path, dpi=150)
