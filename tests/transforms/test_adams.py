"""AdamS and its sibling's machinery against the paper's equations in numpy, closed forms and limiting cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax

B1, B2, EPS = 0.9, 0.999, 1e-8


def weights(shape=(8, 6), seed=0):
    return {"layer": {"kernel": jax.random.normal(jax.random.key(seed), shape), "bias": jnp.ones(shape[-1])}}


def grads(params, step):
    key = jax.random.fold_in(jax.random.key(7), step)
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)


def train(tx, params, steps, gradient=grads):
    """The parameters and states after every step, as a list of pairs of host trees."""

    def step(carry, index):
        params, state = carry
        updates, state = tx.update(gradient(params, index), state, params)
        carry = (optax.apply_updates(params, updates), state)
        return carry, carry

    carry = (params, jax.jit(tx.init)(params))
    run = jax.device_get(jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[1])(carry))
    return [jax.tree.map(lambda leaf, index=index: leaf[index], run) for index in range(steps)]


def no_grads(params, step):
    return jax.tree.map(jnp.zeros_like, params)


def kernel(params):
    return np.asarray(params["layer"]["kernel"], np.float64)


def two_of_four(weight):
    """The mask of the two largest of every four consecutive rows, by enumeration."""
    mask = np.zeros(weight.shape, bool)
    for column in range(weight.shape[1]):
        for start in range(0, weight.shape[0], 4):
            group = np.abs(weight[start : start + 4, column])
            first, second = np.argsort(-group, kind="stable")[:2]
            mask[start + first, column] = mask[start + second, column] = True
    return mask


def reference(weight, gradients, rates, strength, alphas, refresh_every):
    """The paper's algorithm in float64: weights before the cut, and the last mask."""
    mu, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, (g, rate, alpha) in enumerate(zip(gradients, rates, alphas, strict=True)):
        if t % refresh_every == 0:
            mask = two_of_four(weight)
        mu = B1 * mu + (1 - B1) * g
        u = np.where(mask, mu, (1 - alpha) * mu + alpha * strength * np.sign(weight))
        v = B2 * v + (1 - B2) * u**2
        weight = weight - rate * (u / (1 - B1 ** (t + 1))) / (np.sqrt(v / (1 - B2 ** (t + 1))) + EPS)
    return weight, mask


@pytest.mark.parametrize(("ramp", "prune"), [(1.0, True), (1.0, False), (0.0, True), (0.5, True)])
def test_adams_is_the_algorithm_of_the_paper(ramp, prune):
    steps, params = 25, weights()
    schedule = optax.cosine_decay_schedule(0.02, steps)
    keywords = {
        "steps": steps,
        "strength": 0.3,
        "ramp": ramp,
        "refresh_every": 4,
        "pattern": "2:4",
        "prune": prune,
    }
    run = train(sparsejax.adams(optax.sgd(0.1), learning_rate=schedule, **keywords), params, steps)
    gradients = [np.asarray(grads(params, t)["layer"]["kernel"], np.float64) for t in range(steps)]
    rates = [float(schedule(t)) for t in range(steps)]
    alphas = [min(t / (ramp * steps), 1.0) if ramp else 1.0 for t in range(steps)]
    if ramp == 0.5:
        alphas = [min(t / 12, 1.0) for t in range(steps)]  # half of 25 steps, to the nearest even
    expected, mask = reference(kernel(params), gradients, rates, 0.3, alphas, 4)
    final, state = run[-1]
    np.testing.assert_array_equal(state.planned["layer"]["kernel"], mask)
    np.testing.assert_allclose(kernel(final), expected * mask if prune else expected, rtol=1e-4, atol=1e-5)
    if ramp == 1.0:
        assert (two_of_four(kernel(params)) != mask).any(), "a mask that never moves tests no refresh"


def test_masks_are_open_until_the_last_step_and_exact_from_it_on():
    steps, params = 12, weights()
    tx = sparsejax.adams(
        optax.sgd(0.1), learning_rate=0.01, steps=steps, strength=0.1, refresh_every=5, pattern="2:4"
    )
    run = train(tx, params, steps + 3)
    for index, (now, state) in enumerate(run):
        mask = np.asarray(sparsejax.get_masks(state)["layer"]["kernel"])
        if index + 1 < steps:
            assert mask.all() and kernel(now).all()
        else:
            np.testing.assert_array_equal(mask, run[steps - 1][1].planned["layer"]["kernel"])
            assert (mask.reshape(2, 4, -1).sum(1) == 2).all()
            np.testing.assert_array_equal(kernel(now) != 0, mask)
    planned = [np.asarray(state.planned["layer"]["kernel"]) for _, state in run]
    changes = [index for index in range(1, len(run)) if (planned[index] != planned[index - 1]).any()]
    assert set(changes) <= {5, 10}


