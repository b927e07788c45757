"""Checkpoints through Orbax, with a digest so that damaged files are noticed and skipped.

A truncated array file is read back as zeros by some storage drivers, without an error. Every checkpoint
therefore carries a SHA-256 over its leaves, which is compared on restore.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from sparsejax.masks import flatten
from sparsejax.training.mesh import to_host


def tree_sha256(tree) -> str:
    """SHA-256 over (path, dtype, shape, bytes) of every leaf of a host tree, in tree order."""
    digest = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        leaf = np.asarray(leaf)
        digest.update(f"{name}|{leaf.dtype}|{leaf.shape}|".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest(tree) -> str | None:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if not all(leaf.is_fully_addressable for leaf in leaves):
        return None  # no process sees all the bytes; Orbax's own checks have to do
    return tree_sha256(to_host(tree))


class Checkpoints:
    """The checkpoints of a run: a tree of arrays and a `book` of JSON values per step.

    Args:
      folder: where they are kept.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, tree, book: dict) -> None:
        """Starts saving; the arrays are copied first, so training may go on and donate them."""
        book = {"book": book, "sha256": _digest(tree)}
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), book=ocp.args.JsonSave(book))
        self._manager.save(step, args=arguments)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, template: Callable):
        """`(tree, book)` of the newest sound checkpoint, or None; damaged ones are reported and moved aside.

        Args:
          template: maps a book to a tree of arrays with the structure and the layout to restore.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arguments = ocp.args.Composite(book=ocp.args.JsonRestore())
                saved = self._manager.restore(step, args=arguments).book
                book = saved["book"]
            except Exception as error:  # storage drivers raise many kinds; all mean: not this one
                self._set_aside(step, error)
                continue
            wanted = template(book)  # an error of ours is no damage, and must not cost the checkpoint
            try:
                return self._read(step, saved, wanted), book
            except Exception as error:
                self._set_aside(step, error)
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        logging.warning("checkpoint %d is damaged and is skipped (%s)", step, reason)
        if jax.process_index() == 0:
            folder = self._manager.directory / str(step)
            folder.rename(folder.with_name(f"damaged-{step}-{time.time_ns()}"))
        multihost_utils.sync_global_devices("damaged checkpoint set aside")
        self._manager.reload()

    def _read(self, step: int, saved: dict, wanted):
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted
        )
        arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        tree = self._manager.restore(step, args=arguments).tree
        if saved["sha256"] is not None and saved["sha256"] != _digest(tree):
            raise ValueError("its arrays do not match their SHA-256")
        return tree

    def close(self) -> None:
        """Waits for the save in progress."""
        self._manager.wait_until_finished()
        self._manager.close()
