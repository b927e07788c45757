"""AST: pruning large language models with semi-structural adaptive sparse training (Huang et al. 2025).

Retrains a pretrained network under straight-through masks of the largest weights, found anew every
`refresh_every` steps, with an annealed SR-STE decay inside AdamW:

    mu <- b1 mu + (1 - b1) g                                 g with respect to the masked weights, dense
    u   = mu + lambda_t (1 - M) w,   lambda_t = lambda min(t / (ramp T), 1)
    v  <- b2 v + (1 - b2) u^2
    w  <- w - gamma_t ([u / (1 - b1^(t+1))] / (sqrt(v / (1 - b2^(t+1))) + eps) + weight_decay w)

As in the released code the second moment is that of u, so that lambda = 0 is AdamW with v of mu^2 (and AdamW
itself only at b1 = 0). There the complement of the mask is formed by a bitwise not of integers, which gives the
decay the wrong sign and lets it reach the kept weights; the paper's equation, which we follow, shrinks only
what is pruned. Masks are by magnitude; the paper's other choice, Wanda's score, needs activations.

Distillation is `config.objective`; the low-rank branch of the boosted variant is the parameterization `slorb`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax import complement
from sparsejax.masks import Masks
from sparsejax.straight_through import follow, shrink, start
from sparsejax.target import target_of


class AstState(NamedTuple):
    """count: steps taken; masks: of the next forward pass; metrics: {"sad": flips so far}; momentum, variance:
    mu and v, float32 like the params (scalars for leaves that are not sparsified); inner_state: the inner
    optimizer's, for the other leaves."""

    count: jnp.ndarray
    masks: Masks
    metrics: dict[str, jnp.ndarray]
    momentum: optax.Updates
    variance: optax.Updates
    inner_state: optax.OptState


def ast(
    inner: optax.GradientTransformation,
    *,
    learning_rate: float | optax.Schedule,
    steps: int,
    strength: float = 1e-4,
    ramp: float = 0.25,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    refresh_every: int = 10,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Straight-through N:M retraining with a decay of the pruned weights that is annealed in.

    Args:
      inner: any Optax transformation, for the leaves that are not sparsified.
      learning_rate: gamma of the sparsified leaves, a float or a schedule.
      steps: T, the length of training.
      strength: lambda, not negative; the default is the paper's for GPT-2 (6e-5 for LLaMA2-7B).
      ramp: share of the steps over which the decay rises from 0 to lambda.
      weight_decay: decoupled, of all sparsified weights, as in AdamW.
      b1, b2, eps: of Adam.
      refresh_every: steps between changes of the masks.
      **target: `sparsity`, `allocation` ("erk"), `pattern`, `include`, `exclude`, see `Target`.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"the strength of AST must be finite and not negative, got {strength:g}")
    if refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1 step, got {refresh_every}")
    adam = complement.Adam(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    rising, aim = complement.rise(ramp, steps), target_of(**target)

    def init(params):
        fields = start(aim, params)
        return AstState(
            count=jnp.zeros([], jnp.int32),
            momentum=complement.moments(fields["masks"]),
            variance=complement.moments(fields["masks"]),
            inner_state=complement.others(inner, fields["masks"]).init(params),
            **fields,
        )

    def update(grads, state, params=None, **extra_args):
        masks, decay = state.masks, strength * rising(state.count)

        def direction(momentum):
            return shrink(momentum, params, masks, decay)

        updates, state = complement.step(inner, adam, direction, grads, state, params, masks, extra_args)
        count = optax.safe_increment(state.count)
        fields = follow(aim, state, params, updates, due=count % refresh_every == 0)
        return updates, state._replace(count=count, **fields)

    return optax.GradientTransformationExtraArgs(init, update)
