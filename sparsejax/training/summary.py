"""The end of a run: `summary.json` and the table that is printed."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparsejax import flops
from sparsejax.masks import apply_masks, densities, find_field, get_masks
from sparsejax.training.checkpoint import tree_sha256
from sparsejax.training.config import config_hash
from sparsejax.training.mesh import to_host
from sparsejax.training.problem import Problem
from sparsejax.training.session import Session
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
    return flops.layer_macs(problem.network, problem.shapes, problem.sample)


def training_flops(
    macs: Mapping, method: Mapping | None, mean_density: Mapping, backward_density: Mapping | None = None
) -> float:
    """Training FLOPs under a method, relative to dense training for as many steps.

    The cost is linear in the layer densities, so their mean over the steps gives the exact total also where
    the masks change, as in gradual pruning. `backward_density` is that of the method's backward masks.
    """
    name = "fixed" if method is None else method["name"]
    update_every = (method or {}).get("update_every")
    if update_every is None and "update_every" in inspect.signature(METHODS[name]).parameters:
        update_every = inspect.signature(METHODS[name]).parameters["update_every"].default
    extra = {} if update_every is None else {"update_every": update_every}
    if backward_density is not None:
        extra["backward"] = flops.inference_flops(macs, plain_names(backward_density))
    dense, sparse = flops.inference_flops(macs), flops.inference_flops(macs, plain_names(mean_density))
    return flops.training_flops_ratio(name, dense, sparse, **extra)


def plain_names(densities: Mapping) -> dict[str, float]:
    """Densities by the path of the model's own parameter, which latent parameters keep under `params`."""
    return {name.removeprefix("params/"): value for name, value in densities.items()}


def summarise(session: Session, carry, book) -> dict[str, Any]:
    """The results of a finished run, JSON-able; hashes are over the masked parameters and the masks.

    Parameters are the trained ones; those of a parameterization with masks of its own are its weights.
    """
    problem, state = session.problem, carry.state
    macs = layer_macs(problem)
    host_masks = to_host(session.masks(state))
    params = apply_masks(state.params, get_masks(state.opt_state))
    if jax.tree.structure(params) != jax.tree.structure(host_masks):
        params = session.plain(state)[0]["params"]
    host_params = to_host(params)
    total, nonzeros = flops.parameters(host_params, host_masks)
    cost = sum(record["train_flops_ratio"] * record["steps"] for record in book.history)
    summary = {key: value for key, value in book.last.items() if key.startswith(("test_", "validation_"))}
    summary |= {
        "sparsity": book.last["sparsity"],
        "steps": book.step,
        "seconds": round(book.seconds, 2),
        # For several phases: all of them, against one dense training of config.steps.
        "train_flops_ratio": round(cost / problem.config["steps"], 6),  # densities are float32 sums
        "inference_flops_ratio": flops.inference_flops(macs, plain_names(densities(host_masks)))
        / flops.inference_flops(macs),
        "params": total,
        "nonzeros": nonzeros,
        "params_sha256": tree_sha256(host_params),
        "masks_sha256": tree_sha256(host_masks),
        "config_hash": config_hash(problem.config),
    }
    others = ("exploration_rate", *(find_field(state.opt_state, "metrics") or {}))
    summary |= {key: book.last[key] for key in others if key in book.last}
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
