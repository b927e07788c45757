"""AdamS: the optimizer of CAST, continuous and adaptive sparsity-aware training (Huang et al. 2025).

The network stays dense while it trains; the optimizer alone makes it sparse. With M the mask of the largest
weights, found anew every `refresh_every` steps, and alpha_t = t / T rising over the whole training:

    mu <- b1 mu + (1 - b1) g
    u   = mu                                             where M
          (1 - alpha_t) mu + alpha_t lambda sign(w)      elsewhere
    v  <- b2 v + (1 - b2) u^2
    w  <- w - gamma_t [u / (1 - b1^(t+1))] / (sqrt(v / (1 - b2^(t+1))) + eps)

The weights outside M are to be zero by the end, where those outside the last M are removed. Because v is
that of u, a weight without gradient moves by gamma_t or more per step whatever lambda is: the sum of gamma_t
must exceed the weights that are to vanish, and gamma must fall towards 0, or they end up jumping between
+-gamma. Against a gradient the decay wins only if lambda is of its size, and lambda must exceed eps.

So `masks` of the state keep everything until the last step and are N:M after it, as the weights are: a run
with `steps` as its length trains dense and is judged pruned. What would be pruned now is the field `planned`
at any time, and `metrics` say how far the weights are from it; after the last step they keep the values from
just before the cut. `prune=False` leaves the weights uncut: the difference to the same run with the
cut is the price of the cut.

Weight scaling and distillation, the other two parts of CAST, are the parameterization `weight_scaling` and
`config.objective`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import complement, scores
from sparsejax.masks import Masks, is_sparsified
from sparsejax.straight_through import best_masks
from sparsejax.target import target_of
from sparsejax.topology import land_on_zero, open_masks


class AdamSState(NamedTuple):
    """count: steps taken; masks: all True before the last step; planned: what would be pruned now;
    momentum, variance: mu and v, float32 like the params (scalars for leaves that are not sparsified);
    metrics: see `distance`; inner_state: the inner optimizer's, for the other leaves."""

    count: jnp.ndarray
    masks: Masks
    planned: Masks
    momentum: optax.Updates
    variance: optax.Updates
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def adams(
    inner: optax.GradientTransformation,
    *,
    learning_rate: float | optax.Schedule,
    steps: int,
    strength: float = 4e-7,
    ramp: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    refresh_every: int = 10,
    prune: bool = True,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense while it drives the smallest weights to zero, and removes them at the last step.

    Args:
      inner: any Optax transformation, for the leaves that are not sparsified.
      learning_rate: gamma of the sparsified leaves, a float or a schedule.
      steps: T, the length of training; the weights are pruned by the last of these updates.
      strength: lambda, above `eps`. The default is the paper's for LLaMA2-7B; it should be of the size of the
        gradients of single weights, 1e-3 to 1e-2 in small networks.
      ramp: share of the steps over which alpha rises from 0 to 1; 0 decays at full strength at once.
      b1, b2, eps: of Adam.
      refresh_every: steps between changes of the planned masks.
      prune: cut at the last step; False leaves the masks open.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    adam = complement.Adam(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
    if not eps < strength < float("inf"):
        raise ValueError(
            f"the strength of AdamS must be finite and above eps={eps:g}, or the decay stalls, got {strength:g}"
        )
    if refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1 step, got {refresh_every}")
    rising, aim = complement.rise(ramp, steps), target_of(**target)

    def plan(params):
        return best_masks(aim, scores.magnitude(params))

    def init(params):
        planned = plan(params)
        return AdamSState(
            count=jnp.zeros([], jnp.int32),
            masks=open_masks(aim.patterns(params), params),
            planned=planned,
            momentum=complement.moments(planned),
            variance=complement.moments(planned),
            metrics=distance(params, planned),
            inner_state=complement.others(inner, planned).init(params),
        )

    def update(grads, state, params=None, **extra_args):
        due = (state.count % refresh_every == 0) & (state.count < steps)
        planned = jax.lax.cond(due, lambda _: plan(params), lambda old: old, state.planned)
        alpha, last = rising(state.count), state.count + 1 == steps

        def decayed(momentum, weight, mask):
            toward = alpha * strength * jnp.sign(weight.astype(jnp.float32))
            return (
                jnp.where(mask, momentum, (1 - alpha) * momentum + toward)
                if is_sparsified(mask)
                else momentum
            )

        def direction(momentum):
            return jax.tree.map(decayed, momentum, params, planned)

        updates, state = complement.step(inner, adam, direction, grads, state, params, planned, extra_args)
        metrics = jax.lax.cond(
            due | last,
            lambda _: distance(optax.apply_updates(params, updates), planned),
            lambda old: old,
            state.metrics,
        )
        dense = True if not prune else state.count + 1 < steps
        masks = jax.tree.map(lambda mask: mask | dense, planned)
        updates = land_on_zero(updates, params, masks)
        return updates, state._replace(
            count=optax.safe_increment(state.count), masks=masks, planned=planned, metrics=metrics
        )

    return optax.GradientTransformationExtraArgs(init, update)


def distance(params, masks) -> dict[str, jnp.ndarray]:
    """How far dense weights are from their masks: what pruning would remove, over all sparsified leaves.

    Returns:
      Float32 scalars, all 0 without a sparsified leaf: `complement_mean` and `complement_max`, the mean and
      the largest |w| outside the masks over the mean |w| inside; `prune_error`, the norm of the weights
      outside over that of all.
    """
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    pairs = [(jnp.abs(w.astype(jnp.float32)), mask) for w, mask in pairs if is_sparsified(mask)]
    if not pairs:
        names = ("complement_max", "complement_mean", "prune_error")
        return {name: jnp.zeros([], jnp.float32) for name in names}  # one buffer each, for donation

    def total(function):
        return sum(jnp.sum(function(w, mask), dtype=jnp.float32) for w, mask in pairs)

    inside = total(lambda w, mask: w * mask) / total(lambda w, mask: mask)
    outside = total(lambda w, mask: w * ~mask) / jnp.maximum(total(lambda w, mask: ~mask), 1.0)
    largest = jnp.max(jnp.stack([jnp.max(w * ~mask) for w, mask in pairs]))
    removed = total(lambda w, mask: jnp.square(w * ~mask)) / jnp.maximum(
        total(lambda w, mask: jnp.square(w)), 1e-30
    )
    return {
        "complement_max": largest / jnp.maximum(inside, 1e-30),
        "complement_mean": outside / jnp.maximum(inside, 1e-30),
        "prune_error": jnp.sqrt(removed),
    }