def test_kept_weights_follow_adam_with_the_second_moment_of_the_momentum():
    """Built from optax's own averages; `optax.adam`, with the second moment of g, is something else."""
    steps, params = 30, weights()
    tx = sparsejax.adams(
        optax.sgd(0.1), learning_rate=0.01, steps=steps + 1, strength=1e-3, refresh_every=99, pattern="2:4"
    )
    final = kernel(train(tx, params, steps)[-1][0])
    kept = two_of_four(kernel(params))
    ours = optax.chain(optax.ema(B1, debias=False), optax.scale_by_adam(b1=0.0, b2=B2, eps=EPS))
    expected, adam = params, params
    state, adam_state = ours.init(params), optax.adam(0.01).init(params)
    for t in range(steps):
        updates, state = ours.update(grads(params, t), state)
        unbiased = 1 / (1 - B1 ** (t + 1))
        expected = jax.tree.map(lambda w, u, rate=0.01 * unbiased: w - rate * u, expected, updates)
        updates, adam_state = optax.adam(0.01).update(grads(params, t), adam_state)
        adam = optax.apply_updates(adam, updates)
    np.testing.assert_allclose(final[kept], kernel(expected)[kept], rtol=1e-4, atol=1e-6)
    assert np.abs(final[kept] - kernel(adam)[kept]).max() > 0.01
    assert np.abs(final[~kept] - kernel(expected)[~kept]).max() > 1e-3


def test_before_the_decay_sets_in_pruned_weights_move_as_kept_ones_do():
    params = weights()
    options = {"learning_rate": 0.01, "strength": 1e-3, "pattern": "2:4"}
    slow, other = (
        train(sparsejax.adams(optax.sgd(0.1), steps=10**9, **{**options, **change}), params, 20)[-1][0]
        for change in ({}, {"strength": 1e-6, "refresh_every": 3})
    )
    np.testing.assert_allclose(kernel(slow), kernel(other), rtol=1e-6)


def decayed(rate, steps, strength, ramp, weight=0.5, prune=False):
    """|w| at the end of one kept and one pruned weight without gradients, and the path of the pruned one."""
    params = {"kernel": jnp.asarray([[2 * weight], [weight]], jnp.float32)}
    tx = sparsejax.adams(
        optax.sgd(0.1),
        learning_rate=rate,
        steps=steps,
        strength=strength,
        ramp=ramp,
        pattern="1:2",
        prune=prune,
    )

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(no_grads(params, 0), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"][:, 0]

    _, path = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps))((params, tx.init(params)))
    return np.asarray(path, np.float64)


@pytest.mark.parametrize("strength", [1e-6, 1e-2])
def test_without_gradient_a_weight_falls_by_about_the_learning_rate_whatever_the_strength(strength):
    steps, rate = 2000, 1e-3
    path = decayed(rate, steps, strength, ramp=1.0)
    assert (path[:, 0] == 1.0).all(), "a kept weight without gradient stays"
    assert np.abs(path[-1, 1]) < 3 * rate, "a constant rate leaves a floor of its own order"
    falling = decayed(optax.cosine_decay_schedule(rate, steps), steps, strength, ramp=1.0)
    assert np.abs(falling[-1, 1]) < 1e-6, "a rate that falls to zero leaves none"


