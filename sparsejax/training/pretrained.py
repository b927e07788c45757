"""Runs that start from another run's weights: `config.pretrained`."""

import contextlib
import fcntl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sparsejax.masks import flatten
from sparsejax.training.checkpoint import Checkpoints
from sparsejax.training.config import config_hash
from sparsejax.training.problem import Problem, load_problem
from sparsejax.training.session import Session, to_device


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
      model: the linen module.
      variables: its `params`, masked, and its other collections.
      masks: the masks it was trained with, of the same structure as the parameters.
    """

    model: Any
    variables: dict[str, Any]
    masks: Any


def obtain(config: Mapping, runs: Path, mesh: Mesh | None, train: Callable) -> Pretrained:
    """The network that a resolved configuration describes: trained now, unless it is there already.

    Args:
      config: the resolved configuration of the pretraining run.
      runs: its folder is `runs/HASH`, where other runs may find it.
      mesh: the devices.
      train: `train(config, workdir)`; it resumes an interrupted run and returns at once from a finished one.
    """
    folder = runs / config_hash(config)
    with _alone(runs, folder.name):
        train(config, folder)
    nested = None
    if "pretrained" in config:
        nested = obtain(config["pretrained"], runs, mesh, train)
    return restore(load_problem(config, mesh, nested), folder)


def restore(problem: Problem, folder: Path) -> Pretrained:
    """The network that a run left in its folder.

    Raises:
      ValueError: if the folder has no checkpoint.
    """
    session = Session(problem)
    checkpoints = Checkpoints(folder / "checkpoints", problem.config["keep_checkpoints"])
    try:
        found = checkpoints.restore(session.template)
    finally:
        checkpoints.close()
    if found is None:
        raise ValueError(f"the run in {str(folder)!r} has no checkpoint; remove that folder and train again")
    variables, masks = session.plain(found[0].state)
    return Pretrained(problem.network, to_device(variables), to_device(masks))


def check_fits(pretrained: Mapping, params: Mapping) -> None:
    """Raises ValueError, naming the first leaf, unless pretrained parameters fit the model."""
    found, needed = flatten(pretrained), flatten(params)
    for name in (*needed, *found):
        shapes = [tuple(tree[name].shape) if name in tree else "missing" for tree in (found, needed)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the pretrained weights do not fit the model: {name} is {shapes[0]} there and {shapes[1]} here"
            )


@contextlib.contextmanager
def _alone(folder: Path, name: str):
    """Lets one process at a time pretrain; the others wait, and then find the result."""
    if jax.process_count() > 1:  # the processes of one job train together
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
