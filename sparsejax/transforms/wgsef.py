"""WGSEF: learning k-level structured sparse networks with the weighted group sparse envelope (Refael,
Arbel & Huleihel 2022).

In every sparsified leaf, with groups g (neurons, filters, blocks, labels ...) of weight d_g and a preset k,

    theta <- prox_{gamma lambda GS_k}(theta - gamma g),
    GS_k(x) = 1/2 min { sum_g d_g ||x_g||^2 / u_g : 0 <= u_g <= 1, sum_g u_g <= k },

the largest convex function below "1/2 sum_g d_g ||x_g||^2 if at most k groups are nonzero, else infinity".
The k best groups are only decayed like weights under an L2 penalty, all others are pushed to zero, so that
with growing lambda the number of nonzero groups falls to k and stays there. See
`sparsejax.proximal.wgsef_prox` for the prox, which is linear in the number of groups, and
`sparsejax.forward_backward` for the step, its metric, and what happens at `end`.

More than k groups can be nonzero before `end`, which makes the number exact. Departures: the half-space stage
that the paper's experiments append is left out; under N:M patterns one envelope with k = N is taken of every
M weights; under `allocation="global"` one envelope of all leaves together, which with groups of a whole layer
(`patterns.Group([0])`) removes layers.
"""

import jax.numpy as jnp
import optax

from sparsejax.forward_backward import Aim, forward_backward
from sparsejax.proximal import unit_norms, wgsef_factors, wgsef_prox


def wgsef(
    inner: optax.GradientTransformation,
    *,
    learning_rate: float | optax.Schedule,
    strength: float,
    k: int | dict | None = None,
    weights: str = "ones",
    end: int | None = None,
    steps: int | None = None,
    metric: str = "euclidean",
    b2: float = 0.999,
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Proximal training towards exactly k groups per leaf.

    Args:
      inner: any Optax transformation; it sees dense gradients before `end`.
      learning_rate: of the inner optimizer, a float or its schedule: the prox takes gamma * strength.
      strength: lambda. The kept groups decay as under an L2 penalty lambda / 2 ||x||^2.
      k: groups to keep of every leaf, an int or {path pattern: int}, instead of a sparsity.
      weights: d_g, "ones" or "sizes" (number of weights in the group; matters where sizes differ).
      end: step at which the k best groups are fixed; default 3/4 of `steps`.
      steps: number of steps of the training.
      metric: "euclidean", or "adam" (averaged over groups, a heuristic) for Adam and its kin.
      b2: the inner optimizer's, for `metric="adam"`.
      **target: `sparsity`, `allocation` ("uniform"; "global" for one envelope over all leaves), `pattern`,
        `include`, `exclude`, see `Target`.
    """
    aim = Aim(k, target)

    def shrink(leaves, amount):
        if aim.joint and leaves:
            return _together(leaves, amount)
        return {
            name: wgsef_prox(
                leaf.value,
                amount,
                leaf.k,
                groups=leaf.pattern,
                weights=leaf.weights,
                metric=leaf.group_metric(),
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
        weights=weights,
        aim=aim,
    )


def _together(leaves, amount):
    """The prox of one envelope over the groups of all leaves."""
    norms, weights = [], []
    for leaf in leaves.values():
        metric = leaf.group_metric()
        norm = unit_norms(leaf.value, leaf.pattern)
        norms.append(norm * jnp.sqrt(metric))
        weights.append(jnp.broadcast_to(leaf.weights / metric, norm.shape))
    flat = [jnp.concatenate([part.reshape(-1) for part in parts]) for parts in (norms, weights)]
    factors = wgsef_factors(flat[0], amount, next(iter(leaves.values())).k, weights=flat[1])
    values, start = {}, 0
    for (name, leaf), norm in zip(leaves.items(), norms, strict=True):
        own = factors[start : start + norm.size].reshape(norm.shape)
        values[name] = leaf.value * leaf.pattern.expand(own, leaf.value.shape)
        start += norm.size
    return values
