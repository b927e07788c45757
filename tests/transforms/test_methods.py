"""Each method against its own equations: hand-written cases, enumeration, and limiting cases."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import topology
from sparsejax.patterns import NM, Unstructured
from sparsejax.transforms.snfs import divide


def flat(values):
    return jnp.asarray(values, jnp.float32)[None, :]


def at(state, count, masks=None):
    """A state as if `count` steps had been taken, with these masks."""
    state = state._replace(count=jnp.asarray(count, jnp.int32))
    return state if masks is None else state._replace(masks=masks)


# --- RigL --------------------------------------------------------------------------------------------


def test_rigl_on_six_weights_by_hand():
    """Kept are 0, 1, 2; the fraction 0.67 replaces two: |w| drops 1 and 2, |g| grows 2 (back) and 4."""
    params = {"kernel": flat([3.0, 0.1, 0.2, 0.0, 0.0, 0.0])}
    grads = {"kernel": flat([0.0, 1.0, 8.0, 2.0, -7.0, 3.0])}
    masks = {"kernel": jnp.asarray([[True, True, True, False, False, False]])}
    tx = sparsejax.rigl(optax.trace(0.9), sparsity=0.5, update_every=1, drop_fraction=0.67)
    state = at(tx.init(params), 1, masks)
    state = state._replace(inner_state=jax.tree.map(jnp.ones_like, state.inner_state))
    updates, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(state.masks["kernel"], [[True, False, True, False, True, False]])
    new = optax.apply_updates(params, updates)["kernel"]
    # the returned weight 2 kept its value and took its step, the new weight 4 starts at zero
    np.testing.assert_allclose(new, flat([3.0 + 0.9, 0.0, 0.2 + 8.9, 0.0, 0.0, 0.0]), rtol=1e-6)
    # momentum outside the masks is fresh; that of the dropped weight 1 is so from the next step on
    np.testing.assert_allclose(state.inner_state.trace["kernel"], flat([0.9, 1.9, 8.9, 0, 0, 0]), rtol=1e-6)
    _, later = tx.update(jax.tree.map(jnp.zeros_like, grads), at(state, 0), params)
    np.testing.assert_allclose(later.inner_state.trace["kernel"], flat([0.81, 0, 8.01, 0, 0, 0]), rtol=1e-6)
    np.testing.assert_array_equal(
        state.fired["kernel"],
        state.masks["kernel"] | np.asarray(masks["kernel"]) | np.asarray(state.fired["kernel"]),
    )


@pytest.mark.parametrize("seed", range(5))
def test_rigl_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    weights, grads = rng.normal(size=(2, 12))
    mask = rng.permutation(12) < 6
    new = topology.drop_and_grow(Unstructured(), jnp.asarray(mask), jnp.abs(weights), jnp.abs(grads), 0.5)
    best = max(
        itertools.combinations(np.flatnonzero(mask), 3), key=lambda kept: np.abs(weights[list(kept)]).sum()
    )
    rest = [i for i in range(12) if i not in best]
    grown = max(itertools.combinations(rest, 3), key=lambda new: np.abs(grads[list(new)]).sum())
    assert set(np.flatnonzero(new)) == {*best, *grown}


def test_rigl_grows_the_weight_that_lowers_the_loss_most():
    """First order: of all single growths, a small step along -g on the chosen one decreases the loss most."""
    key = jax.random.key(0)
    weights, inputs = jax.random.normal(key, (4, 5)), jax.random.normal(jax.random.key(1), (16, 4))
    targets = jax.random.normal(jax.random.key(2), (16, 5))
    mask = jax.random.permutation(key, jnp.arange(20)).reshape(4, 5) < 8

    def loss(weights):
        return jnp.mean(jnp.square(inputs @ weights - targets))

    grads = jax.grad(loss)(weights * mask)
    new = topology.drop_and_grow(Unstructured(), mask, jnp.abs(weights), jnp.abs(grads), 1 / 8)
    kept = topology.drop(mask, jnp.abs(weights), 1 / 8)
    chosen = np.argwhere(new & ~kept)[0]
    after = {
        tuple(i): float(loss(weights * mask - 1e-3 * jnp.sign(grads) * jnp.zeros((4, 5)).at[tuple(i)].set(1)))
        for i in np.argwhere(~kept)
    }
    assert min(after, key=after.get) == tuple(chosen)


def test_rigl_follows_its_period_and_its_end():
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 20))}
    tx = sparsejax.rigl(optax.sgd(0.0), sparsity=0.5, update_every=3, update_end=10)
    state, moved, update = tx.init(params), [], jax.jit(tx.update)
    for step in range(14):
        grads = {"kernel": jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (20, 20))}
        _, new = update(grads, state, params)
        moved += [step] if sparsejax.churn(state.masks, new.masks) else []
        state = new
    assert moved == [3, 6, 9]


def test_rigl_on_nm_moves_weights_within_their_groups():
    scores = jax.random.uniform(jax.random.key(0), (2, 16, 3))
    mask = NM(2, 4).mask(scores[0])
    new = topology.drop_and_grow(NM(2, 4), mask, scores[0], scores[1], 0.5)
    assert (np.asarray(new).reshape(4, 4, 3).sum(1) == 2).all() and bool((new != mask).any())


# --- SET ---------------------------------------------------------------------------------------------


def test_set_drops_the_smallest_and_grows_uniformly():
    params = {"kernel": flat(np.r_[np.arange(1, 11), np.zeros(30)])}
    masks = {"kernel": jnp.asarray(np.arange(40) < 10)[None, :]}
    grads, counts = jax.tree.map(jnp.zeros_like, params), np.zeros(40)
    tx = sparsejax.set_(optax.sgd(0.0), sparsity=0.75, update_every=1, drop_fraction=0.5)
    step = jax.jit(tx.update)
    for count in range(1, 1001):
        _, state = step(grads, at(tx.init(params), count, masks), params)
        new = np.asarray(state.masks["kernel"])[0]
        assert new.sum() == 10 and new[5:10].all()
        counts += new
    # 5 of the 35 others grow each time: 1000 draws have mean 142.9 and standard deviation 11.1
    others = np.delete(counts, np.arange(5, 10))
    assert abs(others.mean() - 1000 / 7) < 1e-9 and np.abs(others - 1000 / 7).max() < 5 * 11.1


def test_set_without_drops_is_static_training_bit_for_bit():
    """The products of the learning rate 1/2 are exact, so that fused multiply-adds cannot tell the programs apart."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (30, 20))}
    moving = sparsejax.set_(optax.sgd(0.5), sparsity=0.8, update_every=1, drop_fraction=0.0)
    state = moving.init(params)
    static = sparsejax.fixed(optax.sgd(0.5), masks=state.masks)
    other, first, second = static.init(params), params, params
    move, stay = jax.jit(moving.update), jax.jit(static.update)
    for step in range(5):
        grads = {"kernel": jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (30, 20))}
        updates, state = move(grads, state, first)
        first = optax.apply_updates(first, updates)
        updates, other = stay(grads, other, second)
        second = optax.apply_updates(second, updates)
    chex.assert_trees_all_equal(first, second)


