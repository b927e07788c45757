"""AST against the paper's equations in numpy, optax's AdamW where the two must agree, and the decay's sign."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax

EPS = 1e-8


def weights():
    return {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}


def gradient(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), step), (8, 6))


def train(tx, params, steps, gradient=gradient):
    """The kernel (float64) and the state after every step."""

    @jax.jit
    def step(params, state, index):
        updates, state = tx.update({"kernel": gradient(index)}, state, params)
        return optax.apply_updates(params, updates), state

    state, run = tx.init(params), []
    for index in range(steps):
        params, state = step(params, state, index)
        run.append((np.asarray(params["kernel"], np.float64), state))
    return run


def two_of_four(weight):
    """The mask of the two largest of every four consecutive rows, by ranks."""
    groups = np.abs(weight).reshape(2, 4, -1)
    return (groups.argsort(1).argsort(1) >= 2).reshape(weight.shape)


def reference(weight, steps, *, rates, strength, ramp, decay, b1, b2, refresh_every):
    """The paper's algorithm in float64."""
    mask = two_of_four(weight)
    mu, v, masks = np.zeros_like(weight), np.zeros_like(weight), []
    for t in range(steps):
        mu = b1 * mu + (1 - b1) * np.asarray(gradient(t), np.float64)
        u = mu + strength * min(t / ramp, 1.0) * (1 - mask) * weight
        v = b2 * v + (1 - b2) * u**2
        move = (u / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + EPS)
        weight = weight - rates[t] * (move + decay * weight)
        if (t + 1) % refresh_every == 0:
            mask = two_of_four(weight)
        masks.append(mask)
    return weight, masks


def test_ast_is_the_algorithm_of_the_paper():
    steps, params = 24, weights()
    schedule = optax.cosine_decay_schedule(0.03, steps)
    tx = sparsejax.ast(
        optax.sgd(0.1),
        learning_rate=schedule,
        steps=steps,
        strength=0.5,
        ramp=0.5,
        refresh_every=5,
        pattern="2:4",
    )
    run = train(tx, params, steps)
    expected, masks = reference(
        np.asarray(params["kernel"], np.float64), steps, rates=[float(schedule(t)) for t in range(steps)],
        strength=0.5, ramp=12, decay=0.1, b1=0.9, b2=0.95, refresh_every=5,
    )  # fmt: skip
    flips, previous = 0, two_of_four(np.asarray(params["kernel"]))
    for (_, state), mask in zip(run, masks, strict=True):
        assert state.masks["kernel"].dtype == bool
        np.testing.assert_array_equal(state.masks["kernel"], mask)
        flips, previous = flips + (mask != previous).sum(), mask
        assert state.metrics["sad"] == flips
    assert flips > 0, "masks that never move test no refresh"
    np.testing.assert_allclose(run[-1][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_without_decay_it_is_adamw_with_the_second_moment_of_the_momentum(b1):
    """Which at b1 = 0 is `optax.adamw`: straight-through estimation changes the masks, not the step."""
    steps, params = 20, weights()
    tx = sparsejax.ast(
        optax.sgd(0.1), learning_rate=0.02, steps=steps, strength=0.0, b1=b1, weight_decay=0.3, pattern="2:4"
    )
    ours = train(tx, params, steps)[-1][0]
    adamw = optax.adamw(0.02, b1=b1, b2=0.95, eps=EPS, weight_decay=0.3)
    ema, scale = optax.ema(b1, debias=False), optax.scale_by_adam(b1=0.0, b2=0.95, eps=EPS)
    plain, built = params["kernel"], params["kernel"]
    state, ema_state, scale_state = adamw.init(plain), ema.init(plain), scale.init(plain)
    for t in range(steps):
        updates, state = adamw.update(gradient(t), state, plain)
        plain = plain + updates
        mu, ema_state = ema.update(gradient(t), ema_state)
        along, scale_state = scale.update(mu, scale_state)
        built = built - 0.02 * (along / (1 - b1 ** (t + 1)) + 0.3 * built)
    np.testing.assert_allclose(ours, built, rtol=1e-4, atol=1e-6)
    if b1 == 0:
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)
    else:
        assert np.abs(ours - plain).max() > 0.02


def test_the_decay_shrinks_pruned_weights_and_leaves_kept_ones_alone():
    params, steps = weights(), 15
    tx = sparsejax.ast(
        optax.sgd(0.1),
        learning_rate=0.01,
        steps=steps,
        strength=1e-4,
        ramp=0.0,
        weight_decay=0.0,
        pattern="2:4",
    )
    before = np.asarray(params["kernel"], np.float64)
    kept = two_of_four(before)
    after = train(tx, params, steps, lambda step: jnp.zeros((8, 6)))[-1][0]
    np.testing.assert_array_equal(after[kept], before[kept])
    large = ~kept & (np.abs(before) > 0.5)
    assert large.any() and (np.abs(after[large]) < np.abs(before[large]) - 0.1).all()
    assert (np.sign(after[large]) == np.sign(before[large])).all()


def test_bad_input():
    with pytest.raises(ValueError, match="the strength of AST must be finite and not negative, got -1"):
        sparsejax.ast(optax.sgd(0.1), learning_rate=0.1, steps=10, strength=-1.0, pattern="2:4")
