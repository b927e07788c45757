"""CRIC against a plain retelling in numpy and sets, and its probes against losses worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax.saliency import saliency
from sparsejax.structure import Groups, Layer, Slices
from sparsejax.transforms.cric import TRIALS

GROUPS = Groups(
    [
        Layer("a", 3, {"a": Slices(-1, np.arange(3)), "bias": Slices(0, np.arange(3))}, {"b": Slices(0, np.arange(3))}),
        Layer("b", 4, {"b": Slices(-1, np.arange(4))}, {}),
    ]
)  # fmt: skip
LAYERS = ([0, 1, 2], [3, 4, 5, 6])
RATE = 0.3


def tree(seed):
    """Numbers in the shape of the parameters; the last leaf belongs to no group."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 3), "b": (3, 4), "bias": (3,), "other": (2,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def squares(params):
    return GROUPS.sums(jax.tree.map(jnp.square, params))


def silent(params):
    """The groups whose own weights are all zero."""
    return set(np.flatnonzero(squares(params) == 0))


def gradients(index):
    """Gradients that depend on the step only."""
    return jax.tree.map(lambda leaf: 0.5 * leaf, tree(100 + index))


def run(tx, params, steps, loss=None):
    """[(params, state)] after every step of SGD at RATE."""
    update, found, state = jax.jit(tx.update), [], tx.init(params)
    for index in range(steps):
        extra = {} if loss is None else {"loss": loss(params)}
        updates, state = update(gradients(index), state, params, **extra)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


def lowest(scores, k):
    """The k groups of lowest score but the best of each layer."""
    best = [max(layer, key=lambda i: scores[i]) for layer in LAYERS]
    return set(sorted((i for i in range(7) if i not in best), key=lambda i: scores[i])[:k])


def scaled(params, groups, factor):
    flags = jnp.asarray([i in groups for i in range(7)])
    return GROUPS.select(flags, jax.tree.map(lambda x: factor * x, params), params)


def retell(params, k, begin, sampling, hybrid, max_cycles, steps):
    """CRIC without probes as the paper tells it: [parameters after each step], the cycles, the chosen groups."""
    path, index = [], 0

    def train(shrunk=(), factor=1.0):
        nonlocal params, index
        moved = jax.tree.map(lambda x, g: x - RATE * g, params, gradients(index))
        params, index = scaled(moved, shrunk, factor), index + 1
        path.append(params)

    for _ in range(begin):
        train()
    cached, history, total, samples, cycles = params, set(), np.zeros(7), 0, 0
    violating = None
    while True:
        entering = set()
        for t in range(sampling):
            descent = jax.tree.map(lambda g: -g, gradients(index))
            scores = np.asarray(saliency(GROUPS, params, descent))
            total, samples = total + scores, samples + 1
            if violating is None:
                violating = lowest(scores, k)
                history |= violating
            entering |= lowest(scores, k) - history
            train(violating, (sampling - t - 1) / (sampling - t))
        params, cycles = cached, cycles + 1
        path[-1] = params
        violating, history = entering, history | entering
        if not violating or cycles == max_cycles:
            break
    chosen = lowest(total / samples, k)
    for t in range(steps - index):
        train(chosen, max(0, hybrid - t - 1) / max(1, hybrid - t))
    return path, cycles, chosen


@pytest.mark.parametrize("seed, max_cycles", [(0, 10), (1, 10), (2, 10), (3, 1)])
def test_equals_the_retelling(seed, max_cycles):
    params, steps, lengths = tree(seed), 48, {"sampling_steps": 4, "hybrid_steps": 5}
    tx = sparsejax.cric(
        optax.sgd(RATE),
        groups=GROUPS,
        sparsity=0.45,
        begin=2,
        max_cycles=max_cycles,
        loss_weight=0,
        **lengths,
    )
    expected, cycles, chosen = retell(params, 3, 2, 4, 5, max_cycles, steps)
    path = run(tx, params, steps)
    for (found, state), wanted in zip(path, expected, strict=True):
        wanted = wanted if state.metrics["groups"] == 7 else sparsejax.apply_masks(wanted, state.masks)
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
    _, state = path[-1]
    assert state.metrics["cycles"] == cycles and state.metrics["groups"] == 4
    assert set(np.flatnonzero(state.redundant)) == chosen
    begins = int(state.hybrid)
    assert begins == 2 + 4 * cycles
    # the hybrid phase starts from the parameters that the first cycle started from, and ends at exactly zero
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), path[begins - 1][0], path[1][0]
    )
    for step, (found, _) in enumerate(path):
        assert silent(found) == (chosen if step >= begins + 4 else set())