def test_set_unfired_first_explores_everything_before_repeating():
    params = {"kernel": jnp.ones((10, 10))}
    tx = sparsejax.set_(optax.sgd(0.0), sparsity=0.9, update_every=1, drop_fraction=1.0, unfired_first=True)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(10):
        assert sparsejax.exploration_rate(state) == pytest.approx(0.1 * max(1, step))
        _, state = update(params, state, params)


def test_exploration_rate_starts_at_the_density_and_never_falls():
    params = {"kernel": jax.random.normal(jax.random.key(0), (30, 20))}
    tx = sparsejax.set_(optax.sgd(0.1), sparsity=0.8, update_every=1)
    state, rates, update = tx.init(params), [], jax.jit(tx.update)
    for step in range(30):
        rates.append(sparsejax.exploration_rate(state))
        _, state = update({"kernel": params["kernel"] * step}, state, params)
    assert rates[0] == pytest.approx(0.2) and rates[-1] <= 1 and rates == sorted(rates) and rates[-1] > 0.5


# --- SNFS --------------------------------------------------------------------------------------------


def test_snfs_without_momentum_and_redistribution_grows_like_rigl():
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 20)), "b": {"kernel": jnp.ones((4, 4))}}
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    keywords = {"sparsity": 0.7, "update_every": 1, "drop_fraction": 0.4, "seed": 3}
    rigl = sparsejax.rigl(optax.sgd(0.1), **keywords)
    snfs = sparsejax.snfs(optax.sgd(0.1), beta=0.0, redistribute=False, **keywords)
    results = [tx.update(grads, at(tx.init(params), 1), params)[1].masks for tx in (rigl, snfs)]
    chex.assert_trees_all_equal(*results)


