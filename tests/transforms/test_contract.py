"""The contract of all transforms, over the registry and over all patterns. A new method joins by registering
and by adding its schedule to `METHOD_KEYWORDS`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sparsejax
from sparsejax import masks as masks_lib
from sparsejax import structure
from sparsejax.patterns import NM, Group
from sparsejax.target import Target
from sparsejax.transforms import STRAIGHT_THROUGH

STEPS = 9
# 0.87 of no leaf's count is near an integer, where the last bit would decide how many are dropped.
DYNAMIC = {"update_every": 2, "update_end": 8, "drop_fraction": 0.87}
# Strong enough for the wgsef to leave half of the units or less, not so much that all go.
PROXIMAL_KEYWORDS = {"end": 6, "learning_rate": 0.1}
GROUPS = structure.Groups(
    structure.Layer(
        f"{name}/kernel",
        size,
        {f"{name}/{leaf}": structure.Slices(-1, np.arange(size)) for leaf in leaves},
        {f"{other}/kernel": structure.Slices(0, np.arange(size)) for other in fed},
    )
    for name, size, leaves, fed in (
        ("first", 12, ("kernel", "bias"), ("second", "third")),
        ("second", 16, ("kernel", "bias"), ()),
        ("third", 8, ("kernel",), ()),
    )
)
METHOD_KEYWORDS = {
    "adams": {"learning_rate": 1e-2, "steps": 6, "strength": 1e-2, "refresh_every": 2},
    "ast": {"learning_rate": 1e-2, "steps": 6, "refresh_every": 2},
    "bdwp": {},
    "cric": {
        "groups": GROUPS,
        "begin": 1,
        "sampling_steps": 2,
        "hybrid_steps": 3,
        "max_cycles": 2,
        "loss_weight": 0,
    },
    "dense": {},
    "fixed": {},
    "gradual": {"begin": 1, "end": 6, "update_every": 2},
    "hesso": {"groups": GROUPS, "begin": 1, "end": 6, "periods": 2},
    "group_lasso": {**PROXIMAL_KEYWORDS, "strength": 0.5},
    "mdgf": {"begin": 1, "end": 6, "beta": 0.3},
    "nuclear": {**PROXIMAL_KEYWORDS, "strength": 0.5, "sparsity": 0.5, "update_every": 2},
    "one_shot": {"at": 3, "allocation": "uniform"},
    "prox_l0": {"end": 6},
    "prox_l1": {**PROXIMAL_KEYWORDS, "strength": 0.5},
    "rigl": DYNAMIC,
    "sdgf": {"begin": 1, "end": 6},
    "set_": DYNAMIC,
    "snfs": DYNAMIC,
    "sr_ste": {"decay": 0.1},
    "ssvi": {"train_size": 100, **DYNAMIC},
    "ste": {},
    "turbo_vbi": {"train_size": 100, "end": 6, "update_every": 2, "allocation": "uniform"},
    "wgsef": {**PROXIMAL_KEYWORDS, "strength": 1.0},
}
# Their masks are the units that are nonzero now, which may come and go before `end` makes their number exact.
PROXIMAL = {"group_lasso", "prox_l0", "prox_l1", "wgsef"}
MASKLESS = {"dense", "nuclear"}  # methods without zeros, whose masks are dense
ATOL = {"nuclear": 1e-5}  # truncation at a rank magnifies rounding by the gap between singular values
ACROSS_LEAVES = {"cric", "hesso"}  # methods that remove groups of slices of several leaves: of GROUPS, half
SOFT = {"mdgf"}  # methods whose masks are float32 in [0, 1] on the way to the final ones, of zeros and ones
NM_ONLY = {"bdwp", "sdgf"}  # methods that take no other pattern
LABELS = {"first/kernel": Group(np.arange(8)[:, None] // 2), "*": Group(np.arange(12)[:, None] // 3)}
PATTERNS = {
    "unstructured": ("unstructured", 0.8),
    "nm": ("2:4", 0.5),
    "block": ("block:2x3", 0.6),
    "channel": ("channel", 0.5),
    "group": (LABELS, 0.5),
}
SPARSE = [name for name in METHOD_KEYWORDS if name not in MASKLESS]
# One method of each kind is in the fast part of the tests; the whole suite has all.
FAST = {"adams", "dense", "gradual", "hesso", "rigl", "sr_ste", "ssvi", "wgsef"}


def all_of(methods):
    """The methods as parameters, marked slow unless they are among the fast ones."""
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in methods]


def test_every_method_is_under_contract():
    assert set(METHOD_KEYWORDS) == set(sparsejax.transforms.METHODS) <= set(sparsejax.flops.TRAINING)


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (8, 12)), "bias": jnp.zeros(12)},
        "second": {"kernel": jax.random.normal(keys[1], (12, 16)), "bias": jnp.ones(16)},
        "third": {"kernel": jax.random.normal(keys[2], (12, 8))},
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def make_grads(params, step):
    """Gradients that do not depend on the parameters, so that no rounding of theirs can feed back into masks."""
    key = jax.random.fold_in(jax.random.key(1), step)

    def draw(name, leaf):
        return jax.random.normal(jax.random.fold_in(key, len(name)), leaf.shape).astype(leaf.dtype)

    return masks_lib.map_with_name(draw, params)


def build(method, pattern="unstructured", inner=None, **kwargs):
    target = {}
    if method not in MASKLESS:
        pattern, sparsity = PATTERNS["nm" if method in NM_ONLY else pattern]
        target = {"pattern": pattern, "sparsity": sparsity}
    if method in ACROSS_LEAVES:
        target = {"sparsity": 0.5}
    inner = optax.adamw(1e-2) if inner is None else inner
    return sparsejax.transforms.build(method, inner, **{**METHOD_KEYWORDS[method], **target, **kwargs})


def train(tx, params, steps=STEPS, jit=True):
    """Yields (params, state) after every step."""

    def step(params, state, index):
        updates, state = tx.update(make_grads(params, index), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for index in range(steps):
        params, state = step(params, state, index)
        yield params, state


def last(run):
    *_, final = run
    return final


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", all_of(SPARSE))
def test_masks_on_every_pattern(method, pattern):
    if method in NM_ONLY and pattern != "nm":
        pytest.skip("takes N:M patterns only")
    if method in ACROSS_LEAVES and pattern != "channel":
        pytest.skip("its groups are its only pattern")
    run = list(train(build(method, pattern), make_params()))
    for params, state in run:
        check_masks(method, params, sparsejax.get_masks(state))
    check_units(method, pattern, sparsejax.get_masks(run[-1][1]))
    check_changes(method, [sparsejax.get_masks(state) for _, state in run])


def check_masks(method, params, masks):
    """Of the parameters' structure and shapes, and zeros outside unless the method keeps dense weights."""
    chex.assert_trees_all_equal_structs(masks, params)
    for param, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        soft = method in SOFT and mask.ndim
        assert mask.dtype == (np.float32 if soft else bool) and mask.shape in ((), param.shape)
        if mask.ndim and method not in STRAIGHT_THROUGH:
            assert not np.asarray(param, np.float32)[~np.asarray(mask)].any()


