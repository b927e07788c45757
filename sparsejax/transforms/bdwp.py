"""BDWP: bidirectional weight pruning, of Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and
Dataflow Co-Design (Fang et al. 2023), and the variants that its paper compares.

Weights stay dense. After each update two N:M copies are made of them, one for each product that can use it:

    W_ff = P_{N:M}(W; input axis)        Y  = X W_ff
    W_bp = P_{N:M}(W; output axis)       dX = dY W_bp^T
                                         dW = X^T dY, which reaches all of W

so that the groups lie along the reduction axis of both products. A step costs (2 N/M + 1) / 3 of a dense one,
inference N/M. The variants:

    bdwp   as above
    sdwp   W_bp only; forward pass and inference are dense: (2 + N/M) / 3
    sdgp   dX = P_{N:M}(dY; output axis) W^T, all else dense (McDanel et al. 2022): (2 + N/M) / 3

(The fourth, sparse in the forward pass only, is `sr_ste`.) The second masks are the state's `backward_masks`:
pass them to `model.apply` as a collection of that name beside `masks`, for the layers of `sparsejax.nn`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from sparsejax import scores, straight_through
from sparsejax.masks import Masks, choose, flatten, map_with_name
from sparsejax.patterns import NM
from sparsejax.target import Target, target_of
from sparsejax.topology import open_masks

VARIANTS = ("bdwp", "sdwp", "sdgp")


class BdwpState(NamedTuple):
    """count: steps taken; masks: of the present weights, for the forward pass (full for sdwp and sdgp);
    backward_masks: for the backward pass, or for sdgp the pattern of the output's gradient, a bool array of
    length M with N True; metrics: {"sad": flips of `masks` so far}; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    backward_masks: Masks
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def bdwp(
    inner: optax.GradientTransformation, *, variant: str = "bdwp", decay: float = 0.0, **target
) -> optax.GradientTransformationExtraArgs:
    """Dense weights under N:M masks of largest magnitude, other ones forward than backward.

    Args:
      inner: any Optax transformation.
      variant: "bdwp", "sdwp" or "sdgp".
      decay: of what `masks` prune, as in `sr_ste`, for "bdwp" only; 0 in the paper.
      **target: `pattern` (N:M along the input axis only), `include`, `exclude`, see `Target`.
    """
    choose("variant", variant, VARIANTS)
    if decay and variant != "bdwp":
        raise ValueError(
            f"decay acts on what the forward pass prunes, nothing for variant={variant!r}, got decay={decay}"
        )
    aim, inner = target_of(**target), optax.with_extra_args_support(inner)
    _check(aim)

    def init(params):
        fields = straight_through.start(aim, params)
        if variant != "bdwp":
            fields["masks"] = open_masks(aim.patterns(params), params)
        backward = backward_masks(aim, params, variant)
        return BdwpState(
            jnp.zeros([], jnp.int32), backward_masks=backward, inner_state=inner.init(params), **fields
        )

    def update(grads, state, params=None, **extra_args):
        if decay:
            grads = straight_through.shrink(grads, params, state.masks, decay)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        state = state._replace(count=optax.safe_increment(state.count), inner_state=inner_state)
        if variant == "bdwp":
            state = state._replace(**straight_through.follow(aim, state, params, updates))
        backward = backward_masks(aim, optax.apply_updates(params, updates), variant)
        return updates, state._replace(backward_masks=backward)

    return optax.GradientTransformationExtraArgs(init, update)


def backward_masks(aim: Target, params, variant: str = "bdwp") -> Masks:
    """The masks of the backward pass: N:M along the output axis (see `BdwpState` for sdgp).

    Raises:
      ValueError: if M does not divide the output axis of a leaf (naming it).
    """
    leaves, patterns = flatten(params), aim.patterns(params)
    turned = {name: NM(nm.n, nm.m, axis=-1) for name, nm in patterns.items()}
    for name, pattern in turned.items():
        pattern.check(name, leaves[name].shape)

    def leaf(name, score):
        if name not in turned:
            return jnp.asarray(True)
        pattern = turned[name]
        return jnp.arange(pattern.m) < pattern.n if variant == "sdgp" else pattern.select(score)

    return map_with_name(leaf, scores.magnitude(params))


def _check(aim: Target) -> None:
    for pattern in aim.pattern.values():
        if not isinstance(pattern, NM) or pattern.axis != -2:
            raise ValueError(f"bdwp needs N:M patterns along the input axis -2, such as 2:8, got {pattern}")