def test_snfs_momentum_is_a_dense_average():
    params = {"kernel": jnp.ones((4, 4))}
    tx = sparsejax.snfs(optax.sgd(0.1), sparsity=0.5, beta=0.9)
    state = tx.init(params)
    for grad in (1.0, 2.0):
        _, state = tx.update({"kernel": jnp.full((4, 4), grad)}, state, params)
    np.testing.assert_allclose(state.momentum["kernel"], 0.9 * 0.1 + 0.1 * 2.0, rtol=1e-6)


def test_snfs_moves_weights_to_the_leaf_with_more_momentum():
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (20, 20))} for i, name in enumerate("ab")}
    tx = sparsejax.snfs(optax.sgd(0.1), sparsity=0.5, update_every=1, drop_fraction=0.5, allocation="uniform")
    grads = {"a": {"kernel": jnp.full((20, 20), 3.0)}, "b": {"kernel": jnp.full((20, 20), 1.0)}}
    _, state = tx.update(grads, at(tx.init(params), 1), params)
    counts = {name: int(state.masks[name]["kernel"].sum()) for name in "ab"}
    assert counts == {"a": 100 + 150, "b": 100 + 50}  # 200 dropped, divided 3 to 1


@pytest.mark.parametrize(
    ("dropped", "room", "share", "expected"),
    [
        ([4, 4], [100, 100], [3.0, 1.0], [6, 2]),
        ([4, 4], [5, 100], [3.0, 1.0], [5, 3]),  # what is full spills over
        ([4, 4], [100, 100], [0.0, 0.0], [4, 4]),
        ([5, 5, 5], [2, 2, 20], [9.0, 9.0, 1e-3], [2, 2, 11]),
        ([1, 0], [100, 100], [1.0, 1.0], [1, 0]),  # what rounding leaves goes to the first with room
    ],
)
def test_division_of_the_dropped_weights(dropped, room, share, expected):
    np.testing.assert_array_equal(divide(*map(jnp.asarray, (dropped, room, share))), expected)


# --- the inner state ---------------------------------------------------------------------------------


def test_a_dense_leaf_is_not_taken_for_one_with_a_shorter_path():
    """`block/dense/kernel` ends with the path of the sparsified `dense/kernel`, but its moments are its own."""
    params = {"dense": {"kernel": jnp.ones((4, 4))}, "block": {"dense": {"kernel": jnp.ones((4, 4))}}}
    tx = sparsejax.fixed(optax.sgd(0.1, momentum=0.9), sparsity=0.75, exclude="block/*")
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
    assert not state.masks["dense"]["kernel"].all()
    np.testing.assert_allclose(updates["block"]["dense"]["kernel"], -0.1 * (1 + 0.9 + 0.81), rtol=1e-6)


# --- gradual and one-shot ----------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", "lamp", {"a/*": 0.9, "*": 0.5}])
def test_gradual_masks_are_nested_and_end_exactly(allocation):
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(i), (20, 15 * i + 5))}
        for i, name in enumerate("ab")
    }
    tx = sparsejax.gradual(
        optax.sgd(0.1), sparsity=0.8, begin=2, end=17, update_every=6, allocation=allocation
    )
    state, reached, update = tx.init(params), [], jax.jit(tx.update)
    for step in range(20):
        grads = jax.tree.map(lambda leaf, step=step: jnp.cos(step + leaf), params)
        updates, new = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert all(
            bool(jnp.all(old | ~mask))
            for old, mask in zip(*map(jax.tree.leaves, (state.masks, new.masks)), strict=True)
        )
        state = new
        reached.append(sparsejax.sparsity(state.masks))
    changes = [step for step in range(1, 20) if reached[step] != reached[step - 1]]
    assert changes == [8, 14, 17], "every 6 steps from step 2 (where nothing is pruned yet), and at the end"
    if allocation == {"a/*": 0.9, "*": 0.5}:
        assert sparsejax.densities(state.masks) == {"a/kernel": 0.1, "b/kernel": 0.5}
    else:
        assert reached[-1] == 0.8
        for step in changes:
            assert reached[step] == pytest.approx(
                0.8 * (1 - (1 - (step - 2) / 15) ** 3), abs=2 * 0.5 / 500 + 1e-6
            )  # each leaf rounds


