"""The training step, evaluation, and the measurement of masks: every jitted function of a run."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks import apply_masks, count, flatten, get_masks, is_sparsified


class TrainState(NamedTuple):
    """All that a step reads and writes; one pytree, donated from step to step.

    Attributes:
      step: int32 scalar, steps done in this phase (and the position in its data order).
      params, batch_stats: the collections of the model; `batch_stats` is empty without batch norm.
      opt_state: the state of the sparsejax transform, which holds the masks.
      meters: float32 sums since the last log: `loss` and `correct` (per step means), `density` (per
        sparsified leaf, absent without any: Orbax cannot save empty arrays), `count` (steps).
      bad_step: int32 scalar, the first step whose loss was not finite, or -1.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    meters: dict[str, Any]
    bad_step: Any


def zero_meters(masks) -> dict[str, jax.Array]:
    """Fresh sums for `TrainState.meters`."""
    leaves = sum(is_sparsified(mask) for mask in jax.tree.leaves(masks))
    shapes = {"loss": (), "correct": (), "count": ()} | ({"density": (leaves,)} if leaves else {})
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def new_state(params, batch_stats, opt_state, step: int = 0) -> TrainState:
    """The state at the start of a phase."""
    count, bad = jnp.asarray(step, jnp.int32), jnp.asarray(-1, jnp.int32)
    return TrainState(count, params, batch_stats, opt_state, zero_meters(get_masks(opt_state)), bad)


def objective(outputs, targets, classes: int | None):
    """Per-sample loss and correctness, both float32 of shape (batch,).

    Softmax cross-entropy for `classes`; for regression (`classes` None) the mean squared error over the
    targets, and correctness is zero.
    """
    outputs = outputs.astype(jnp.float32)
    if classes is None:
        loss = jnp.mean(jnp.square(outputs - targets), axis=-1)
        return loss, jnp.zeros_like(loss)
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return loss, (jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32)


def _densities(masks):
    leaves = [mask for mask in jax.tree.leaves(masks) if is_sparsified(mask)]
    return jnp.stack([count(mask != 0) / mask.size for mask in leaves])


def make_train_step(model, tx, classes: int | None, seed: int, shardings=None) -> Callable:
    """The jitted `(state, batch) -> state`; the gradient is taken with respect to the masked weights.

    Args:
      model: a linen module whose `__call__` takes `train`.
      tx: the sparsejax transform around the optimizer.
      classes: number of classes, or None for regression.
      seed: of the dropout noise, a pure function of (seed, step).
      shardings: layout of the state on a mesh, or None.
    """

    def step(state: TrainState, batch) -> TrainState:
        masks = get_masks(state.opt_state)
        noise = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params):
            variables = {"params": apply_masks(params, masks), "batch_stats": state.batch_stats}
            outputs, updated = model.apply(
                variables, batch["x"], train=True, mutable=["batch_stats"], rngs={"dropout": noise}
            )
            loss, correct = objective(outputs, batch["y"], classes)
            return jnp.mean(loss), (jnp.mean(correct), updated.get("batch_stats", state.batch_stats))

        (loss, (correct, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # The step computed with the masks of its start, so that is the density it is charged for.
        seen = {"loss": loss, "correct": correct, "count": 1.0}
        if "density" in state.meters:
            seen["density"] = _densities(masks)
        first_bad = (state.bad_step < 0) & ~jnp.isfinite(loss)
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            meters=jax.tree.map(jnp.add, state.meters, seen),
            bad_step=jnp.where(first_bad, state.step + 1, state.bad_step),
        )

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


# --- evaluation --------------------------------------------------------------------------------------


def padded_batches(x, y, size: int) -> Iterable[dict[str, np.ndarray]]:
    """The whole set in order as {"x", "y", "weight"}; the last batch is padded with weight zero."""
    for start in range(0, len(x), size):
        part = {"x": x[start : start + size], "y": y[start : start + size]}
        part["weight"] = np.ones(len(part["x"]), np.float32)
        missing = size - len(part["x"])
        yield {
            name: np.concatenate([leaf, np.zeros((missing, *leaf.shape[1:]), leaf.dtype)])
            for name, leaf in part.items()
        }


def make_eval_step(model, classes: int | None) -> Callable:
    """The jitted `(params, batch_stats, masks, batch) -> float32[3]`: sums of loss, correct and weight."""

    @jax.jit
    def step(params, batch_stats, masks, batch):
        variables = {"params": apply_masks(params, masks), "batch_stats": batch_stats}
        outputs = model.apply(variables, batch["x"], train=False)
        loss, correct = objective(outputs, batch["y"], classes)
        weight = batch["weight"]
        # `where`, not a product: padding must not turn an overflow into 0 * inf = nan.
        return jnp.stack([jnp.sum(jnp.where(weight > 0, part, 0.0)) for part in (loss, correct, weight)])

    return step


def evaluate(eval_step, state: TrainState, batches: Iterable[Mapping]) -> tuple[float, float]:
    """Mean loss and accuracy over all samples of device `batches` (in order, so deterministic)."""
    masks = get_masks(state.opt_state)
    sums = [eval_step(state.params, state.batch_stats, masks, batch) for batch in batches]
    loss, correct, weight = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    return float(loss / weight), float(correct / weight)


# --- masks -------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="tracked")
def _count(masks, logged, fired, tracked: bool):
    pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(logged), strict=True)
    pairs = [(new, old) for new, old in pairs if is_sparsified(new)]
    seen = [count(leaf != 0) for leaf in jax.tree.leaves(fired) if is_sparsified(leaf)] if tracked else []
    kept = [count(new != 0) for new, _ in pairs]
    grown = [count((new != 0) & (old == 0)) for new, old in pairs]
    return kept, grown, seen


def measure_masks(masks, logged, fired=None) -> dict[str, Any]:
    """Sparsity, churn since `logged`, per-layer density, and the exploration rate if `fired` is given.

    One compiled call for the whole tree; the measures are those of `sparsejax.masks`.
    """
    sizes = {name: leaf.size for name, leaf in flatten(masks).items() if is_sparsified(leaf)}
    counts = jax.device_get(_count(masks, logged, fired, fired is not None))
    kept, grown, seen = ([int(value) for value in group] for group in counts)
    total = sum(sizes.values())
    found = {
        "sparsity": 1.0 - sum(kept) / total if total else 0.0,
        "churn": sum(grown) / sum(kept) if sum(kept) else 0.0,
        "density": {name: n / size for (name, size), n in zip(sizes.items(), kept, strict=True)},
    }
    if fired is not None and total:
        found["exploration_rate"] = sum(seen) / total
    return found


@jax.jit
def all_finite(tree):
    """Whether every entry of a tree of float arrays is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


copy_tree = jax.jit(partial(jax.tree.map, jnp.copy))
