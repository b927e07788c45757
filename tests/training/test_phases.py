"""Iterative magnitude pruning as phases: the oracles of the lottery-ticket papers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import training
from sparsejax.masks import get_masks, sparsity
from sparsejax.training.config import resolve
from sparsejax.training.phases import Phase, expand, full_masks, prune_remaining, shuffle_masks
from sparsejax.training.problem import load_problem
from sparsejax.training.session import Session

PARAMS = {
    "a": {"kernel": jnp.array([[5.0, -1.0], [2.0, -8.0]]), "bias": jnp.array([0.0, 0.0])},
    "b": {"kernel": jnp.array([[3.0, 4.0], [-6.0, 7.0]])},
}


def imp(tiny, **keywords):
    keywords = {"name": "imp", "rounds": 2, "prune_fraction": 0.5, **keywords}
    return tiny(method={"name": "dense"}, procedure=keywords, steps=20, checkpoint_every=8, eval_every=20)


def trained(session, index, carry):
    """The carry at the end of a phase, without logs."""
    phase = session.problem.phases[index]
    step = session.train_step(phase, carry.state)
    for batch in session.problem.batches(phase.steps, phase.start):
        carry = carry._replace(state=step(carry.state, batch))
        if int(carry.state.step) == phase.anchor:
            carry = session.remember(carry)
    return carry


def test_a_plain_run_is_one_phase(tiny):
    config = resolve(tiny())
    assert expand(config) == [Phase("train", config["method"], 60)]


def test_imp_is_round_zero_and_one_phase_per_round(tiny):
    phases = expand(resolve(imp(tiny, rounds=3, rewind_step=5, final_steps=50)))
    assert [phase.name for phase in phases] == ["round 0", "round 1", "round 2", "round 3"]
    assert [phase.steps for phase in phases] == [20, 20, 20, 50]
    assert [phase.start for phase in phases] == [0, 5, 5, 5]
    assert [phase.prune for phase in phases] == [0.0, 0.5, 0.5, 0.5]
    assert {phase.weights for phase in phases[1:]} == {"rewind"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rounds": 0}, "rounds must be a positive integer, got 0"),
        ({"control": "rewind"}, "unknown control of imp 'rewind'"),
        ({"scope": "layers"}, "unknown scope 'layers'; did you mean 'layer'"),
        ({"prune_fraction": 1.0}, r"must lie in \[0, 1\), got 1.0"),
        ({"rewind_step": 20}, r"the rewind step 20 must lie in \[0, 20\)"),
    ],
)
def test_mistakes_get_one_sentence(tiny, keywords, message):
    with pytest.raises(ValueError, match=message):
        expand(resolve(imp(tiny, **keywords)))


def test_imp_refuses_another_method(tiny):
    with pytest.raises(ValueError, match="set config.method.name to 'dense', not 'rigl'"):
        expand(resolve(tiny(procedure={"name": "imp", "rounds": 1})))


def test_pruning_takes_the_smallest_of_the_remaining():
    masks = full_masks(PARAMS)
    half = prune_remaining(PARAMS, masks, Phase("", None, 1, prune=0.5))
    np.testing.assert_array_equal(half["a"]["kernel"], [[True, False], [False, True]])
    np.testing.assert_array_equal(half["b"]["kernel"], [[False, False], [True, True]])
    assert half["a"]["bias"].ndim == 0
    quarter = prune_remaining(PARAMS, half, Phase("", None, 1, prune=0.5))
    np.testing.assert_array_equal(quarter["a"]["kernel"], [[False, False], [False, True]])
    np.testing.assert_array_equal(quarter["b"]["kernel"], [[False, False], [False, True]])


def test_pruning_per_layer_with_half_the_rate_on_the_last():
    phase = Phase("", None, 1, prune=0.5, scope="layer", halve_last=True)
    masks = prune_remaining(PARAMS, full_masks(PARAMS), phase)
    np.testing.assert_array_equal(masks["a"]["kernel"], [[True, False], [False, True]])
    np.testing.assert_array_equal(masks["b"]["kernel"], [[False, True], [True, True]])


def test_shuffled_masks_keep_the_counts_of_every_layer():
    masks = {"a": jnp.arange(100).reshape(10, 10) < 30, "b": jnp.asarray(True), "c": jnp.arange(100) < 30}
    shuffled = shuffle_masks(masks, jax.random.key(0))
    assert int(shuffled["a"].sum()) == int(shuffled["c"].sum()) == 30
    assert (shuffled["a"] != masks["a"]).any()
    assert (shuffled["a"].ravel() != shuffled["c"]).any()


def test_round_zero_is_dense_training(tiny, tmp_path):
    training.run(imp(tiny, rounds=1), tmp_path / "imp", progress=False)
    dense = tiny(method={"name": "dense"}, steps=20, checkpoint_every=0, eval_every=20)
    training.run(dense, tmp_path / "dense", progress=False)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("imp", "dense")]
    for ours, reference in zip(*lines, strict=False):
        ours, reference = json.loads(ours), json.loads(reference)
        assert {key: ours[key] for key in reference} == reference


def test_tickets_are_nested_and_rewound(tiny):
    session = Session(load_problem(resolve(imp(tiny, rewind_step=6)), None))
    first = trained(session, 0, session.start(0, None))
    assert int(first.anchor.opt_state.count) == 6
    second = session.start(1, first)
    masks = get_masks(second.state.opt_state)
    assert sparsity(masks) == pytest.approx(0.5, abs=1e-3)
    expected = jax.tree.map(lambda w, m: jnp.where(m, w, 0), first.anchor.params, masks)
    jax.tree.map(np.testing.assert_array_equal, second.state.params, expected)
    assert int(second.state.step) == int(second.state.opt_state.count) == 6
    masks = jax.device_get(masks)  # the next step donates them
    third = session.start(2, trained(session, 1, second))
    nested = jax.tree.map(
        lambda new, old: bool(np.all(old | ~np.asarray(new))), get_masks(third.state.opt_state), masks
    )
    assert all(jax.tree.leaves(nested))
    assert sparsity(get_masks(third.state.opt_state)) == pytest.approx(0.75, abs=1e-3)


def test_controls_differ_only_where_they_should(tiny):
    found = {}
    for control in ("ticket", "reinit", "random", "learning_rate_rewinding"):
        session = Session(load_problem(resolve(imp(tiny, rounds=1, control=control)), None))
        end = trained(session, 0, session.start(0, None))
        found[control] = end, session.start(1, end)
    masks = {
        name: get_masks(start.state.opt_state)["dense_0"]["kernel"] for name, (_, start) in found.items()
    }
    weights = {name: start.state.params["dense_0"]["kernel"] for name, (_, start) in found.items()}
    np.testing.assert_array_equal(masks["reinit"], masks["ticket"])
    assert (weights["reinit"] != weights["ticket"])[masks["ticket"]].all()
    assert masks["random"].sum() == masks["ticket"].sum() and (masks["random"] != masks["ticket"]).any()
    end, _ = found["learning_rate_rewinding"]
    trained_weights = end.state.params["dense_0"]["kernel"] * masks["ticket"]
    np.testing.assert_array_equal(weights["learning_rate_rewinding"], trained_weights)


@pytest.mark.slow
def test_interrupted_imp_ends_with_the_same_bits(tiny, tmp_path, crash_after):
    config = imp(tiny, rewind_step=5)
    whole = training.run(config, tmp_path / "a", progress=False)
    assert [round(record["sparsity"], 2) for record in whole["phases"]] == [0.0, 0.5, 0.75]
    for batches in (13, 12 + 8, 12 + 5):  # inside round 0, round 1 and round 2
        with crash_after(batches):
            training.run(config, tmp_path / "b", progress=False)
    resumed = training.run(config, tmp_path / "b", progress=False)
    assert {key for key in whole if whole[key] != resumed[key]} <= {"seconds"}
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