def test_gradual_keeps_the_largest_magnitudes():
    params = {"kernel": jax.random.normal(jax.random.key(0), (30, 30))}
    tx = sparsejax.one_shot(optax.sgd(0.0), sparsity=0.9, at=0)
    _, state = tx.update(params, tx.init(params), params)
    threshold = np.sort(np.abs(params["kernel"]).ravel())[-90]
    np.testing.assert_array_equal(state.masks["kernel"], np.abs(params["kernel"]) >= threshold)


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda build: build("riggl"), "unknown method 'riggl'; did you mean 'rigl'? (known: adams, ast"),
        (lambda build: build("rigl", sparsty=0.9), "unknown keyword of method 'rigl' 'sparsty'; did you mean 'sparsity'?"),
        (lambda build: build("rigl", sparsity=1.2), "sparsity must be in [0, 1), got 1.2"),
        (lambda build: build("rigl"), "sparsity must be in [0, 1), got None"),
        (lambda build: build("gradual", sparsity=0.5), "method 'gradual': gradual() missing 1 required keyword-only argument: 'end'"),
        (lambda build: build("rigl", sparsity=0.5, allocation="ekr"), "unknown allocation 'ekr'; did you mean 'erk'?"),
        (lambda build: build("rigl", sparsity=0.9, pattern="2:4"), "2:4 has sparsity 0.5, got sparsity=0.9"),
        (lambda build: build("set_", sparsity=0.5, drop_fraction=1.5), "drop_fraction must be in [0, 1], got 1.5"),
        (lambda build: build("set_", sparsity=0.5, update_every=0), "the update period must be at least 1 step, got 0"),
        (lambda build: build("snfs", sparsity=0.5, beta=1.0), "beta must be in [0, 1), got 1.0"),
        (lambda build: build("one_shot", sparsity=0.5, at=-1), "the step of one-shot pruning must not be negative, got at=-1"),
        (lambda build: build("gradual", sparsity=0.5, end=9, score="magnitud"), "unknown score 'magnitud'; did you mean 'magnitude'?"),
        (lambda build: build("fixed", sparsity=0.5, masks={}), "fixed takes either masks or a target for random ones"),
        (lambda build: build("fixed", masks={"w": {"kernel": jnp.ones((6, 1), bool)}}).init({"w": {"kernel": jnp.ones((6, 4))}}),
         "the mask of w/kernel has shape (6, 1); it must be a scalar or of the parameter's shape (6, 4)"),
        (lambda build: build("fixed", masks={}).init({"w": {"kernel": jnp.ones((6, 4))}}),
         "masks and parameters must have the same leaves, but only one of them has 'w/kernel'"),
        (lambda build: build("fixed", pattern="2:4").init({"w": {"kernel": jnp.ones((6, 4))}}),
         "2:4 needs axis -2 of w/kernel to be divisible by 4, but its shape is (6, 4)"),
        (lambda build: build("fixed", sparsity=0.5, include="x*").init({"w": {"kernel": jnp.ones((6, 4))}}),
         "include=['x*'] and exclude=[] select no parameter with two or more axes (parameters: w/kernel)"),
        (lambda build: build("fixed", sparsity=0.5, pattern={"a*": "2:4"}).init({"w": {"kernel": jnp.ones((6, 4))}}),
         "no pattern rule matches 'w/kernel' (rules: a*)"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(lambda name, **kwargs: sparsejax.transforms.build(name, optax.sgd(0.1), **kwargs))
