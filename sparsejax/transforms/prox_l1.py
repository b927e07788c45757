"""Proximal L1: ISTA (Daubechies et al. 2004) as a training method, with SGD or Adam (Yun et al. 2021).

    theta_i <- sign(v_i) max(|v_i| - gamma lambda / D_i, 0),    v = theta - gamma g / D,

where D = 1 for SGD and D = sqrt(v_hat) + eps for Adam under `metric="adam"`: the penalty is separable, so
that this is the exact prox in Adam's metric. On patterns single weights shrink, and a group counts as nonzero
while one of its weights is. See `sparsejax.forward_backward` for the step and for what happens at `end`.
"""

import optax

from sparsejax.forward_backward import Aim, forward_backward
from sparsejax.proximal import l1_prox


def prox_l1(
    inner: optax.GradientTransformation,
    *,
    learning_rate: float | optax.Schedule,
    strength: float,
    k: int | dict | None = None,
    end: int | None = None,
    steps: int | None = None,
    metric: str = "euclidean",
    b2: float = 0.999,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks all weights alike, and at `end` keeps the largest.

    Args:
      inner: any Optax transformation; it sees dense gradients before `end`.
      learning_rate: of the inner optimizer, a float or its schedule: the prox takes gamma * strength.
      strength: lambda.
      k: units to keep of every leaf, an int or {path pattern: int}, instead of a sparsity.
      end: step at which the k best units (by root mean square) are fixed; default 3/4 of `steps`.
      steps: number of steps of the training.
      metric: "euclidean", or "adam" (exact) for Adam and its kin.
      b2: the inner optimizer's, for `metric="adam"`.
      **target: `sparsity`, `allocation` ("uniform"), `pattern`, `include`, `exclude`, see `Target`.
    """

    def shrink(leaves, amount):
        return {name: l1_prox(leaf.value, amount / leaf.metric) for name, leaf in leaves.items()}

    return forward_backward(
        inner,
        shrink,
        learning_rate=learning_rate,
        strength=strength,
        end=end,
        steps=steps,
        metric=metric,
        b2=b2,
        weights="sizes",
        aim=Aim(k, target),
    )
