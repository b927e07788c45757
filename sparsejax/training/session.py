"""The compiled functions of a run and the state they carry from phase to phase."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.masks import apply_masks, get_masks, is_sparsified
from sparsejax.parameterizations import Parameterized
from sparsejax.training import phases as phases_lib
from sparsejax.training.mesh import batch_placer, place, state_shardings, to_host
from sparsejax.training.optimizers import build_optimizer
from sparsejax.training.phases import Phase
from sparsejax.training.problem import Problem, build_transform
from sparsejax.training.step import (
    Teacher,
    TrainState,
    copy_tree,
    evaluate,
    make_eval_step,
    make_train_step,
    new_state,
    padded_batches,
)
from sparsejax.transforms import STRAIGHT_THROUGH


class Anchor(NamedTuple):
    """A remembered point of training, to which later phases rewind."""

    params: Any
    collections: Any
    opt_state: Any


class Carry(NamedTuple):
    """The arrays of a checkpoint.

    Attributes:
      state: what the training step reads and writes.
      logged: the masks at the last log, from which churn is counted.
      anchor: the rewind point, or an empty tuple.
    """

    state: TrainState
    logged: Any
    anchor: Anchor | tuple = ()


@dataclasses.dataclass
class Book:
    """The JSON part of a checkpoint: where the run is and what it found so far.

    Attributes:
      phase: index of the current phase.
      phase_step: steps done in it, counted from its schedules' origin.
      step: steps taken in all phases.
      seconds: wall time, over all sessions.
      density_steps: per sparsified leaf, its density summed over the steps of this phase.
      last: the newest entry with an evaluation.
      history: one record per finished phase.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    seconds: float = 0.0
    density_steps: dict[str, float] = dataclasses.field(default_factory=dict)
    last: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Session:
    """Transforms, compiled steps and phase starts of a problem; each is made when first needed."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.put = batch_placer(problem.mesh)
        self._transforms = {}
        self._steps = {}
        self._eval_step = make_eval_step(problem.model, problem.dataset.classes)
        self._eval_batches = {}

    # --- compiled functions --------------------------------------------------------------------------

    def transform(self, phase: Phase):
        """`(transform, learning-rate schedule)` of a phase."""
        key = _key(phase)
        if key not in self._transforms:
            inner, schedule = build_optimizer(
                self.problem.config["optimizer"], phase.steps, phase.learning_rate
            )
            tx = build_transform(self.problem, phase, inner, schedule, self.problem.variables())
            self._transforms[key] = tx, schedule
        return self._transforms[key]

    def train_step(self, phase: Phase, state: TrainState):
        """The jitted `(state, batch) -> state` of a phase; phases that train alike share it."""
        key = _key(phase)
        if key not in self._steps:
            shardings = None if self.problem.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, state)
            problem, (tx, _) = self.problem, self.transform(phase)
            self._steps[key] = make_train_step(
                problem.model,
                tx,
                problem.dataset.classes,
                problem.seed,
                shardings,
                self._teacher(),
                masked=_stays_masked(phase),
            )
        return self._steps[key]

    def _teacher(self) -> Teacher | None:
        objective, pretrained = self.problem.config.get("objective"), self.problem.pretrained
        if not objective or not (objective["distill"] or objective["features"]):
            return None
        variables = pretrained.variables
        if self.problem.mesh is not None:
            replicated = NamedSharding(self.problem.mesh, PartitionSpec())
            variables = place(variables, jax.tree.map(lambda _: replicated, variables))
        return Teacher(
            pretrained.model, variables, objective["distill"], objective["temperature"], objective["features"]
        )

    def evaluate(self, state: TrainState, split: str = "test") -> dict[str, float]:
        """Mean loss, accuracy and calibration on a whole split, whose batches stay on the device."""
        if split not in self._eval_batches:
            x, y = getattr(self.problem.dataset, split)
            parts = padded_batches(x, y, self.problem.config["eval_batch_size"])
            put = jax.device_put if self.problem.mesh is None else self.put
            self._eval_batches[split] = [put(part) for part in parts]
        return evaluate(self._eval_step, state, self._eval_batches[split])

    def masks(self, state: TrainState):
        """The masks to report: the parameterization's own, else those that the transform holds."""
        if isinstance(self.problem.model, Parameterized):
            own = self.problem.model.masks({**state.collections, "params": state.params})
            if own is not None:
                return own
        return get_masks(state.opt_state)

    def plain(self, state: TrainState):
        """`(variables, masks)` of the linen module itself, with the weights that evaluation uses."""
        masks = self.masks(state)
        params = apply_masks(state.params, get_masks(state.opt_state))
        variables = {**state.collections, "params": params}
        if not isinstance(self.problem.model, Parameterized):
            return variables, masks
        own = self.problem.model.masks(variables)
        return self.problem.model.revert(variables), masks["params"] if own is None else masks

    def place_like(self, tree, like):
        """Puts a tree where the arrays of `like` are."""
        if self.problem.mesh is None:
            return tree
        return place(tree, jax.tree.map(lambda leaf: leaf.sharding, like))

    # --- starts of phases ----------------------------------------------------------------------------

    def initial(self, index: int) -> Carry:
        """Fresh weights and optimizer for phase `index`; also the template of its checkpoints."""
        phase = self.problem.phases[index]
        params, collections = split(self.problem.variables())
        tx, _ = self.transform(phase)
        opt_state = tx.init(params)
        if _stays_masked(phase):
            params = apply_masks(params, get_masks(opt_state))
        return self._carry(params, collections, opt_state)

    def template(self, book: dict) -> Carry:
        """A carry with the structure and layout of the checkpoint that `book` describes."""
        carry = self.initial(book["phase"])
        first = self.problem.phases[0]
        if first.anchor is None or (book["phase"] == 0 and book["phase_step"] < first.anchor):
            return carry
        return self.remember(carry if book["phase"] == 0 else self.initial(0))._replace(
            state=carry.state, logged=carry.logged
        )

    def start(self, index: int, carry: Carry | None) -> Carry:
        """The carry at the start of phase `index`, given the one at the end of the phase before."""
        phase = self.problem.phases[index]
        if carry is None:
            carry = self.initial(index)
            return self.remember(carry) if phase.anchor == 0 else carry
        masks = self._next_masks(phase, carry)
        params, collections = self._next_variables(phase, index, carry)
        tx, _ = self.transform(phase)
        if masks is not None:
            params = apply_masks(params, masks)
        opt_state = tx.init(params)
        if phase.weights == "rewind" or phase.start:
            past = to_device(carry.anchor.opt_state)
            opt_state = opt_state._replace(count=past.count, inner_state=past.inner_state)
        if masks is not None:
            opt_state = opt_state._replace(masks=masks)
        elif _stays_masked(phase):
            params = apply_masks(params, get_masks(opt_state))
        return self._carry(params, collections, opt_state, phase.start)._replace(anchor=carry.anchor)

    def remember(self, carry: Carry) -> Carry:
        """The carry with its present state as the rewind point."""
        state = carry.state
        anchor = Anchor(state.params, state.collections, state.opt_state)
        return carry._replace(anchor=copy_tree(anchor))

    def _next_masks(self, phase: Phase, carry: Carry):
        if phase.method is not None:
            return None
        masks = to_device(get_masks(carry.state.opt_state))
        if not any(map(is_sparsified, jax.tree.leaves(masks))):
            masks = phases_lib.full_masks(carry.state.params, phase.include, phase.exclude)
        if phase.prune:
            masks = phases_lib.prune_remaining(to_device(carry.state.params), masks, phase)
        if phase.shuffle:
            masks = phases_lib.shuffle_masks(masks, jax.random.key(self.problem.seed))
        return masks

    def _next_variables(self, phase: Phase, index: int, carry: Carry):
        if phase.weights == "reinit":
            return split(self.problem.variables(draw=index))
        source = carry.anchor if phase.weights == "rewind" else carry.state
        return to_device(source.params), to_device(source.collections)

    def _carry(self, params, collections, opt_state, step: int = 0) -> Carry:
        state = new_state(params, collections, opt_state, step)
        if self.problem.mesh is not None:
            state = place(state, state_shardings(self.problem.mesh, state, params))
        else:
            state = copy_tree(state)  # the step donates it, and nothing else may share its buffers
        return Carry(state, copy_tree(self.masks(state)))


def _stays_masked(phase: Phase) -> bool:
    """Whether every update leaves the parameters zero outside the masks."""
    return phase.method is None or phase.method["name"] not in STRAIGHT_THROUGH


def _key(phase: Phase):
    return repr((phase.method, phase.steps, phase.learning_rate, phase.include, phase.exclude))


def split(variables) -> tuple[Any, dict[str, Any]]:
    """The parameters and the other collections of a model's variables."""
    return variables["params"], {name: value for name, value in variables.items() if name != "params"}


def to_device(tree):
    """The whole tree on this process's first device: phases change masks there, whatever the mesh."""
    return jax.tree.map(jnp.asarray, to_host(tree))
