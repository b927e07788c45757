"""HESSO against its equations: the line to zero, exact counts, the lowest by hand, and the smaller network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import models, saliency, structure
from sparsejax.structure import Groups, Layer, Slices

GROUPS = Groups(
    [
        Layer("a", 4, {"a": Slices(-1, np.arange(4)), "bias": Slices(0, np.arange(4))}, {"b": Slices(0, np.arange(4))}),
        Layer("b", 5, {"b": Slices(-1, np.arange(5))}, {}),
    ]
)  # fmt: skip


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (4, 5), "bias": (4,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def run(tx, params, steps, scale=1.0):
    """[(params, state)] after every step, with gradients that are functions of the step."""

    @jax.jit
    def step(params, state, index):
        key = jax.random.fold_in(jax.random.key(7), index)
        grads = {
            name: scale * jax.random.normal(jax.random.fold_in(key, len(name)), leaf.shape)
            for name, leaf in params.items()
        }
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found, state = [], tx.init(params)
    for index in range(steps):
        params, state = step(params, state, index)
        found.append((params, state))
    return found


def norms(params):
    return np.sqrt(GROUPS.sums(jax.tree.map(jnp.square, params)))


def test_without_gradients_groups_fall_on_a_line_to_exactly_zero():
    params, steps = make_params(), 6
    apart = Groups(Layer(layer.name, layer.size, layer.own, {}) for layer in GROUPS.layers)
    tx = sparsejax.hesso(
        optax.sgd(0.1), groups=apart, sparsity=0.5, begin=2, end=2 + steps, criteria=["magnitude"]
    )
    path = run(tx, params, 10, scale=0.0)
    start = norms(params)
    smallest = np.isin(np.arange(9), np.argsort(start)[:4])
    for step, (now, state) in enumerate(path):
        done = np.clip((step - 1) / steps, 0, 1)
        np.testing.assert_allclose(norms(now), start * np.where(smallest, 1 - done, 1), rtol=1e-5, atol=1e-6)
        assert state.metrics["groups"] == (5 if done == 1 else 9)
    now, state = path[-1]
    assert not norms(now)[smallest].any()
    np.testing.assert_array_equal(state.pruned, smallest)


@pytest.mark.parametrize("sparsity, periods", [(0.25, 2), (0.5, 1), (0.78, 3)])
def test_counts_are_exact_and_no_layer_is_emptied(sparsity, periods):
    total, begin, end = int(sparsity * 9), 1, 13
    tx = sparsejax.hesso(
        optax.adam(0.05), groups=GROUPS, sparsity=sparsity, begin=begin, end=end, periods=periods
    )
    path = run(tx, make_params(), 16)
    gone = [np.asarray(state.pruned) for _, state in path]
    for before, after in itertools.pairwise(gone):
        assert not (before & ~after).any(), "pruned groups never return"
    length = (end - begin) // periods
    for period in range(periods):
        assert gone[begin + (period + 1) * length - 2].sum() == total * period // periods
        assert gone[begin + (period + 1) * length - 1].sum() == total * (period + 1) // periods
    for (params, state), pruned in zip(path, gone, strict=True):
        assert not norms(params)[pruned].any() and norms(params)[~pruned].all()
        assert not pruned[:4].all() and not pruned[4:].all()
        fed = np.asarray(params["b"])[pruned[:4]]
        assert not fed.any(), "inputs fed by a pruned group are zero too"
        np.testing.assert_array_equal(state.masks["bias"], ~pruned[:4])


def test_the_redundant_are_the_lowest_of_the_mixture():
    """SGD moves along -g, so the mixture of the paper is a function of params and gradients."""
    tx = sparsejax.hesso(optax.sgd(0.1), groups=GROUPS, sparsity=0.45, begin=0, end=6, periods=2)
    params = make_params(3)
    path = [(params, tx.init(params)), *run(tx, params, 4)]
    for index in (0, 3):
        (before, old), (_, new) = path[index], path[index + 1]
        key = jax.random.fold_in(jax.random.key(7), index)
        grads = {n: jax.random.normal(jax.random.fold_in(key, len(n)), x.shape) for n, x in before.items()}
        masked = sparsejax.apply_masks(grads, old.masks)
        scores = saliency.saliency(GROUPS, before, jax.tree.map(lambda g: -g, masked))
        expected = saliency.lowest(GROUPS, scores, 2, ~old.pruned)
        np.testing.assert_array_equal(new.redundant, expected)
        assert new.redundant.sum() == 2


def test_sliced_network_equals_masked_network():
    """After training an MLP on noise with momentum and weight decay."""
    model = models.build("mlp", 3, hidden=(8, 6))
    x, y = jax.random.normal(jax.random.key(0), (32, 10)), jnp.arange(32) % 3
    variables = model.init(jax.random.key(1), x)
    groups = structure.channels(model, variables, x[:1])
    inner = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))
    tx = sparsejax.hesso(inner, groups=groups, sparsity=0.5, end=12, periods=3)

    @jax.jit
    def step(params, state):
        def loss(params):
            outputs = model.apply({"params": sparsejax.apply_masks(params, state.masks)}, x)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], tx.init(variables["params"])
    for _ in range(20):
        params, state = step(params, state)
    smaller, fewer = structure.remove(model, {"params": params}, sparsejax.get_masks(state), groups)
    assert sum(smaller.hidden) == 7
    np.testing.assert_allclose(
        smaller.apply(fewer, x), model.apply({"params": params}, x), rtol=1e-5, atol=1e-6
    )
    kept = sparsejax.flops.parameters(params, sparsejax.get_masks(state))[1]
    assert kept == sum(leaf.size for leaf in jax.tree.leaves(fewer))


@pytest.mark.parametrize(
    "kw, message",
    [
        (
            {"periods": 0},
            "periods must be at least 1 and fit between begin and end, got periods=0, begin=2, end=8",
        ),
        ({"periods": 7}, "got periods=7, begin=2, end=8"),
        ({"end": 2}, "got periods=1, begin=2, end=2"),
        ({"begin": -1}, "begin must be a step that is at least 0, got -1"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": 0.9}, "removes 8 of 9 groups"),
        ({"criteria": ["size"]}, "unknown criterion of saliency 'size'"),
        ({"groups": "channels"}, "groups must be a sparsejax.structure.Groups"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sparsejax.hesso(optax.sgd(0.1), **{"groups": GROUPS, "sparsity": 0.5, "begin": 2, "end": 8, **kw})


def test_groups_of_another_model_are_refused_at_init():
    tx = sparsejax.hesso(optax.sgd(0.1), groups=GROUPS, sparsity=0.5, end=8)
    with pytest.raises(ValueError, match=r"axis 0 of bias into 4 indices, but its shape is \(3,\)"):
        tx.init({**make_params(), "bias": jnp.zeros(3)})