def check_units(method, pattern, masks):
    """The masks obey the pattern and keep exactly the target's number of units in every leaf."""
    if method in ACROSS_LEAVES:
        kept = GROUPS.sums(jax.tree.map(lambda m, p: m | jnp.zeros(p.shape, bool), masks, make_params())) > 0
        assert kept.sum() == GROUPS.count // 2
        return chex.assert_trees_all_equal(masks, GROUPS.masks(make_params(), kept))
    rule, sparsity = PATTERNS[pattern]
    uniform = method in {"gradual", "one_shot", "turbo_vbi", *PROXIMAL}
    allocation = "uniform" if uniform else "erk"
    target = Target(sparsity=sparsity, pattern=rule, allocation=allocation)
    leaves, kept = masks_lib.flatten(masks), {}
    for name, unit_pattern in target.patterns(make_params()).items():
        units = unit_pattern.reduce(leaves[name])
        np.testing.assert_array_equal(unit_pattern.expand(units, leaves[name].shape), leaves[name])
        if isinstance(unit_pattern, NM):
            assert (np.asarray(leaves[name]).reshape(-1, 4, leaves[name].shape[1]).sum(1) == 2).all()
        kept[name] = int(units.sum())
    moves_between_leaves = method == "snfs" and pattern == "unstructured"
    expected = target.counts(make_params())
    assert sum(kept.values()) == sum(expected.values()) if moves_between_leaves else kept == expected


def check_changes(method, masks):
    moves = [sparsejax.churn(old, new) > 0 for old, new in zip(masks, masks[1:], strict=False)]
    if method in STRAIGHT_THROUGH:
        assert sparsejax.sparsity(masks[-1]) > 0
    elif method in PROXIMAL:
        assert not any(moves[PROXIMAL_KEYWORDS["end"] :])
    elif method in ("set_", "rigl", "snfs", "ssvi"):
        assert any(moves) and not any(moves[DYNAMIC["update_end"] - 1 :])
    else:
        assert not any(moves), "nothing may grow"
        assert (sparsejax.sparsity(masks[0]) != sparsejax.sparsity(masks[-1])) == (method != "fixed")


