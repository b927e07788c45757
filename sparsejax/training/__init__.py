"""Training: one function, `run`, from a configuration to a trained sparse network.

The parts, each in its file: `config` (defaults, checks, hash), `problem` (data, model, transform),
`phases` (procedures such as iterative pruning), `step` (the jitted functions), `session` (state from phase to
phase), `loop` (what happens when), `checkpoint`, `metrics`, `mesh`, `summary` and `curves`.
"""

from sparsejax.training.config import config_hash, resolve
from sparsejax.training.loop import run

__all__ = ["config_hash", "resolve", "run"]
