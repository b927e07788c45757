"""CRIC: HESSO that rechecks, on a trained network, which groups can go before any goes (Chen et al. 2024).

From step `begin`, with the parameters x0 of that moment kept aside:

  probe    in every layer in turn, a quarter, a half and three quarters of the groups (of lowest saliency) are
           set to zero for one batch, whose loss is compared with that of x0;
  cycles   V = the K groups of lowest saliency; H = V. For `sampling_steps` steps the network trains while V
           shrinks linearly, as in HESSO. Groups outside H that come to be among the K lowest on the way form
           the next V, and join H; the parameters return to x0. This ends when at most `tolerance` groups
           are new, or after `max_cycles`;
  hybrid   with the parameters at x0, the K groups of lowest score shrink to zero over `hybrid_steps`. Scores
           are saliencies averaged over all steps of all cycles, plus `loss_weight` / C times the mean loss
           ratio of the group's layer, which has C groups.

After that the zero groups stay masked and the rest trains on. Only the parameters return to x0: the inner
optimizer keeps its state (and its learning rate its schedule), and batch statistics are the model's own.

Departures from the released code: cycles update all parameters, not only those that belong to groups; the
reference of the loss ratios is the mean loss of x0 over the batches between the probes, not that of one batch;
and only the steps of the cycles are averaged. Returning by an update leaves a rounding error of one unit in
the last place.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import saliency
from sparsejax.masks import Masks, check_sparsity, dense_masks
from sparsejax.selection import top_k_mask
from sparsejax.structure import Groups
from sparsejax.topology import land_on_zero, masked_update

TRIALS = (0.25, 0.5, 0.75)


class CricState(NamedTuple):
    """What CRIC remembers; all arrays of shape (G,) have one entry per group.

    Attributes:
      count: steps taken.
      masks: zero on pruned groups.
      hybrid: the step at which the hybrid phase begins, -1 while that is open.
      snapshot: x0.
      violating, history, entering: bool (G,), V, H, and the groups that have entered the K lowest so far.
      redundant: bool (G,), the groups to remove, from the hybrid phase on.
      saliency: float32 (G,), summed over the steps of the cycles.
      losses: float32 (layers,), the probes' losses summed per layer; `reference`: those of x0.
      metrics: `groups`, how many are left; `cycles`, how many have ended.
      inner_state: the inner optimizer's.
    """

    count: jnp.ndarray
    masks: Masks
    hybrid: jnp.ndarray
    snapshot: Any
    violating: jnp.ndarray
    history: jnp.ndarray
    entering: jnp.ndarray
    redundant: jnp.ndarray
    saliency: jnp.ndarray
    losses: jnp.ndarray
    reference: jnp.ndarray
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def cric(
    inner: optax.GradientTransformation,
    *,
    groups: Groups,
    sparsity: float,
    sampling_steps: int,
    hybrid_steps: int,
    begin: int = 0,
    max_cycles: int = 10,
    tolerance: int = 0,
    loss_weight: float = 1.0,
    criteria: Iterable[str] = saliency.DEFAULT,
    steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes whole groups of a trained network, after cycles that find out which.

    Args:
      inner: any Optax transformation; it sees masked gradients.
      groups: the removable groups, from `sparsejax.structure.channels`. The training loop fills them in.
      sparsity: the fraction of groups to remove, in [0, 1).
      sampling_steps: length of a cycle.
      hybrid_steps: over how many steps the groups shrink to zero in the end.
      begin: the step (counted from 0) at which it starts.
      max_cycles, tolerance: see the module.
      loss_weight: weight of the probes; 0 leaves them out. With them, `update` needs the batch's loss:
        `tx.update(grads, state, params, loss=loss)`.
      criteria: names of `sparsejax.saliency.CRITERIA`.
      steps: length of the training, to check that the last phase fits; the training loop fills it in.
    """
    criteria = saliency.check_criteria(criteria)
    total = saliency.redundant_count(groups, check_sparsity(sparsity))
    saliency.check_begin(begin)
    layers = len(groups.layers)
    first = begin + (2 * len(TRIALS) * layers if loss_weight else 0)
    _check_lengths(sampling_steps, hybrid_steps, max_cycles, first, steps)
    sizes = np.asarray([layer.size for layer in groups.layers])
    trials = np.maximum(1, np.floor(sizes[:, None] * TRIALS)).astype(np.int32).ravel()

    def init(params):
        groups.check(params)
        none = jnp.zeros(groups.count, bool)
        zero = jnp.zeros([], jnp.float32)
        return CricState(
            count=jnp.zeros([], jnp.int32),
            masks=groups.masks(params, ~none) if total else dense_masks(params),
            hybrid=jnp.full([], -1, jnp.int32),
            snapshot=jax.tree.map(jnp.array, params),
            **{name: jnp.array(none) for name in ("violating", "history", "entering", "redundant")},
            saliency=jnp.zeros(groups.count, jnp.float32),
            losses=jnp.zeros(layers, jnp.float32),
            reference=jnp.array(zero),
            metrics={"groups": zero + groups.count, "cycles": jnp.array(zero)},
            inner_state=inner.init(params),
        )

    def update(grads, state, params=None, **extra_args):
        updates, inner_state = masked_update(inner, grads, state.inner_state, params, state.masks, extra_args)
        count, state = state.count, state._replace(inner_state=inner_state)
        state = state._replace(count=optax.safe_increment(count))
        if not total:
            return updates, state
        if loss_weight and extra_args.get("loss") is None:
            raise ValueError(
                f"cric with loss_weight={loss_weight} needs update(grads, state, params, loss=loss); set 0 to do without"
            )
        snapshot = jax.tree.map(lambda new, old: jnp.where(count == begin, new, old), params, state.snapshot)
        probing = (count >= begin) & (count < first)
        cycling = (count >= first) & (state.hybrid < 0)
        scores = jax.lax.cond(
            probing | cycling,
            lambda: saliency.saliency(groups, params, updates, criteria),
            lambda: jnp.zeros(groups.count, jnp.float32),
        )
        hidden, state = probe(count, probing, scores, state, extra_args.get("loss"))
        cycled, state = cycle(count, cycling, scores, state)
        flags = jnp.where(probing, hidden, jnp.where(cycling, cycled, state.redundant))
        left_of_cycle = sampling_steps - (count - first) % sampling_steps
        left_of_hybrid = jnp.maximum(hybrid_steps - (count - state.hybrid), 1)
        last = jnp.where(probing, 1, jnp.where(cycling, left_of_cycle, left_of_hybrid))
        # a probe trains nothing: one step hides groups, the next returns to x0, as the end of a cycle does
        updates = jax.tree.map(lambda u: jnp.where(probing, jnp.zeros_like(u), u), updates)
        updates = saliency.shrink(groups, flags, (last - 1) / last, updates, params)
        returning = (probing & ((count - begin) % 2 == 1)) | (cycling & (left_of_cycle == 1))
        updates = jax.tree.map(
            lambda u, old, x: jnp.where(returning, (old - x).astype(u.dtype), u), updates, snapshot, params
        )
        kept = ~(state.redundant & (count >= state.hybrid + hybrid_steps - 1))
        masks = groups.masks(params, kept)
        metrics = {**state.metrics, "groups": jnp.sum(kept, dtype=jnp.float32)}
        state = state._replace(snapshot=snapshot, masks=masks, metrics=metrics)
        return land_on_zero(updates, params, masks), state

    def probe(count, probing, scores, state, loss):
        """The groups to hide for the next batch, and the state with this batch's loss noted."""
        if not loss_weight:
            return jnp.zeros(groups.count, bool), state
        trial = jnp.clip((count - begin) // 2, 0, trials.size - 1)
        hiding, inside = (count - begin) % 2 == 0, groups.layer == trial // len(TRIALS)
        noted = jnp.where(probing, loss.astype(jnp.float32), 0.0)
        hidden = top_k_mask(-scores, jnp.asarray(trials)[trial], candidates=inside) & inside & hiding
        return hidden, state._replace(
            reference=state.reference + jnp.where(hiding, noted, 0.0),
            losses=state.losses.at[trial // len(TRIALS)].add(jnp.where(hiding, 0.0, noted)),
        )

    def cycle(count, cycling, scores, state):
        """The groups that shrink in this step of a cycle, and the state after it."""
        starting, done = cycling & (count == first), (count - first) // sampling_steps + 1
        low = saliency.lowest(groups, scores, total)
        violating = jnp.where(starting, low, state.violating)
        history = state.history | (starting & low)
        entering = state.entering | (cycling & low & ~history)
        summed = state.saliency + jnp.where(cycling, scores, 0.0)
        ending = cycling & ((count - first) % sampling_steps == sampling_steps - 1)
        deciding = ending & ((jnp.sum(entering) <= tolerance) | (done >= max_cycles))
        ratio = state.losses / jnp.maximum(state.reference / layers, 1e-30)
        mean = summed / (done * sampling_steps) + loss_weight * (ratio / sizes)[groups.layer]
        chosen = saliency.lowest(groups, jnp.where(deciding, mean, 0.0), total)
        return violating, state._replace(
            violating=jnp.where(ending, entering, violating),
            history=history | (ending & entering),
            entering=entering & ~ending,
            saliency=summed,
            redundant=jnp.where(deciding, chosen, state.redundant),
            hybrid=jnp.where(deciding, count + 1, state.hybrid),
            metrics={
                **state.metrics,
                "cycles": jnp.where(ending, done, state.metrics["cycles"]).astype(jnp.float32),
            },
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_lengths(sampling_steps, hybrid_steps, max_cycles, first, steps):
    lengths = {"sampling_steps": sampling_steps, "hybrid_steps": hybrid_steps, "max_cycles": max_cycles}
    for name, value in lengths.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    needed = first + max_cycles * sampling_steps + hybrid_steps
    if steps is not None and needed > steps:
        raise ValueError(
            f"cric may need {needed} steps ({first} before the first cycle, {max_cycles} cycles of {sampling_steps}, "
            f"{hybrid_steps} to remove), but there are {steps}"
        )
