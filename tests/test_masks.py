"""Masks: the dense gradient through them, finding them in any state, rules on paths, and measures."""

import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from sparsejax import masks as masks_lib

PARAMS = {
    "conv_0": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
    "embed": {"embedding": jnp.ones((10, 4))},
    "head": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(5)},
    "norm": {"scale": jnp.ones(8)},
}


def random_masks(params, rate=0.3):
    key = jax.random.key(0)
    return jax.tree.map(
        lambda p: jax.random.bernoulli(key, rate, p.shape) if p.ndim > 1 else jnp.asarray(True), params
    )


def test_gradient_through_masks_is_that_of_the_masked_weights():
    masks = random_masks(PARAMS)

    def loss(params):
        return sum(jnp.sum(jnp.sin(leaf + 0.5)) for leaf in jax.tree.leaves(params))

    through = jax.jit(jax.grad(lambda params: loss(sparsejax.apply_masks(params, masks))))(PARAMS)
    dense = jax.grad(loss)(jax.tree.map(lambda p, m: p * m, PARAMS, masks))
    chex.assert_trees_all_close(through, dense)
    assert float(jnp.abs(through["head"]["kernel"][~masks["head"]["kernel"]]).min()) > 0


def test_masked_weights_are_zero_even_where_they_are_not_finite():
    weights = jnp.asarray([1.0, jnp.nan, jnp.inf, 2.0])
    masked = masks_lib.mask_weight(weights, jnp.asarray([True, False, False, False]))
    np.testing.assert_array_equal(masked, [1.0, 0.0, 0.0, 0.0])


def test_soft_masks_receive_their_own_gradient():
    weights, mask = jnp.asarray([2.0, 3.0]), jnp.asarray([0.25, 1.0])
    np.testing.assert_array_equal(masks_lib.mask_weight(weights, mask), [0.5, 3.0])
    grads = jax.grad(lambda w, m: masks_lib.mask_weight(w, m).sum(), argnums=(0, 1))(weights, mask)
    np.testing.assert_array_equal(grads[0], [1.0, 1.0])
    np.testing.assert_array_equal(grads[1], weights)


def test_masks_are_found_wherever_the_transform_sits():
    sparse = sparsejax.fixed(optax.adam(1e-3), sparsity=0.5)
    for tx in (
        sparse,
        optax.chain(optax.clip(1.0), sparse),
        optax.MultiSteps(sparse, 2),
        optax.inject_hyperparams(
            lambda learning_rate: sparsejax.fixed(optax.sgd(learning_rate), sparsity=0.5)
        )(0.1),
    ):
        assert sparsejax.sparsity(sparsejax.get_masks(tx.init(PARAMS))) == pytest.approx(0.5, abs=1e-2)


def test_a_parameter_called_masks_is_no_mask():
    class State(NamedTuple):
        masks: dict

    state = (optax.adam(1.0).init({"masks": jnp.ones(3)}), State({"masks": jnp.asarray(True)}))
    chex.assert_trees_all_equal(sparsejax.get_masks(state), {"masks": jnp.asarray(True)})


@pytest.mark.parametrize("count", [0, 2])
def test_no_masks_or_two_kinds_are_refused(count):
    tx = optax.chain(optax.sgd(0.1), *[sparsejax.dense(optax.sgd(0.1)) for _ in range(count)])
    with pytest.raises(ValueError, match=f"holds {count} fields named 'masks' instead of one"):
        sparsejax.get_masks(tx.init(PARAMS))


def test_rules_choose_leaves_by_path_and_rank():
    assert list(masks_lib.sparsifiable(PARAMS)) == ["conv_0/kernel", "embed/embedding", "head/kernel"]
    assert list(masks_lib.sparsifiable(PARAMS, exclude="head/*")) == ["conv_0/kernel", "embed/embedding"]
    assert list(masks_lib.sparsifiable(PARAMS, include=("conv*", "norm/scale"))) == ["conv_0/kernel"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"include": "nothing*"},
            "include=['nothing*'] and exclude=[] select no parameter with two or more axes",
        ),
        (
            {"include": ("conv*", "typo/*")},
            "include rule 'typo/*' matches no parameter (parameters: conv_0/bias",
        ),
        ({"exclude": ("haed/*",)}, "exclude rule 'haed/*' matches no parameter (parameters: conv_0/bias"),
    ],
)
def test_rules_that_select_nothing_are_refused(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        masks_lib.sparsifiable(PARAMS, **rules)


def test_choose_lists_and_suggests():
    with pytest.raises(
        ValueError, match=re.escape("unknown method 'riggl'; did you mean 'rigl'? (known: rigl, snfs)")
    ):
        masks_lib.choose("method", "riggl", {"snfs": 1, "rigl": 2})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(0, 2**32 - 1), st.booleans())
def test_count_is_numpys(shape, seed, rows):
    flags = np.random.default_rng(seed).random(shape) < 0.5
    axis = len(shape) // 2 if rows else None
    expected = flags.sum(axis, keepdims=True) if rows else flags.sum()
    np.testing.assert_array_equal(masks_lib.count(jnp.asarray(flags), axis), expected)


def test_measures():
    old = {"a": jnp.asarray([[True, True, False, False]]), "b": jnp.asarray(True)}
    new = {"a": jnp.asarray([[True, False, True, True]]), "b": jnp.asarray(True)}
    assert sparsejax.densities(new) == {"a": 0.75}
    assert sparsejax.sparsity(new) == 0.25 and sparsejax.sparsity({"b": jnp.asarray(True)}) == 0.0
    assert sparsejax.churn(old, new) == pytest.approx(2 / 3) and sparsejax.churn(new, new) == 0.0
