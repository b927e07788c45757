"""Phases: an experiment as a list of stretches, each with its own start.

A plain run is one phase. Iterative magnitude pruning (Frankle & Carbin 2019; with rewinding: Frankle et al.
2020) is `rounds + 1` of them: train, prune a fraction of the remaining weights, set the others back, repeat.
A new procedure is a function that returns a list of `Phase`s and one line in `PROCEDURES`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.allocation import last_leaves
from sparsejax.masks import INCLUDE, choose, flatten, is_sparsified, map_with_name, sparsifiable
from sparsejax.selection import global_top_k_masks, top_k_mask
from sparsejax.training.optimizers import keywords

WEIGHTS = ("keep", "rewind", "reinit")
SCOPES = ("global", "layer")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of an experiment: a method, a length, and what happens at its start, in this order.

    Attributes:
      name: shown in the metrics and the summary.
      method: `config.method` for this phase; None trains with the masks that the phase before left, full ones
        after a dense phase.
      steps: the length of the schedules; the phase ends at this step.
      start: the step it starts at (the rewind step: data order and schedules continue from there).
      prune: fraction of the remaining weights removed by magnitude.
      scope: whether that fraction is taken over the whole network ("global") or in every layer ("layer").
      halve_last: with scope "layer", prune the output layer at half the rate, as for LeNet in the paper.
      shuffle: move the masks to random positions inside each layer (the control of equal densities).
      weights: "keep" the trained ones, "rewind" to the anchor, or "reinit" with a new seed.
      learning_rate: a constant rate for this phase; None follows `config.optimizer`.
      anchor: the step at whose end weights and optimizer are remembered as the rewind point, or None.
      include, exclude: which leaves the carried masks sparsify (path patterns).
    """

    name: str
    method: Mapping | None
    steps: int
    start: int = 0
    prune: float = 0.0
    scope: str = "global"
    halve_last: bool = False
    shuffle: bool = False
    weights: str = "keep"
    learning_rate: float | None = None
    anchor: int | None = None
    include: tuple[str, ...] = INCLUDE
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        choose("treatment of the weights", self.weights, WEIGHTS)
        choose("scope", self.scope, SCOPES)
        if not 0 <= self.prune < 1:
            raise ValueError(f"the pruned fraction of a phase must lie in [0, 1), got {self.prune}")
        if not 0 <= self.start < self.steps:
            raise ValueError(
                f"the rewind step {self.start} must lie in [0, {self.steps}), the steps of a phase"
            )

    @property
    def length(self) -> int:
        """Optimizer steps this phase takes."""
        return self.steps - self.start


# --- procedures --------------------------------------------------------------------------------------


def single(config: Mapping) -> list[Phase]:
    """One phase with `config.method`."""
    return [Phase("train", config["method"], config["steps"])]


CONTROLS = ("ticket", "reinit", "random", "finetune", "learning_rate_rewinding")


