"""SdGF: structure-decay gradient flow, of Progressive Gradient Flow for Robust N:M Sparsity Training in
Transformers (Bambhaniya et al. 2024).

Bool masks of largest |W|, chosen again at every step, under a pattern that tightens stage by stage:

    stepwise:   M-1:M -> M/2:M -> M/4:M -> ... -> N:M         (1:8: 7:8, 4:8, 2:8, 1:8)
    geometric:  8N:8M -> 4N:4M -> 2N:2M -> N:M                (1:8: 8:64, 4:32, 2:16, 1:8)

Before `begin` everything is kept. The stages before the last share the steps from `begin` to `end` equally,
and N:M itself holds from `end` on (from `begin` if it is the only stage); so with end = begin + (stages - 1) L and L steps after it all phases are
equally long, as in the paper. Pruned weights get no gradient (grad="scaled": the mask times g, the limit of
mask decay) or all of it (grad="ste"); either way they keep their values and may return.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import scores
from sparsejax.masks import Masks, apply_masks, choose, flatten, map_with_name, sad
from sparsejax.patterns import NM
from sparsejax.straight_through import GRADIENTS
from sparsejax.target import Target, target_of


class SdgfState(NamedTuple):
    """count: steps taken; masks: of the present weights and stage; metrics: {"sad": mask entries flipped so
    far}; inner_state: the inner optimizer's."""

    count: jnp.ndarray
    masks: Masks
    metrics: dict[str, jnp.ndarray]
    inner_state: optax.OptState


def sdgf(
    inner: optax.GradientTransformation,
    *,
    end: int,
    begin: int = 0,
    decay: str = "stepwise",
    grad: str = "scaled",
    **target,
) -> optax.GradientTransformationExtraArgs:
    """Dense weights under N:M masks that become sparser (stepwise) or finer (geometric).

    Args:
      inner: any Optax transformation.
      begin, end: steps (counted from 0) of the first stage and of the target pattern; dense before `begin`.
      decay: "stepwise" or "geometric".
      grad: what reaches pruned weights: "scaled" (nothing) or "ste" (g).
      **target: `pattern` (N:M only), `include`, `exclude`, see `Target`.
    """
    if not 0 <= begin < end:
        raise ValueError(f"structure decay needs 0 <= begin < end, got begin={begin} and end={end}")
    choose("decay", decay, DECAYS)
    scaled = choose("grad", grad, GRADIENTS) == "scaled"
    aim, inner = target_of(**target), optax.with_extra_args_support(inner)
    for pattern in aim.pattern.values():
        stages(pattern, decay)

    def stage(count, number):
        """0 while dense, then 1 to `number`, the target."""
        passed = (count - begin) * (number - 1) // (end - begin)
        return jnp.where(count < begin, 0, 1 + jnp.clip(passed, 0, number - 1))

    def choose_masks(params, count):
        ladders = _ladders(aim, params, decay)

        def leaf(name, score):
            if name not in ladders:
                return jnp.asarray(True)
            branches = [lambda s: jnp.ones(s.shape, bool), *(nm.select for nm in ladders[name])]
            return jax.lax.switch(stage(count, len(branches) - 1), branches, score)

        return map_with_name(leaf, scores.magnitude(params))

    def init(params):
        count, metrics = jnp.zeros([], jnp.int32), {"sad": jnp.zeros([], jnp.float32)}
        return SdgfState(count, choose_masks(params, count), metrics, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        grads = apply_masks(grads, state.masks) if scaled else grads
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        masks = choose_masks(optax.apply_updates(params, updates), count)
        metrics = {"sad": state.metrics["sad"] + sad(state.masks, masks)}
        return updates, SdgfState(count, masks, metrics, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


# --- stages ------------------------------------------------------------------------------------------


def stages(pattern: NM, decay: str = "stepwise") -> list[NM]:
    """The patterns of structure decay, in order; the last is `pattern` itself.

    Raises:
      ValueError: for a pattern that is not N:M, or (stepwise) an M/N that is no power of two.
    """
    if not isinstance(pattern, NM):
        raise ValueError(f"structure decay needs an N:M pattern such as 1:8, got {pattern}")
    return choose("decay", decay, DECAYS)(pattern)


def _stepwise(pattern: NM) -> list[NM]:
    n, m, axis = pattern.n, pattern.m, pattern.axis
    ratio = m // n
    if m % n or ratio & (ratio - 1):
        raise ValueError(f"stepwise structure decay halves M down to N, which it cannot for {n}:{m}")
    kept = [max(m - 1, n), *(m >> i for i in range(1, ratio.bit_length()))]
    return [NM(k, m, axis) for k in dict.fromkeys(kept)]


def _geometric(pattern: NM) -> list[NM]:
    return [NM(f * pattern.n, f * pattern.m, pattern.axis) for f in (8, 4, 2, 1)]


DECAYS = {"stepwise": _stepwise, "geometric": _geometric}


def _ladders(aim: Target, params, decay: str) -> dict[str, list[NM]]:
    """The stages of every sparsified leaf by path name, checked against its shape."""
    leaves = flatten(params)
    found = {name: stages(pattern, decay) for name, pattern in aim.patterns(params).items()}
    for name, ladder in found.items():
        for pattern in ladder:
            pattern.check(name, leaves[name].shape)
    return found
