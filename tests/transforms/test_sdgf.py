"""Structure-decay gradient flow: its lists of stages, when they hold, and the masks of every stage."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax.patterns import NM
from sparsejax.transforms.sdgf import stages

START = {"up": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)}}


def names(pattern, decay):
    return [f"{p.n}:{p.m}" for p in stages(pattern, decay)]


@pytest.mark.parametrize(
    "decay, target, expected",
    [
        ("stepwise", NM(1, 8), ["7:8", "4:8", "2:8", "1:8"]),
        ("stepwise", NM(1, 16), ["15:16", "8:16", "4:16", "2:16", "1:16"]),
        ("stepwise", NM(2, 8), ["7:8", "4:8", "2:8"]),
        ("stepwise", NM(2, 4), ["3:4", "2:4"]),
        ("stepwise", NM(1, 2), ["1:2"]),
        ("geometric", NM(1, 8), ["8:64", "4:32", "2:16", "1:8"]),
        ("geometric", NM(2, 4), ["16:32", "8:16", "4:8", "2:4"]),
    ],
)
def test_stages(decay, target, expected):
    assert names(target, decay) == expected
    assert {p.axis for p in stages(NM(1, 8, axis=-1), decay)} == {-1}


@pytest.mark.parametrize("target", [NM(1, 8), NM(3, 8), NM(1, 32)])
def test_geometric_stages_keep_the_density(target):
    assert {p.n / p.m for p in stages(target, "geometric")} == {target.n / target.m}


def train(tx, steps):
    """Yields (params before, grads, params after, state before, state after) of every step."""
    params, state, update = START, tx.init(START), jax.jit(tx.update)
    for step in range(steps):
        grads = {"up": {"kernel": jax.random.normal(jax.random.key(step), (64, 6))}}
        updates, after = update(grads, state, params)
        new = optax.apply_updates(params, updates)
        yield params, grads, new, state, after
        params, state = new, after


@pytest.mark.parametrize(
    "decay, groups",
    [("stepwise", [(7, 8), (4, 8), (2, 8), (1, 8)]), ("geometric", [(8, 64), (4, 32), (2, 16), (1, 8)])],
)
def test_the_masks_of_every_stage_are_the_largest_weights_of_its_groups(decay, groups):
    """Dense before step 2; 2 steps of each stage; 1:8 from step 8 on. Brute force by a sort."""
    tx = sparsejax.sdgf(optax.sgd(0.3), begin=2, end=8, decay=decay, pattern="1:8")
    seen = [None, None, *(group for group in groups[:3] for _ in range(2)), groups[3], groups[3]]
    states = [tx.init(START)]
    weights = [START]
    for *_, new, _, after in train(tx, 9):
        states.append(after)
        weights.append(new)
    for group, state, params in zip(seen, states, weights, strict=True):
        mask, values = np.asarray(state.masks["up"]["kernel"]), np.abs(np.asarray(params["up"]["kernel"]))
        if group is None:
            assert mask.all()
            continue
        n, m = group
        ranks = np.argsort(np.argsort(-values.reshape(-1, m, 6), axis=1), axis=1)
        np.testing.assert_array_equal(mask, (ranks < n).reshape(64, 6))
    flips = sum(
        int((np.asarray(a.masks["up"]["kernel"]) != np.asarray(b.masks["up"]["kernel"])).sum())
        for a, b in itertools.pairwise(states)
    )
    assert states[-1].metrics["sad"] == flips > 0


@pytest.mark.parametrize("grad", ["scaled", "ste"])
def test_what_reaches_pruned_weights(grad):
    tx = sparsejax.sdgf(optax.sgd(0.1), end=3, grad=grad, pattern="1:8")
    for params, grads, new, state, _ in train(tx, 6):
        mask, moved = np.asarray(state.masks["up"]["kernel"]), params["up"]["kernel"] - new["up"]["kernel"]
        expected = 0.1 * np.asarray(grads["up"]["kernel"]) * (mask if grad == "scaled" else 1.0)
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(moved)[~mask] == 0, grad == "scaled")


@pytest.mark.parametrize(
    "keywords, message",
    [
        (
            {"pattern": "unstructured", "sparsity": 0.5},
            r"needs an N:M pattern such as 1:8, got Unstructured\(\)",
        ),
        ({"pattern": "3:8"}, "cannot for 3:8"),
        ({"pattern": "3:16"}, "cannot for 3:16"),
        ({"pattern": "1:8", "decay": "linear"}, "unknown decay 'linear'.*known: geometric, stepwise"),
        ({"pattern": "1:8", "grad": "none"}, "unknown grad 'none'"),
        ({"pattern": "1:8", "begin": 5}, "0 <= begin < end, got begin=5 and end=5"),
        (
            {"pattern": "1:16", "decay": "geometric"},
            "8:128 needs axis -2 of up/kernel to be divisible by 128",
        ),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        sparsejax.sdgf(optax.sgd(0.1), end=5, **keywords).init(START)
