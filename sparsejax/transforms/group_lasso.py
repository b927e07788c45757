"""Group lasso: proximal training with a penalty on the norms of groups (Yuan & Lin 2006; for networks Wen et
al. 2016, Scardapane et al. 2017).

    f(x) = sum_g sqrt(n_g) ||x_g||,    prox_{c f}(v)_g = v_g max(1 - c sqrt(n_g) / ||v_g||, 0)

with c = gamma lambda and n_g weights in group g. How many groups survive depends on lambda; at `end` the
number is made exact. With single weights as groups it is `prox_l1`. See `sparsejax.forward_backward` for the
step, its metric, and what happens at `end`.
"""

import jax.numpy as jnp
import optax

from sparsejax.forward_backward import Aim, forward_backward
from sparsejax.proximal import group_l2_prox


def group_lasso(
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
    """Shrinks all groups alike, and at `end` keeps the best.

    Args:
      inner: any Optax transformation; it sees dense gradients before `end`.
      learning_rate: of the inner optimizer, a float or its schedule: the prox takes gamma * strength.
      strength: lambda.
      k: groups to keep of every leaf, an int or {path pattern: int}, instead of a sparsity.
      end: step at which the k best groups (by root mean square) are fixed; default 3/4 of `steps`.
      steps: number of steps of the training.
      metric: "euclidean", or "adam" (averaged over groups, a heuristic) for Adam and its kin.
      b2: the inner optimizer's, for `metric="adam"`.
      **target: `sparsity`, `allocation` ("uniform"), `pattern`, `include`, `exclude`, see `Target`.
    """

    def shrink(leaves, amount):
        return {
            name: group_l2_prox(
                leaf.value, amount, groups=leaf.pattern, weights=jnp.sqrt(leaf.weights) / leaf.group_metric()
            )
            for name, leaf in leaves.items()
        }

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
