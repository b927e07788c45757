"""Pruning in one call: exact counts, numpy as the oracle, and the layer collapse that SynFlow avoids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import pruning, scores
from sparsejax.masks import apply_masks, densities, flatten, is_sparsified, sparsity
from sparsejax.patterns import Block, Channel

SIZES = (20, 24, 16, 8)


def network(sizes=SIZES, seed=0):
    """Parameters of a ReLU chain with zero biases, He initialisation."""
    random = np.random.default_rng(seed)
    return {
        f"dense_{i}": {
            "kernel": jnp.asarray(random.normal(size=(m, n)) * np.sqrt(2 / m), jnp.float32),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def forward(params, x):
    for i in range(len(params)):
        layer = params[f"dense_{i}"]
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x


def loss_on(inputs, classes):
    random = np.random.default_rng(7)
    x = jnp.asarray(random.normal(size=(64, inputs)), jnp.float32)
    y = jnp.asarray(random.integers(classes, size=64))
    return lambda params: -jnp.mean(jax.nn.log_softmax(forward(params, x))[jnp.arange(64), y])


def kept(masks):
    return {name: int(mask.sum()) for name, mask in flatten(masks).items() if is_sparsified(mask)}


def total(params):
    return sum(leaf.size for name, leaf in flatten(params).items() if name.endswith("kernel"))


def test_global_pruning_is_numpys_partition():
    params = network()
    masks = pruning.prune(scores.magnitude(params), 0.9)
    kernels = {name: np.abs(leaf) for name, leaf in flatten(params).items() if name.endswith("kernel")}
    flat = np.concatenate([leaf.ravel() for leaf in kernels.values()])
    count = round(0.1 * flat.size)
    threshold = np.partition(flat, -count)[-count]
    for name, mask in flatten(masks).items():
        if name.endswith("bias"):
            assert mask.shape == () and bool(mask)
        else:
            np.testing.assert_array_equal(mask, kernels[name] >= threshold)
    assert jax.tree.structure(masks) == jax.tree.structure(params)


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0.01, 0.99),
    st.sampled_from(["global", "lamp", "uniform", "erk", "erdos_renyi"]),
    st.booleans(),
)
def test_counts_are_exact_also_with_ties(asked, allocation, tied):
    params = jax.tree.map(jnp.ones_like, network()) if tied else network()
    masks = pruning.prune(scores.magnitude(params), asked, allocation=allocation)
    assert sum(kept(masks).values()) == round((1 - asked) * total(params))


def test_explicit_mapping_include_and_exclude():
    params = network()
    masks = pruning.prune(scores.magnitude(params), None, allocation={"dense_0/*": 0.75, "*": 0.5})
    assert densities(masks) == {"dense_0/kernel": 0.25, "dense_1/kernel": 0.5, "dense_2/kernel": 0.5}
    masks = pruning.prune(scores.magnitude(params), 0.5, exclude="dense_1/*")
    assert list(kept(masks)) == ["dense_0/kernel", "dense_2/kernel"]
    assert sparsity(masks) == pytest.approx(0.5)


def test_blocks_and_channels_are_kept_whole():
    params = network()
    masks = pruning.prune(scores.magnitude(params), 0.5, pattern="block:4x4")
    for name, mask in flatten(masks).items():
        if is_sparsified(mask):
            blocks = np.asarray(mask).reshape(mask.shape[0] // 4, 4, mask.shape[1] // 4, 4).sum((1, 3))
            assert set(np.unique(blocks)) <= {0, 16}, name
    assert abs(sum(kept(masks).values()) - 0.5 * total(params)) <= 8
    masks = pruning.prune(scores.magnitude(params), 0.5, pattern=Channel())
    assert all(set(np.unique(np.asarray(m).mean(0))) <= {0, 1} for m in jax.tree.leaves(masks) if m.ndim)
    assert abs(sum(kept(masks).values()) - 0.5 * total(params)) <= max(SIZES) / 2


def test_global_blocks_are_chosen_by_their_pooled_scores():
    params = network()
    masks = pruning.prune(scores.magnitude(params), 0.75, pattern=Block((4, 4), "sum"))
    pooled = {
        name: np.abs(leaf).reshape(leaf.shape[0] // 4, 4, leaf.shape[1] // 4, 4).sum((1, 3))
        for name, leaf in flatten(params).items()
        if name.endswith("kernel")
    }
    flat = np.sort(np.concatenate([leaf.ravel() for leaf in pooled.values()]))[::-1]
    threshold = flat[round(flat.size * 0.25) - 1]
    for name, blocks in pooled.items():
        np.testing.assert_array_equal(np.asarray(flatten(masks)[name])[::4, ::4], blocks >= threshold)


def test_nm_decides_the_count():
    params = network()
    for asked in (0.5, None):
        masks = pruning.prune(scores.magnitude(params), asked, pattern="2:4")
        for mask in jax.tree.leaves(masks):
            if mask.ndim:
                assert np.all(np.asarray(mask).reshape(-1, 4, mask.shape[1]).sum(1) == 2)


ARGUMENTS = {
    "random": lambda: {"key": jax.random.key(0)},
    "magnitude": dict,
    "snip": lambda: {"loss": loss_on(SIZES[0], SIZES[-1])},
    "grasp": lambda: {"loss": loss_on(SIZES[0], SIZES[-1])},
    "synflow": lambda: {"forward": forward, "input_shape": (1, SIZES[0]), "rounds": 10},
}


@pytest.mark.parametrize("name", sorted(pruning.AT_INIT))
def test_at_init_meets_the_contract(name):
    params = network()
    masks = pruning.at_init(name, params, 0.8, **ARGUMENTS[name]())
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert sum(kept(masks).values()) == round((1 - 0.8) * total(params))
    masks = pruning.at_init(name, params, 0.8, allocation="erk", **ARGUMENTS[name]())
    assert sum(kept(masks).values()) == round((1 - 0.8) * total(params))
    blocks = pruning.at_init(name, params, 0.5, pattern="2:4", **ARGUMENTS[name]())
    assert sparsity(blocks) == 0.5
    dense = pruning.at_init(name, params, 0.0, **ARGUMENTS[name]())
    assert all(bool(jnp.all(mask)) for mask in jax.tree.leaves(dense))


def test_one_round_of_snip_is_prune_of_its_scores():
    params, loss = network(), loss_on(SIZES[0], SIZES[-1])
    one = pruning.at_init("snip", params, 0.9, loss=loss)
    two = pruning.prune(scores.snip(params, loss), 0.9)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, two))


def test_synflow_rounds_are_those_of_the_paper():
    """Against the paper's loop in numpy, on a chain where the score has a closed form."""
    params = network()
    weights = [np.abs(np.asarray(params[f"dense_{i}"]["kernel"], np.float64)) for i in range(3)]
    size = sum(w.size for w in weights)
    for done in range(1, 21):
        states = [np.ones(SIZES[0])]
        for w in weights:
            states.append(states[-1] @ w)
        back, flow = np.ones(SIZES[-1]), [None] * 3
        for i in reversed(range(3)):
            flow[i] = weights[i] * np.outer(states[i], back)
            back = weights[i] @ back
        flat = np.concatenate([f.ravel() for f in flow])
        count = round((1 / 16) ** (done / 20) * size)
        threshold = np.partition(flat, -count)[-count]
        weights = [np.where(f >= threshold, w, 0) for f, w in zip(flow, weights, strict=True)]
    masks = pruning.at_init("synflow", params, 15 / 16, forward=forward, input_shape=(1, SIZES[0]), rounds=20)
    for i, weight in enumerate(weights):
        np.testing.assert_array_equal(masks[f"dense_{i}"]["kernel"], weight > 0)


