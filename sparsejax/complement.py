"""Adam that also shrinks the complement of a mask: what AdamS and AST share.

Both replace the optimizer of the sparsified leaves by an Adam that steps along a direction u:

    mu <- b1 mu + (1 - b1) g         the raw gradient only, so that the decay never accumulates
    u   = mu, with a decay outside the mask M
    v  <- b2 v + (1 - b2) u^2        of the direction, for kept weights too (Adam averages g^2)
    w  <- w - gamma [u / (1 - b1^(t+1)) / (sqrt(v / (1 - b2^(t+1))) + eps) + weight_decay w]

All other leaves follow an inner optimizer, which sees nothing of the sparsified ones: a clipping by the
global norm in it is by the norm of the others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks import is_sparsified
from sparsejax.schedules import constant, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """The numbers of the step above.

    Args:
      learning_rate: gamma, a float or a schedule over steps.
      b1, b2: decays of mu and v, in [0, 1).
      eps: added to the root of v, positive.
      weight_decay: decoupled, of all sparsified weights, at least 0.
    """

    learning_rate: float | optax.Schedule
    b1: float
    b2: float
    eps: float
    weight_decay: float = 0.0

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {self.eps}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and at least 0, got {self.weight_decay}")

    def average(self, grads, momentum):
        """mu after this step's gradients: a float32 tree, scalars where `moments` made them."""

        def leaf(grad, old):
            return self.b1 * old + (1 - self.b1) * grad.astype(jnp.float32) if old.ndim else old

        return jax.tree.map(leaf, grads, momentum)

    def leaf(self, count, along, variance, weight):
        """`(update, v)` of one sparsified leaf that steps along u at step `count`, in the weight's dtype."""
        variance = self.b2 * variance + (1 - self.b2) * jnp.square(along)
        root = jnp.sqrt(variance / (1 - self.b2 ** (count + 1)))
        step = along / (1 - self.b1 ** (count + 1)) / (root + self.eps)
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        update = -rate * (step + self.weight_decay * weight.astype(jnp.float32))
        return update.astype(weight.dtype), variance


def moments(masks):
    """Zeros for mu or v: float32 arrays for sparsified leaves, scalars for the others."""
    return jax.tree.map(lambda mask: jnp.zeros(mask.shape, jnp.float32), masks)


def others(inner: optax.GradientTransformation, masks) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer on the leaves that the masks do not sparsify."""
    return optax.masked(inner, jax.tree.map(lambda mask: not is_sparsified(mask), masks))


def step(inner, adam: Adam, direction: Callable, grads, state, params, masks, extra_args: Mapping):
    """One training step: `adam` along `direction` on the sparsified leaves, `inner` on the others.

    Args:
      inner: an Optax transformation, whose state is that of `others(inner, masks)`.
      direction: `f(mu) -> u` on float32 trees like the params, with scalars for leaves that are not sparsified.
      grads, params, extra_args: as for any update.
      state: NamedTuple with `count`, `momentum`, `variance` and `inner_state`.
      masks: bool masks, which tell the sparsified leaves.

    Returns:
      (updates, state) with the last three fields replaced.
    """
    updates, inner_state = others(inner, masks).update(grads, state.inner_state, params, **extra_args)
    momentum = adam.average(grads, state.momentum)

    def leaf(update, along, variance, weight, mask):
        return adam.leaf(state.count, along, variance, weight) if is_sparsified(mask) else (update, variance)

    pairs = jax.tree.map(leaf, updates, direction(momentum), state.variance, params, masks)
    updates, variance = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), pairs)
    return updates, state._replace(momentum=momentum, variance=variance, inner_state=inner_state)


def rise(ramp: float, steps: int) -> optax.Schedule:
    """A strength that rises linearly from 0 to 1 over the first `ramp * steps` steps; 1 throughout at ramp 0.

    Raises:
      ValueError: for a ramp outside [0, 1] or a number of steps below 1.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps, the length of training, must be an integer of at least 1, got {steps!r}")
    if not 0 <= ramp <= 1:
        raise ValueError(
            f"ramp, the share of the steps over which the decay rises, must be in [0, 1], got {ramp}"
        )
    end = round(ramp * steps)
    return linear(0, end) if end else constant(1.0)