def test_the_cycles_matter():
    """More than one is run, so that the retelling has tested the sets of later ones too."""
    assert max(retell(tree(seed), 3, 2, 4, 5, 10, 48)[1] for seed in range(3)) > 1


def quadratic(params):
    """A loss in which the first layer weighs ten times as much."""
    return 10 * squares(params)[:3].sum() + squares(params)[3:].sum()


def test_probes_measure_the_loss_without_a_share_of_a_layer():
    params = tree(0)
    tx = sparsejax.cric(
        optax.sgd(RATE), groups=GROUPS, sparsity=0.45, begin=1, sampling_steps=2, hybrid_steps=2, max_cycles=1
    )
    probes = 2 * len(TRIALS) * 2
    path = run(tx, params, 1 + probes + 4, quadratic)
    x0, _ = path[0]
    for index in range(1, probes, 2):  # steps 1, 2: the first hides groups, the second returns to x0
        hidden, _ = path[index]
        back, _ = path[index + 1]
        layer, trial = (index - 1) // 6, (index - 1) // 2 % 3
        scores = saliency(GROUPS, x0, jax.tree.map(lambda g: -g, gradients(index)))
        share = max(1, int(len(LAYERS[layer]) * TRIALS[trial]))
        assert silent(hidden) == set(sorted(LAYERS[layer], key=lambda i: scores[i])[:share])
        chex.assert_trees_all_close(back, x0, rtol=1e-6, atol=1e-7)
    _, state = path[probes]
    np.testing.assert_allclose(state.reference, 6 * quadratic(x0), rtol=1e-5)
    losses = [[quadratic(path[1 + 6 * layer + 2 * trial][0]) for trial in range(3)] for layer in range(2)]
    np.testing.assert_allclose(state.losses, np.sum(losses, 1), rtol=1e-5)


def test_the_loss_ratio_spares_the_layer_that_it_hurts():
    """With a large weight the probes alone decide: whole layers are ranked by (loss ratio) / C."""
    params = tree(0)
    tx = sparsejax.cric(
        optax.sgd(0.0),
        groups=GROUPS,
        sparsity=0.3,
        sampling_steps=2,
        hybrid_steps=2,
        max_cycles=1,
        loss_weight=1e3,
    )

    def loss(params):
        return 1.0 + 100.0 * (squares(params)[3:] == 0).any()

    _, state = run(tx, params, 2 * 6 + 4, loss)[-1]
    assert state.redundant[:3].sum() == 2 and not state.redundant[3:].any()


@pytest.mark.parametrize(
    "kw, message",
    [
        ({"begin": -1}, "begin must be a step that is at least 0, got -1"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1, got 0"),
        ({"hybrid_steps": 0}, "hybrid_steps must be at least 1, got 0"),
        ({"max_cycles": 0}, "max_cycles must be at least 1, got 0"),
        (
            {"steps": 40},
            r"may need 41 steps \(16 before the first cycle, 10 cycles of 2, 5 to remove\), but there are 40",
        ),
        ({"sparsity": 0.9}, "at most 5 can go"),
    ],
)
def test_bad_arguments(kw, message):
    given = {"groups": GROUPS, "sparsity": 0.45, "begin": 4, "sampling_steps": 2, "hybrid_steps": 5}
    sparsejax.cric(optax.sgd(0.1), **given, steps=41)
    with pytest.raises(ValueError, match=message):
        sparsejax.cric(optax.sgd(0.1), **{**given, **kw})


def test_probes_need_the_loss():
    params = tree(0)
    tx = sparsejax.cric(optax.sgd(0.1), groups=GROUPS, sparsity=0.45, sampling_steps=2, hybrid_steps=5)
    with pytest.raises(
        ValueError, match=r"cric with loss_weight=1.0 needs update\(grads, state, params, loss=loss\)"
    ):
        tx.update(gradients(0), tx.init(params), params)
