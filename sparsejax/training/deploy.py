"""Deployment of a finished run: its weights packed, checked against the dense ones, and measured.

The folder of the run receives `packed.safetensors` (`sparsejax.formats.load` reads it), `deploy.json` and
`deploy.png`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

import sparsejax
from pallas_kernels.timing import max_error, measure, waiting
from sparsejax import flops, formats
from sparsejax.masks import apply_masks, densities, is_sparsified, map_with_name, sparsity
from sparsejax.patterns import parse
from sparsejax.training.config import resolve
from sparsejax.training.loop import load
from sparsejax.training.pretrained import restore
from sparsejax.training.summary import layer_macs, plain_names, read_summary
from sparsejax.training.workdir import FILE as CONFIG
from sparsejax.training.workdir import read_json

SWEEP = (0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
REPEATS = 30


class Network(NamedTuple):
    """A trained network, dense with zeros and packed; `forward(variables, inputs)` is its jitted model."""

    forward: Any
    dense: dict[str, Any]
    packed: dict[str, Any]
    masks: Any
    report: formats.Report


def deploy(workdir, format: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Packs the network of a finished run and compares it with the dense one.

    Args:
      workdir: the folder of the run.
      format: for all sparsified leaves, see `sparsejax.formats.pack`; None picks one for each.
      progress: show a progress bar on stderr and the findings on stdout.

    Returns:
      What `deploy.json` holds: `max_error` of the packed outputs on the test set, relative to the largest;
      `test_agreement`, the share of samples that both networks put into the same class; bytes, FLOPs per sample and
      milliseconds per batch of both; and `sweep`, the speed-ups of this model at other sparsities.

    Raises:
      ValueError: one sentence, if there is no finished run or it cannot be packed.
      ArithmeticError: if the packed outputs differ from the dense ones.
    """
    workdir = Path(workdir).expanduser().absolute()
    if read_summary(workdir) is None:
        raise ValueError(f"{str(workdir)!r} holds no finished run; train it first, without --mode=deploy")
    config = resolve(read_json(workdir / CONFIG))
    problem = load(config, workdir / "pretrained", None, False)
    network = _pack(restore(problem, workdir), format)
    inputs = jnp.asarray(problem.dataset.test[0])
    batches = sorted({1, min(len(inputs), config["eval_batch_size"])})
    found = _compare(network, inputs, config["eval_batch_size"], problem.dataset.classes)
    found |= _costs(network, layer_macs(problem), inputs[: batches[-1]])
    found["latency_ms"] = {
        str(batch): _latencies(network.forward, network.dense, network.packed, inputs[:batch])
        for batch in batches
    }
    found["sweep"] = _sweep(network, inputs, batches, format, progress)
    formats.save(workdir / "packed.safetensors", network.packed["params"])
    (workdir / "deploy.json").write_text(json.dumps(found, indent=2) + "\n")
    _draw(workdir, found)
    if progress:
        _show(found, network.report, workdir)
    return found


def _pack(network, format: str | None) -> Network:
    if getattr(network.model, "reads_masks", False):
        raise ValueError(
            f"{type(network.model).__name__} with layers that read their masks cannot be packed: its weights are "
            "not what it multiplies with"
        )
    if not any(map(is_sparsified, jax.tree.leaves(network.masks))):
        raise ValueError("the run is dense: there is nothing to pack")
    params = apply_masks(network.variables["params"], network.masks)
    packed, report = sparsejax.pack(params, network.masks, format)
    dense, packed = ({**network.variables, "params": tree} for tree in (params, packed))
    model = network.model
    forward = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    return Network(forward, dense, packed, network.masks, report)


def _compare(network: Network, inputs, size: int, classes: int | None) -> dict[str, float]:
    """How far the outputs of the two are apart, on all inputs."""
    dense, packed = (
        np.concatenate(
            [network.forward(variables, inputs[i : i + size]) for i in range(0, len(inputs), size)]
        )
        for variables in (network.dense, network.packed)
    )
    dtype = str(jax.tree.leaves(network.dense["params"])[0].dtype)
    found = {"sparsity": float(sparsity(network.masks)), "max_error": max_error(packed, dense)}
    if not found["max_error"] <= TOLERANCE.get(dtype, 1e-4):
        raise ArithmeticError(
            f"the outputs of the packed network differ from those of the dense one by {found['max_error']:.1e} of the "
            f"largest, more than rounding in {dtype} explains"
        )
    if classes is not None:
        found["test_agreement"] = float((dense.argmax(-1) == packed.argmax(-1)).mean())
    return found


def _costs(network: Network, macs: Mapping[str, int], inputs) -> dict[str, Any]:
    """Bytes and FLOPs of the two; `peak` is what one batch needs, with weights and activations."""
    kept = plain_names(densities(network.masks))

    def peak(variables):
        used = network.forward.lower(variables, inputs).compile().memory_analysis()
        return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes

    return {
        "flops": {"dense": flops.inference_flops(macs), "packed": flops.inference_flops(macs, kept)},
        "bytes": {"dense": network.report.dense_bytes, "packed": network.report.packed_bytes},
        "peak_bytes": {"dense": peak(network.dense), "packed": peak(network.packed)},
    }