def test_rounds_are_nested():
    """Stopping after r of n rounds is the same loop with the r-th density as its target."""
    params = network()
    arguments = {"forward": forward, "input_shape": (1, SIZES[0])}
    early = pruning.at_init("synflow", params, 1 - 0.1**0.5, rounds=5, **arguments)
    late = pruning.at_init("synflow", params, 0.9, rounds=10, **arguments)
    inside = jax.tree.map(lambda a, b: bool(jnp.all(~b | a)), early, late)
    assert jax.tree.all(inside) and sparsity(early) < sparsity(late)


@pytest.mark.slow
def test_synflow_does_not_collapse_where_one_shot_scores_do():
    """A six-layer MLP at compression 10^3 (Tanaka et al. 2020, figure 1)."""
    params = network((64, 100, 100, 100, 100, 100, 10))
    arguments = {"loss": loss_on(64, 10), "forward": forward, "input_shape": (1, 64)}

    def paths(masks):
        positive = jax.tree.map(jnp.abs, apply_masks(params, masks))
        return float(forward(positive, jnp.ones((1, 64))).sum())

    names = ("synflow", "snip", "magnitude")
    masks = {name: pruning.at_init(name, params, 0.999, **arguments) for name in names}
    count = {name: list(kept(found).values()) for name, found in masks.items()}
    assert all(sum(counts) == round(0.001 * total(params)) for counts in count.values())
    assert min(count["synflow"]) > 0 and paths(masks["synflow"]) > 0
    assert min(count["snip"]) == 0  # a whole layer is gone
    assert paths(masks["magnitude"]) == 0.0  # no path from input to output is left


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: pruning.prune(p, 1.2), r"sparsity must be in \[0, 1\), got 1.2"),
        (lambda p: pruning.prune(p, None), r"sparsity must be in \[0, 1\), got None"),
        (lambda p: pruning.prune(p, 0.9, allocation="ekr"), "unknown allocation 'ekr'; did you mean 'erk'"),
        (lambda p: pruning.prune(p, 0.9, pattern="2:4"), "2:4 has sparsity 0.5, got sparsity=0.9"),
        (lambda p: pruning.prune(p, None, pattern="3:32"), r"dense_0/kernel .*divisible by 32.* \(20, 24\)"),
        (lambda p: pruning.prune(p, 0.9, include="*kernels"), "select no parameter"),
        (lambda p: pruning.prune(jax.tree.map(lambda x: x * jnp.nan, p), 0.9), "contains NaN"),
        (lambda p: pruning.at_init("snips", p, 0.9), "unknown score at init.* 'snips'; did you mean 'snip'"),
        (lambda p: pruning.at_init("snip", p, 0.9), "by 'snip' at initialisation needs loss=..., got None"),
        (lambda p: pruning.at_init("grasp", p, 0.9), "by 'grasp' at initialisation needs loss="),
        (lambda p: pruning.at_init("synflow", p, 0.9), "by 'synflow' at initialisation needs forward="),
        (lambda p: pruning.at_init("synflow", p, 0.9, forward=forward), "'synflow' at .* needs input_shape="),
        (lambda p: pruning.at_init("random", p, 0.9), "by 'random' at initialisation needs key="),
        (lambda p: pruning.at_init("magnitude", p, 0.9, rounds=0), "rounds must be at least 1, got 0"),
        (lambda p: pruning.at_init("magnitude", p, -0.1), r"sparsity must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(network())
