"""The training step, evaluation, and the measurement of masks: every jitted function of a run."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks import apply_masks, count, find_field, flatten, get_masks, is_sparsified

ECE_BINS = 15


class TrainState(NamedTuple):
    """All that a step reads and writes; one pytree, donated from step to step.

    Attributes:
      step: int32 scalar, steps done in this phase (and the position in its data order).
      params: the trained collection of the model.
      collections: its other ones by name (`batch_stats`, the fixed supports of a layer ...), often none.
      opt_state: the state of the sparsejax transform, which holds the masks.
      meters: float32 sums since the last log: `loss` and `correct` (per step means), `density` (per
        sparsified leaf, absent without any: Orbax cannot save empty arrays), `count` (steps).
      bad_step: int32 scalar, the first step whose loss was not finite, or -1.
    """

    step: Any
    params: Any
    collections: dict[str, Any]
    opt_state: Any
    meters: dict[str, Any]
    bad_step: Any


def zero_meters(masks) -> dict[str, jax.Array]:
    """Fresh sums for `TrainState.meters`."""
    leaves = sum(is_sparsified(mask) for mask in jax.tree.leaves(masks))
    shapes = {"loss": (), "correct": (), "count": ()} | ({"density": (leaves,)} if leaves else {})
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def new_state(params, collections, opt_state, step: int = 0) -> TrainState:
    """The state at the start of a phase."""
    count, bad = jnp.asarray(step, jnp.int32), jnp.asarray(-1, jnp.int32)
    return TrainState(count, params, collections, opt_state, zero_meters(get_masks(opt_state)), bad)


class Teacher(NamedTuple):
    """A frozen network whose outputs are learned besides the labels (Hinton et al. 2015).

    The loss is (1 - weight) CE + weight T^2 KL(teacher || student), with both softmaxes at temperature T, plus
    `features` times the mean squared distance between what both models sow into `features`, averaged over the
    sown arrays (Romero et al. 2015).

    Attributes:
      model, variables: what `model.apply(variables, x, train=False)` needs.
      weight: share of the distillation in the loss, in [0, 1].
      temperature: T.
      features: weight of the distance between features, at least 0.
    """

    model: Any
    variables: Any
    weight: float
    temperature: float
    features: float = 0.0


def objective(outputs, targets, classes: int | None):
    """Per-sample loss and correctness, both float32 of shape (batch,).

    Softmax cross-entropy for `classes`, averaged over the positions of a sequence; for regression (`classes`
    None) the mean squared error over the targets, and correctness is zero.
    """
    outputs = outputs.astype(jnp.float32)
    if classes is None:
        loss = jnp.mean(jnp.square(outputs - targets), axis=-1)
        return loss, jnp.zeros_like(loss)
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return _per_sample(loss), _per_sample((jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32))


def _per_sample(values):
    return values if values.ndim == 1 else jnp.mean(values.reshape(len(values), -1), axis=1)


def divergence(teacher_outputs, outputs, temperature: float):
    """Per-sample T^2 KL(teacher || student) between softmaxes at temperature T, float32 of shape (batch,)."""
    teacher, student = (
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (teacher_outputs, outputs)
    )
    return temperature**2 * _per_sample(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))


def distance(teacher_features, features):
    """Mean over the sown arrays of their mean squared difference.

    Raises:
      ValueError: if nothing was sown.
    """
    pairs = zip(jax.tree.leaves(teacher_features), jax.tree.leaves(features), strict=True)
    found = [jnp.mean(jnp.square((a - b).astype(jnp.float32))) for a, b in pairs]
    if not found:
        raise ValueError("config.objective.features needs a model that sows `features`, such as vit")
    return sum(found) / len(found)


def model_variables(model, params, collections, opt_state, masked: bool = False) -> dict[str, Any]:
    """What `model.apply` gets: masked parameters, unless the model reads the masks itself.

    It does if it has the attribute `reads_masks` (its layers need to know what is masked, as variational
    ones), or if the method has other masks for the backward pass. Parameters that are `masked` already are
    passed as they are: masking a large model again costs about a tenth of a step.
    """
    masks, backward = get_masks(opt_state), find_field(opt_state, "backward_masks")
    if backward is not None:
        return {**collections, "params": params, "masks": masks, "backward_masks": backward}
    if getattr(model, "reads_masks", False):
        return {**collections, "params": params, "masks": masks}
    if masked:
        return {**collections, "params": params}
    return {**collections, "params": apply_masks(params, masks)}


def _densities(masks):
    leaves = [mask for mask in jax.tree.leaves(masks) if is_sparsified(mask)]
    return jnp.stack([count(mask != 0) / mask.size for mask in leaves])


def make_train_step(
    model,
    tx,
    classes: int | None,
    seed: int,
    shardings=None,
    teacher: Teacher | None = None,
    masked: bool = False,
) -> Callable:
    """The jitted `(state, batch) -> state`; the gradient is taken with respect to the masked weights.

    Args:
      model: a linen module whose `__call__` takes `train`; what it sows into `losses` is added to the loss.
      tx: the sparsejax transform around the optimizer; it also receives the batch's `loss`.
      classes: number of classes, or None for regression.
      seed: of dropout and of sampled weights, a pure function of (seed, step).
      shardings: layout of the state on a mesh, or None.
      teacher: a network to distil from, or None.
      masked: whether the parameters are zero outside the masks at every step, so that they need no masking.
    """

    def step(state: TrainState, batch, teacher_variables) -> TrainState:
        noise = jax.random.fold_in(jax.random.key(seed), state.step)
        streams = {"dropout": noise, "sample": jax.random.fold_in(noise, 1)}
        mutable = [*state.collections, "losses", "features"]
        if teacher is not None:
            target, sown = teacher.model.apply(
                teacher_variables, batch["x"], train=False, mutable=["features"]
            )

        def loss_of(params):
            variables = model_variables(model, params, state.collections, state.opt_state, masked)
            outputs, updated = model.apply(variables, batch["x"], train=True, mutable=mutable, rngs=streams)
            losses, correct = objective(outputs, batch["y"], classes)
            loss, features = jnp.mean(losses), updated.pop("features", {})
            if teacher is not None:
                distilled = jnp.mean(divergence(target, outputs, teacher.temperature))
                loss = (1 - teacher.weight) * loss + teacher.weight * distilled
                if teacher.features:
                    loss += teacher.features * distance(sown.get("features", {}), features)
            loss = sum(jax.tree.leaves(updated.pop("losses", {})), loss)
            return loss, (jnp.mean(correct), {**state.collections, **updated})

        (loss, (correct, collections)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss)
        # The step computed with the masks of its start, so that is the density it is charged for.
        seen = {"loss": loss, "correct": correct, "count": 1.0}
        if "density" in state.meters:
            seen["density"] = _densities(get_masks(state.opt_state))
        first_bad = (state.bad_step < 0) & ~jnp.isfinite(loss)
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            collections=collections,
            opt_state=opt_state,
            meters=jax.tree.map(jnp.add, state.meters, seen),
            bad_step=jnp.where(first_bad, state.step + 1, state.bad_step),
        )

    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    given = None if teacher is None else teacher.variables
    return lambda state, batch: compiled(state, batch, given)


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
    """The jitted `(params, collections, opt_state, batch) -> sums` over the samples of a batch.

    The sums are `loss`, `correct` and `weight`, and for classification `bins` of shape (3, 15): predictions,
    their confidence and their correctness by confidence.
    """

    @jax.jit
    def step(params, collections, opt_state, batch):
        variables = model_variables(model, params, collections, opt_state)
        outputs = model.apply(variables, batch["x"], train=False)
        loss, correct = objective(outputs, batch["y"], classes)
        weight = batch["weight"]
        # `where`, not a product: padding must not turn an overflow into 0 * inf = nan.
        sums = {"loss": jnp.where(weight > 0, loss, 0.0), "correct": jnp.where(weight > 0, correct, 0.0)}
        sums = {name: jnp.sum(part) for name, part in sums.items()} | {"weight": jnp.sum(weight)}
        return sums if classes is None else sums | {"bins": _calibration(outputs, batch["y"], weight)}

    return step


def _calibration(outputs, targets, weight):
    probabilities = jax.nn.softmax(outputs.astype(jnp.float32))
    confidence = jnp.max(probabilities, axis=-1)
    right = jnp.argmax(probabilities, axis=-1) == targets
    weight = jnp.broadcast_to(weight.reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)
    bins = jnp.minimum((confidence * ECE_BINS).astype(jnp.int32), ECE_BINS - 1)
    parts = jnp.stack([weight, weight * jnp.where(weight > 0, confidence, 0.0), weight * right])
    return jnp.zeros((3, ECE_BINS)).at[:, bins.reshape(-1)].add(parts.reshape(3, -1))


def evaluate(eval_step, state: TrainState, batches: Iterable[Mapping]) -> dict[str, float]:
    """Mean loss, accuracy and calibration over all samples of device `batches` (in order: deterministic).

    Returns:
      `loss`; for classification also `accuracy` and `ece`, the expected calibration error (Guo et al. 2017):
      the mean over predictions of |accuracy - confidence| in 15 bins of equal width.
    """
    sums = jax.device_get(
        [eval_step(state.params, state.collections, state.opt_state, batch) for batch in batches]
    )
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *sums)
    found = {"loss": float(total["loss"] / total["weight"])}
    if "bins" in total:
        count, confidence, correct = total["bins"]
        found["accuracy"] = float(total["correct"] / total["weight"])
        found["ece"] = float(np.sum(np.abs(correct - confidence)) / np.sum(count))
    return found


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