def _latencies(forward, dense, packed, inputs) -> dict[str, float]:
    """Milliseconds per batch, the median of many, measured alternately."""
    variables = {"dense": dense, "packed": packed}
    calls = {name: waiting(lambda tree=tree: forward(tree, inputs)) for name, tree in variables.items()}
    return measure(calls, REPEATS)


def _sweep(network: Network, inputs, batches, format: str | None, progress: bool) -> list[dict[str, Any]]:
    """Speed-ups of the model at other sparsities of the same patterns, with random weights: time alone counts."""
    kinds = {record.path: record.format for record in network.report}
    if format is not None and format[0].isdigit():  # N of another sparsity
        format = "nm"
    found, seen = [], set()
    for level in tqdm(SWEEP, desc="sparsities", unit="point", disable=not progress):
        masks, params = _at(level, network, kinds)
        reached = float(sparsity(masks))
        if reached in seen:
            continue
        seen.add(reached)
        packed = {**network.packed, "params": sparsejax.pack(params, masks, format)[0]}
        dense = {**network.dense, "params": apply_masks(params, masks)}
        for batch in batches:
            times = _latencies(network.forward, dense, packed, inputs[:batch])
            speedup = times["dense"] / times["packed"]
            found.append({"sparsity": reached, "batch": batch, "speedup": speedup})
    return found


def _at(level: float, network: Network, kinds: Mapping[str, str]):
    """`(masks, params)` at a sparsity, each leaf in the pattern of its format."""
    keys = iter(range(len(kinds)))

    def draw(name, leaf, mask):
        key = jax.random.key(next(keys))
        return jax.random.normal(key, leaf.shape, leaf.dtype) if is_sparsified(mask) else leaf

    def select(name, leaf, mask):
        if not is_sparsified(mask):
            return mask
        kind = kinds[name]
        if kind.startswith("block:"):
            return parse(kind).mask(jnp.abs(leaf), level)
        if ":" in kind:
            m = int(kind.split(":")[1])
            return parse(f"{max(1, round(m * (1 - level)))}:{m}").mask(jnp.abs(leaf))
        return parse("unstructured").mask(jnp.abs(leaf), level)

    params = map_with_name(draw, network.dense["params"], network.masks)
    return map_with_name(select, params, network.masks), params


def _show(found: Mapping, report: formats.Report, workdir: Path) -> None:
    """Prints the findings as tables for people."""
    print(report)
    agree = f", {found['test_agreement']:.2%} in the same class" if "test_agreement" in found else ""
    rows = [("", "dense", "packed", "dense / packed")]
    rows += [
        _row("parameters", found["bytes"], lambda size: f"{size / 2**10:,.0f} KiB"),
        _row("peak of a batch", found["peak_bytes"], lambda size: f"{size / 2**10:,.0f} KiB"),
        _row("FLOPs of a sample", found["flops"], lambda count: f"{count / 1e3:,.0f} k"),
    ]
    rows += [
        _row(f"latency, batch of {batch}", times, lambda ms: f"{ms:.3f} ms")
        for batch, times in found["latency_ms"].items()
    ]
    width = max(len(row[0]) for row in rows)
    print(f"  {'sparsity':{width}}  {found['sparsity']:.2%}")
    print(f"  {'outputs':{width}}  equal to {found['max_error']:.1e} of the largest{agree}")
    for name, dense, packed, ratio in rows:
        print(f"  {name:{width}}  {dense:>12}  {packed:>12}  {ratio:>14}")
    print(f"  {'workdir':{width}}  {workdir}", flush=True)


def _row(name: str, pair: Mapping, text) -> tuple[str, str, str, str]:
    return name, text(pair["dense"]), text(pair["packed"]), f"{pair['dense'] / pair['packed']:.2f}x"


def _draw(workdir: Path, found: Mapping) -> None:
    """`deploy.png`: speed-up over sparsity, the run's own as stars; without matplotlib one line says it is skipped."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        logging.warning("deploy.png is skipped: matplotlib is not installed (pip install 'sparsejax[plot]')")
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=1, label="dense")
    for batch, times in found["latency_ms"].items():
        points = [
            (1 - point["sparsity"], point["speedup"])
            for point in found["sweep"]
            if str(point["batch"]) == batch
        ]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"batch of {batch}")
        own = times["dense"] / times["packed"]
        axes.plot(1 - found["sparsity"], own, "*", markersize=14, color=line.get_color(), label="_")
    axes.set(
        xscale="log", yscale="log", xlabel="sparsity", ylabel="times faster than dense", title=workdir.name
    )
    ticks = sorted({1 - point["sparsity"] for point in found["sweep"]}, reverse=True)
    axes.set_xticks(ticks, [f"{100 * (1 - tick):.3g} %" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="stars: this run")
    figure.savefig(workdir / "deploy.png", dpi=130)
