"""Projection on at most k nonzero groups: iterative hard thresholding (Blumensath & Davies 2009) as a
training method.

    theta <- argmin { ||x - v||_D : x has at most k nonzero groups },    v = theta - gamma g / D,

which keeps the k groups with the largest sum_i D_i v_i^2, unchanged. D = 1 for SGD, and D = sqrt(v_hat) + eps
for Adam under `metric="adam"`: exact in both cases, for groups of any shape. The number of groups is exact
from the first step on; which they are may change until `end`. See `sparsejax.forward_backward`.
"""

import jax.numpy as jnp
import optax

from sparsejax.forward_backward import Aim, forward_backward


def prox_l0(
    inner: optax.GradientTransformation,
    *,
    k: int | dict | None = None,
    end: int | None = None,
    steps: int | None = None,
    metric: str = "euclidean",
    b2: float = 0.999,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the best groups after every step, and the same ones from `end` on.

    Args:
      inner: any Optax transformation; it sees dense gradients before `end`.
      k: groups to keep of every leaf, an int or {path pattern: int}, instead of a sparsity.
      end: step from which the masks stay fixed; default 3/4 of `steps`.
      steps: number of steps of the training.
      metric: "euclidean", or "adam" (exact) for Adam and its kin.
      b2: the inner optimizer's, for `metric="adam"`.
      **target: `sparsity`, `allocation` ("uniform"; "global" for one budget over all leaves), `pattern`,
        `include`, `exclude`, see `Target`.
    """
    aim = Aim(k, target)

    def select(leaves):
        return aim.select(
            {name: leaf._replace(value=leaf.value * jnp.sqrt(leaf.metric)) for name, leaf in leaves.items()}
        )

    def shrink(leaves, amount):
        del amount  # a constraint has no strength
        kept = select(leaves)
        return {
            name: jnp.where(leaf.pattern.expand(kept[name], leaf.value.shape), leaf.value, 0)
            for name, leaf in leaves.items()
        }

    return forward_backward(
        inner,
        shrink,
        learning_rate=0.0,
        strength=0.0,
        end=end,
        steps=steps,
        metric=metric,
        b2=b2,
        weights="ones",
        aim=aim,
        select=select,
    )