def test_reachable_distance():
    """Without gradients the distance has a closed form, and is never below the sum of gamma_t alpha_t."""
    steps, strength = 300, 1e-3
    schedule = optax.cosine_decay_schedule(1e-3, steps)
    rates, alphas = np.array([schedule(t) for t in range(steps)], float), np.arange(steps) / steps
    t = np.arange(1, steps + 1)
    v = np.array(
        [
            sum((1 - B2) * B2 ** (s - i) * (alphas[i] * strength) ** 2 for i in range(s + 1))
            for s in range(steps)
        ]
    )
    moves = rates * (alphas * strength / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
    path = decayed(schedule, steps, strength, ramp=1.0, weight=1.0)
    np.testing.assert_allclose(1.0 - path[:, 1], np.cumsum(moves), rtol=1e-3, atol=1e-6)
    reach = np.sum(rates * alphas)
    assert reach < moves.sum() < 2.0 * rates.sum()
    assert abs(decayed(schedule, steps, strength, ramp=1.0, weight=0.9 * reach)[-1, 1]) < 1e-5
    assert decayed(schedule, steps, strength, ramp=1.0, weight=2.0 * rates.sum())[-1, 1] > 0.1 * rates.sum()


def test_strength_near_eps_slows_the_decay_and_below_it_is_refused():
    """At full strength the step is gamma lambda / (lambda + eps), once the bias of mu is gone."""
    for ratio, expected in [(1.5, 0.6), (1e4, 1.0)]:
        path = decayed(1e-3, 200, ratio * EPS, ramp=0.0, weight=5.0)[:, 1]
        np.testing.assert_allclose((path[100] - path[199]) / 99, expected * 1e-3, rtol=2e-3)
    with pytest.raises(
        ValueError, match=r"must be finite and above eps=1e-08, or the decay stalls, got 1e-09"
    ):
        sparsejax.adams(optax.sgd(0.1), learning_rate=0.1, steps=10, strength=1e-9, pattern="2:4")


def test_metrics_tell_what_the_cut_removes():
    """Trained on a quadratic with the strength of its gradients, the pruned weights fade and the kept stay."""
    steps, params = 1000, weights((16, 8), seed=3)
    centre = kernel(params)
    schedule = optax.cosine_decay_schedule(0.01, steps)

    def quadratic(now, step):
        return jax.tree.map(lambda w, c: 1e-2 * (w - c), now, params)

    found = {}
    for strength in (1e-2, 1e-1):
        tx = sparsejax.adams(
            optax.sgd(0.1), learning_rate=schedule, steps=steps, strength=strength, pattern="2:4", prune=False
        )
        run = train(tx, params, steps, quadratic)
        final, state = run[-1]
        mask = np.asarray(state.planned["layer"]["kernel"])
        kept, gone = np.abs(kernel(final)[mask]), np.abs(kernel(final)[~mask])
        found[strength] = state.metrics
        np.testing.assert_allclose(
            state.metrics["complement_mean"], gone.mean() / kept.mean(), rtol=1e-4, atol=1e-9
        )
        np.testing.assert_allclose(
            state.metrics["complement_max"], gone.max() / kept.mean(), rtol=1e-4, atol=1e-9
        )
        error = np.linalg.norm(gone) / np.linalg.norm(kernel(final))
        np.testing.assert_allclose(state.metrics["prune_error"], error, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(kept, np.abs(centre[mask]), rtol=1e-3)
        first = run[0][1].metrics
        assert first["complement_mean"] > 0.2
    assert found[1e-1]["prune_error"] < found[1e-2]["prune_error"] < 0.5 * run[0][1].metrics["prune_error"]
    assert found[1e-1]["complement_max"] < 1e-3


def test_metrics_of_a_pruned_run_are_those_before_the_cut():
    options = {"learning_rate": 0.01, "steps": 12, "strength": 0.1, "refresh_every": 5, "pattern": "2:4"}
    pruned, dense = (
        train(sparsejax.adams(optax.sgd(0.1), prune=prune, **options), weights(), 12)[-1]
        for prune in (True, False)
    )
    for name, value in dense[1].metrics.items():
        np.testing.assert_allclose(pruned[1].metrics[name], value, rtol=1e-5)
    assert dense[1].metrics["prune_error"] > 0.1
    masked = sparsejax.apply_masks(dense[0], dense[1].planned)
    np.testing.assert_allclose(kernel(pruned[0]), kernel(masked), rtol=1e-5)


def test_the_state_can_be_donated_without_a_sparsified_leaf():
    tx = sparsejax.adams(optax.sgd(0.1), learning_rate=0.1, steps=10, sparsity=0.0)
    params = weights((8, 4))
    updates, state = jax.jit(tx.update, donate_argnums=1)(params, tx.init(params), params)
    assert int(state.count) == 1 and all(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_other_leaves_follow_the_inner_optimizer_alone():
    params, inner = weights(), optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.03))
    tx = sparsejax.adams(inner, learning_rate=0.01, steps=8, strength=0.1, pattern="2:4")
    biases = {"bias": params["layer"]["bias"]}
    state = inner.init(biases)
    for t in range(5):
        updates, state = inner.update({"bias": grads(params, t)["layer"]["bias"]}, state, biases)
        biases = optax.apply_updates(biases, updates)
    np.testing.assert_allclose(train(tx, params, 5)[-1][0]["layer"]["bias"], biases["bias"], rtol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"steps": 0}, "steps, the length of training, must be an integer of at least 1, got 0"),
        (
            {"ramp": 1.5},
            r"ramp, the share of the steps over which the decay rises, must be in \[0, 1\], got 1.5",
        ),
        ({"refresh_every": 0}, "refresh_every must be at least 1 step, got 0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"strength": float("nan")}, "the strength of A.* finite.*, got nan"),
    ],
)
@pytest.mark.parametrize("method", [sparsejax.adams, sparsejax.ast])
def test_bad_input(method, keywords, message):
    with pytest.raises(ValueError, match=message):
        method(optax.sgd(0.1), **{"learning_rate": 0.1, "steps": 10, "pattern": "2:4", **keywords})


def test_a_leaf_that_the_pattern_does_not_fit_is_named():
    tx = sparsejax.adams(optax.sgd(0.1), learning_rate=0.1, steps=10, pattern="2:4")
    with pytest.raises(ValueError, match="2:4 needs axis -2 of layer/kernel to be divisible by 4"):
        tx.init(weights((6, 4)))