def imp(
    config: Mapping,
    *,
    rounds: int,
    prune_fraction: float = 0.2,
    rewind_step: int = 0,
    scope: str = "global",
    halve_last: bool = False,
    control: str = "ticket",
    final_steps: int | None = None,
    finetune_factor: float = 0.01,
    include=INCLUDE,
    exclude=(),
) -> list[Phase]:
    """Iterative magnitude pruning with rewinding [F11].

    Round 0 trains dense; each of the `rounds` that follow first removes `prune_fraction` of the remaining
    weights, so that the density after round r is (1 - prune_fraction)^r. Controls:
      ticket: set the survivors back to their values at `rewind_step`, with optimizer, schedules, norm
        statistics and data order (rewind_step 0 is the original lottery ticket).
      reinit, random: find the masks as `ticket` does; in the last round draw new weights, or shuffle the
        masks inside each layer.
      finetune: keep the trained weights and train on at `finetune_factor` times the peak learning rate.
      learning_rate_rewinding: keep the trained weights and norm statistics, rewind optimizer, schedules and
        data order (Renda et al. 2020).

    Args:
      config: the resolved configuration; `steps` is the length of a round.
      final_steps: length of the last round, `steps` if None.
    """
    choose("control of imp", control, CONTROLS)
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"config.procedure.rounds must be a positive integer, got {rounds!r}")
    if config["method"]["name"] != "dense":
        name = config["method"]["name"]
        raise ValueError(
            f"procedure 'imp' finds its own masks: set config.method.name to 'dense', not {name!r}"
        )
    rules = {"include": tuple(include), "exclude": tuple(exclude)}
    phases = [Phase("round 0", config["method"], config["steps"], anchor=rewind_step)]
    keep = control in ("finetune", "learning_rate_rewinding")
    rate = finetune_factor * config["optimizer"]["learning_rate"] if control == "finetune" else None
    for index in range(1, rounds + 1):
        last = index == rounds
        reinit = last and control == "reinit"
        phases.append(
            Phase(
                name=f"round {index}",
                method=None,
                steps=final_steps if last and final_steps else config["steps"],
                start=0 if reinit or control == "finetune" else rewind_step,
                prune=prune_fraction,
                scope=scope,
                halve_last=halve_last,
                shuffle=last and control == "random",
                weights="keep" if keep else "reinit" if reinit else "rewind",
                learning_rate=rate,
                **rules,
            )
        )
    return phases


PROCEDURES = {"single": single, "imp": imp}


def expand(config: Mapping) -> list[Phase]:
    """The phases of a resolved configuration.

    Raises:
      ValueError: for an unknown procedure, keyword or control, or a missing keyword.
    """
    arguments = dict(config["procedure"])
    name = arguments.pop("name")
    procedure = choose("procedure", name, PROCEDURES)
    known = [key for key in keywords(procedure) if key != "config"]
    for key in arguments:
        choose(f"keyword of procedure {name!r}", key, known)
    if name == "imp" and "rounds" not in arguments:
        raise ValueError("procedure 'imp' needs config.procedure.rounds, the number of pruning rounds")
    return procedure(config, **arguments)


# --- masks at the border of two phases ---------------------------------------------------------------


def full_masks(params, include=INCLUDE, exclude=()) -> Any:
    """Masks that keep every weight of the leaves that `include` and `exclude` select."""
    chosen = sparsifiable(params, include, exclude)
    return map_with_name(
        lambda name, leaf: jnp.ones(leaf.shape, bool) if name in chosen else jnp.asarray(True), params
    )


def prune_remaining(params, masks, phase: Phase) -> Any:
    """Removes `phase.prune` of the weights that `masks` keep, the smallest magnitudes first.

    The new masks are nested in the old ones, and the count that stays is `round((1 - prune) * kept)`, over
    the network or per layer.
    """
    sparse = {name: leaf for name, leaf in flatten(masks).items() if is_sparsified(leaf)}
    weights = flatten(params)
    scores = {name: jnp.abs(weights[name]) for name in sparse}
    kept = {name: int(np.count_nonzero(leaf)) for name, leaf in sparse.items()}
    if phase.scope == "global":
        count = round((1.0 - phase.prune) * sum(kept.values()))
        new = global_top_k_masks(scores, count, candidates=sparse)
    else:
        rates = dict.fromkeys(sparse, phase.prune)
        if phase.halve_last:
            for name in last_leaves(sparse):
                rates[name] /= 2
        new = {
            name: top_k_mask(scores[name], round((1.0 - rates[name]) * kept[name]), candidates=mask)
            for name, mask in sparse.items()
        }
    return map_with_name(lambda name, mask: new.get(name, mask), masks)


def shuffle_masks(masks, key) -> Any:
    """Random masks with the same number of kept weights in every leaf."""

    def shuffle(name, mask):
        if not is_sparsified(mask):
            return mask
        index = list(flatten(masks)).index(name)
        return jax.random.permutation(jax.random.fold_in(key, index), jnp.ravel(mask)).reshape(mask.shape)

    return map_with_name(shuffle, masks)