@pytest.mark.parametrize("method", all_of(METHOD_KEYWORDS))
class TestContract:
    @pytest.mark.slow
    def test_jit_equals_no_jit(self, method):
        # not Adam: its first step moves all grown weights by the same amount, and the last bit would rank them
        tx = build(method, inner=optax.sgd(0.1, momentum=0.9))
        jitted, plain = (last(train(tx, make_params(), jit=jit)) for jit in (True, False))
        chex.assert_trees_all_equal(sparsejax.get_masks(jitted[1]), sparsejax.get_masks(plain[1]))
        chex.assert_trees_all_close(jitted[0], plain[0], rtol=1e-5, atol=ATOL.get(method, 1e-6))

    def test_scan_equals_loop(self, method):
        tx, params = build(method, inner=optax.sgd(0.1, momentum=0.9)), make_params()

        def body(carry, index):
            params, state = carry
            updates, state = tx.update(make_grads(params, index), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, jax.tree.map(jnp.asarray, tx.init(params)))
        (scanned, state), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(STEPS)))(carry)
        looped, loop_state = last(train(tx, params))
        chex.assert_trees_all_equal(sparsejax.get_masks(state), sparsejax.get_masks(loop_state))
        chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=ATOL.get(method, 1e-6))

    @pytest.mark.parametrize(
        "inner",
        [optax.adamw(1e-2), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))],
    )
    def test_sparsity_zero_is_the_inner_optimizer_bit_for_bit(self, method, inner):
        kwargs = {} if method == "dense" else {"sparsity": 0.0}
        sparse, _ = last(train(build(method, inner=inner, **kwargs), make_params()))
        plain, _ = last(train(inner, make_params()))
        chex.assert_trees_all_equal(sparse, plain)

    def test_bfloat16(self, method):
        for params, state in train(build(method), make_params(jnp.bfloat16)):
            assert all(param.dtype == jnp.bfloat16 for param in jax.tree.leaves(params))
            check_masks(method, params, sparsejax.get_masks(state))

    def test_the_state_can_be_donated(self, method):
        tx, params = build(method), make_params()
        state = tx.init(params)
        step = jax.jit(tx.update, donate_argnums=1)
        for index in range(3):
            _, state = step(make_grads(params, index), state, params)
        assert int(state.count) == 3

    def test_checkpoint_round_trip(self, method, tmp_path):
        tx = build(method)
        _, state = last(train(tx, make_params()))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
        chex.assert_trees_all_equal(restored, state)

    def test_extra_arguments_reach_the_inner_optimizer(self, method):
        def update(updates, state, params=None, *, scale, **_):
            del params
            return jax.tree.map(lambda g: -scale * g, updates), state

        inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        tx, params = build(method, inner=inner), make_params()
        updates, _ = tx.update(make_grads(params, 0), tx.init(params), params, scale=2.0)
        np.testing.assert_array_equal(updates["first"]["bias"], -2.0 * make_grads(params, 0)["first"]["bias"])


INNER = {
    "adam": optax.adam(1e-2),
    "lion": optax.lion(1e-2),
    "rmsprop": optax.rmsprop(1e-2, initial_scale=0.5, momentum=0.9),
    "adagrad": optax.adagrad(1e-2, initial_accumulator_value=0.25),
    "adafactor": optax.adafactor(1e-2, momentum=0.9, min_dim_size_to_factor=4),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(1e-2),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.add_decayed_weights(0.1)),
    "multi_transform": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)},
        {
            "first": {"kernel": "a", "bias": "b"},
            "second": {"kernel": "b", "bias": "a"},
            "third": {"kernel": "a"},
        },
    ),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("method", all_of(["rigl", "set_"]))
def test_state_outside_the_masks_is_fresh_for_any_inner_optimizer(method, name):
    """After every step, each per-weight entry of the inner state outside the step's masks is what `init` gives,
    updated by a zero gradient; so a grown weight finds the state of a new one."""
    inner = INNER[name]
    tx = build(method, inner=inner)
    run = list(train(tx, make_params()))
    survived_moments = 0
    zeros = jax.tree.map(jnp.zeros_like, make_params())
    _, fresh = inner.update(zeros, inner.init(zeros), zeros)
    fresh = jax.tree_util.tree_leaves_with_path(fresh)
    for (_, before), (_, state) in zip(run, run[1:], strict=False):
        masks = masks_lib.flatten(before.masks)
        values = jax.tree_util.tree_leaves_with_path(state.inner_state)
        for (path, value), (_, initial) in zip(values, fresh, strict=True):
            name_of_leaf = masks_lib.path_name(path)
            for leaf, mask in masks.items():
                if mask.ndim and name_of_leaf.endswith(leaf) and value.shape == mask.shape:
                    gone = ~np.asarray(mask)
                    np.testing.assert_array_equal(np.asarray(value)[gone], np.asarray(initial)[gone])
                    survived_moments += int((np.asarray(value)[~gone] != np.asarray(initial)[~gone]).sum())
    assert survived_moments > 0


@pytest.mark.parametrize("method", ["set_", "rigl", "snfs", "ssvi"])
def test_grown_weights_start_at_zero(method):
    run = list(train(build(method), make_params()))
    grown = 0
    for (_, before), (params, state) in zip(run, run[1:], strict=False):
        for old, new, param in zip(*map(jax.tree.leaves, (before.masks, state.masks, params)), strict=True):
            if new.ndim:
                fresh = np.asarray(new & ~old)
                grown += fresh.sum()
                assert not np.asarray(param)[fresh].any()
    assert grown > 0
