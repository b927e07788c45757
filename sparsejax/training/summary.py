"""The end of a run: `summary.json` and the table that is printed."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsejax import flops
from sparsejax.masks import apply_masks, densities, get_masks
from sparsejax.training.checkpoint import tree_sha256
from sparsejax.training.config import config_hash
from sparsejax.training.mesh import to_host
from sparsejax.training.problem import Problem
from sparsejax.training.workdir import read_json
from sparsejax.transforms import METHODS

FILE = "summary.json"


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    path = workdir / FILE
    return read_json(path) if path.exists() else None


def write_summary(workdir: Path, summary: Mapping) -> None:
    """Writes `summary.json` in one step, so that it exists only when complete."""
    replacement = (workdir / FILE).with_suffix(".tmp")
    replacement.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    replacement.replace(workdir / FILE)


def layer_macs(problem: Problem) -> dict[str, int]:
    """Dense multiply-accumulates per sample of every kernel of the problem's model."""
    return flops.layer_macs(problem.model, problem.variables(), problem.sample)


def training_flops(macs: Mapping, method: Mapping | None, mean_density: Mapping) -> float:
    """Training FLOPs under a method, relative to dense training for as many steps.

    The cost is linear in the layer densities, so their mean over the steps gives the exact total also where
    the masks change, as in gradual pruning.
    """
    name = "fixed" if method is None else method["name"]
    update_every = (method or {}).get("update_every")
    if update_every is None and "update_every" in inspect.signature(METHODS[name]).parameters:
        update_every = inspect.signature(METHODS[name]).parameters["update_every"].default
    extra = {} if update_every is None else {"update_every": update_every}
    dense, sparse = flops.inference_flops(macs), flops.inference_flops(macs, mean_density)
    return flops.training_flops_ratio(name, dense, sparse, **extra)


def summarise(problem: Problem, carry, book) -> dict[str, Any]:
    """The results of a finished run, JSON-able; hashes are over the masked parameters and the masks."""
    macs = layer_macs(problem)
    state = carry.state
    masks = get_masks(state.opt_state)
    host_masks = to_host(masks)
    host_params = to_host(apply_masks(state.params, masks))
    total, nonzeros = flops.parameters(host_params, host_masks)
    cost = sum(record["train_flops_ratio"] * record["steps"] for record in book.history)
    summary = {key: value for key, value in book.last.items() if key.startswith(("test_", "validation_"))}
    if problem.dataset.classes is None:
        summary = {key: value for key, value in summary.items() if not key.endswith("accuracy")}
    summary |= {
        "sparsity": book.last["sparsity"],
        "steps": book.step,
        "seconds": round(book.seconds, 2),
        # For several phases: all of them, against one dense training of config.steps.
        "train_flops_ratio": round(cost / problem.config["steps"], 6),  # densities are float32 sums
        "inference_flops_ratio": flops.inference_flops(macs, densities(host_masks))
        / flops.inference_flops(macs),
        "params": total,
        "nonzeros": nonzeros,
        "params_sha256": tree_sha256(host_params),
        "masks_sha256": tree_sha256(host_masks),
        "config_hash": config_hash(problem.config),
    }
    if "exploration_rate" in book.last:
        summary["exploration_rate"] = book.last["exploration_rate"]
    if len(problem.phases) > 1:
        summary["phases"] = book.history
    return summary


def show(summary: Mapping, workdir: Path) -> None:
    """Prints the summary as a table for people."""
    rows = []
    if "test_accuracy" in summary:
        rows.append(("test accuracy", f"{summary['test_accuracy']:.2%}"))
    rows += [
        ("test loss", f"{summary['test_loss']:.4f}"),
        ("sparsity", f"{summary['sparsity']:.2%}"),
        ("parameters", f"{summary['nonzeros']:,} of {summary['params']:,}"),
        ("training FLOPs", f"{summary['train_flops_ratio']:.3f} x dense"),
        ("inference FLOPs", f"{summary['inference_flops_ratio']:.3f} x dense"),
    ]
    if "exploration_rate" in summary:
        rows.append(("weights explored", f"{summary['exploration_rate']:.1%}"))
    rows += [("steps", f"{summary['steps']:,}"), ("time", f"{summary['seconds']:.1f} s")]
    rows += [("config", summary["config_hash"]), ("workdir", str(workdir))]
    width = max(len(name) for name, _ in rows)
    for record in summary.get("phases", []):
        accuracy = f"  accuracy {record['test_accuracy']:.2%}" if "test_accuracy" in record else ""
        print(f"  {record['name']:{width}}  sparsity {record['sparsity']:.2%}{accuracy}")
    print("\n".join(f"  {name:{width}}  {value}" for name, value in rows), flush=True)
