"""Scores against autodiff, finite differences, closed forms and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import scores
from sparsejax.masks import apply_masks


def chain(sizes, seed=0):
    """A bias-free chain of weights; He initialisation. Names sort in network order."""
    random = np.random.default_rng(seed)
    return {
        f"layer_{i}": jnp.asarray(random.normal(size=(m, n)) * np.sqrt(2 / m), jnp.float32)
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def forward(params, x):
    *hidden, last = [params[name] for name in sorted(params)]
    for weight in hidden:
        x = jax.nn.relu(x @ weight)
    return x @ last


def smooth_loss(params):
    x = jnp.linspace(-1, 1, 5 * 4).reshape(5, 4)
    return jnp.mean(jnp.square(jnp.tanh(x @ params["layer_0"]) @ params["layer_1"] - 1.0))


def test_magnitude_gradient_taylor_movement():
    w, g = {"a": jnp.asarray([-2.0, 0.5])}, {"a": jnp.asarray([3.0, 4.0])}
    np.testing.assert_array_equal(scores.magnitude(w)["a"], [2.0, 0.5])
    np.testing.assert_array_equal(scores.gradient(g)["a"], [3.0, 4.0])
    np.testing.assert_array_equal(scores.taylor(w, g)["a"], [6.0, 2.0])
    np.testing.assert_array_equal(scores.movement(w, g)["a"], [6.0, -2.0])
    for name, score in scores.SCORES.items():
        assert jax.tree.structure(score(w, g)) == jax.tree.structure(w), name


def test_scores_of_bfloat16_are_float32():
    w = {"a": jnp.full((3,), 1.0078125, jnp.bfloat16)}
    assert float(scores.taylor(w, w)["a"][0]) == 1.0078125**2  # not representable in bfloat16
    for score in scores.SCORES.values():
        assert score(w, w)["a"].dtype == jnp.float32


def test_movement_is_positive_where_a_step_moves_away_from_zero():
    w, g = jnp.asarray([1.0, -1.0, 1.0, -1.0]), jnp.asarray([-1.0, 1.0, 1.0, -1.0])
    moved = jnp.abs(w - 0.1 * g) > jnp.abs(w)
    np.testing.assert_array_equal(scores.movement(w, g) > 0, moved)


def test_random_depends_only_on_key_name_and_shape():
    key = jax.random.key(3)
    tree = {"a": {"kernel": jnp.zeros((8, 6))}, "b": {"kernel": jnp.zeros((8, 6))}}
    drawn = scores.random(key, tree)
    alone = scores.random(key, {"b": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16)}})
    np.testing.assert_array_equal(drawn["b"]["kernel"], alone["b"]["kernel"])
    assert not np.array_equal(drawn["a"]["kernel"], drawn["b"]["kernel"])
    assert not np.array_equal(drawn["a"]["kernel"], scores.random(jax.random.key(4), tree)["a"]["kernel"])
    # 0xac860d31 is the CRC-32 of "a/kernel": no per-process salt as in Python's hash
    np.testing.assert_array_equal(
        drawn["a"]["kernel"], jax.random.uniform(jax.random.fold_in(key, 0xAC860D31), (8, 6))
    )


def test_snip_is_the_gradient_of_the_mask_and_the_effect_of_a_removal():
    params = chain((4, 3, 2))
    got = scores.snip(params, smooth_loss)
    masks = jax.tree.map(jnp.ones_like, params)
    sensitivity = jax.grad(lambda masks: smooth_loss(jax.tree.map(jnp.multiply, params, masks)))(masks)
    for name in params:
        np.testing.assert_allclose(got[name], jnp.abs(sensitivity[name]), rtol=1e-5)
    # shrinking one weight by one percent changes the loss by about one percent of its score
    for name, index in (("layer_0", (1, 2)), ("layer_1", (2, 0))):
        less, more = (
            smooth_loss(params | {name: params[name].at[index].multiply(factor)}) for factor in (0.99, 1.01)
        )
        assert abs(float(more - less)) / 0.02 == pytest.approx(float(got[name][index]), rel=1e-2)


def test_signed_sensitivity_is_conserved_through_relu_units():
    params = chain((6, 5, 4, 3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 6)), jnp.float32)
    signed = scores.movement(params, jax.grad(lambda p: jnp.mean(jnp.square(forward(p, x) - 1)))(params))
    np.testing.assert_allclose(signed["layer_0"].sum(0), signed["layer_1"].sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(signed["layer_1"].sum(0), signed["layer_2"].sum(1), rtol=1e-4, atol=1e-6)


def quadratic(seed=0, size=6):
    random = np.random.default_rng(seed)
    half = random.normal(size=(size, size))
    a = jnp.asarray(half + half.T, jnp.float32)
    w = jnp.asarray(random.normal(size=size), jnp.float32)
    return a, w, lambda params: 0.5 * params["w"] @ a @ params["w"]


def test_grasp_on_a_quadratic():
    a, w, loss = quadratic()
    np.testing.assert_allclose(scores.grasp({"w": w}, loss)["w"], w * (a @ (a @ w)), rtol=1e-4, atol=1e-4)


def test_grasp_against_central_differences():
    params = chain((4, 3, 2))
    slope = jax.grad(smooth_loss)
    g = slope(params)
    step = 1e-2
    ahead, behind = (slope(jax.tree.map(lambda w, d, s=s: w + s * d, params, g)) for s in (step, -step))
    got = scores.grasp(params, smooth_loss)
    for name in params:
        hessian_gradient = (ahead[name] - behind[name]) / (2 * step)
        np.testing.assert_allclose(got[name], params[name] * hessian_gradient, rtol=2e-2, atol=1e-4)


def test_grasp_keeps_what_carries_gradient_flow():
    """Removing a small fraction of w_i changes |g|^2 by -2 times that fraction of the score."""
    params = chain((4, 3, 2))
    slope = jax.grad(smooth_loss)

    def flow(params):
        return float(sum(jnp.vdot(g, g) for g in jax.tree.leaves(slope(params))))

    got, base = scores.grasp(params, smooth_loss), flow(params)
    biggest = max(float(jnp.abs(s).max()) for s in jax.tree.leaves(got))
    checked = 0
    for name, leaf in params.items():
        for index in np.ndindex(leaf.shape):
            score = float(got[name][index])
            if abs(score) > 0.1 * biggest:  # where the first order stands clear of rounding
                removed = params | {name: leaf.at[index].multiply(0.99)}
                assert np.sign(flow(removed) - base) == -np.sign(score)
                checked += 1
    assert checked >= 4


def test_synflow_of_two_layers_by_brute_force():
    params = chain((3, 4, 2))
    first, second = (np.abs(np.asarray(params[name])) for name in ("layer_0", "layer_1"))
    got = scores.synflow(params, forward, (1, 3))
    np.testing.assert_allclose(got["layer_0"], first * second.sum(1)[None, :], rtol=1e-5)
    np.testing.assert_allclose(got["layer_1"], second * first.sum(0)[:, None], rtol=1e-5)


def test_synflow_is_conserved_by_unit_and_by_layer():
    params = chain((5, 8, 8, 3))
    got = scores.synflow(params, forward, (1, 5))
    for i in range(2):
        np.testing.assert_allclose(got[f"layer_{i}"].sum(0), got[f"layer_{i + 1}"].sum(1), rtol=1e-5)
    total = forward(jax.tree.map(jnp.abs, params), jnp.ones((1, 5))).sum()
    for score in got.values():
        assert float(score.sum()) == pytest.approx(float(total), rel=1e-5)


def test_synflow_of_masked_weights_is_zero():
    params = chain((5, 8, 3))
    masks = {"layer_0": params["layer_0"] > 0, "layer_1": jnp.asarray(True)}
    got = scores.synflow(apply_masks(params, masks), forward, (1, 5))
    np.testing.assert_array_equal(got["layer_0"] > 0, masks["layer_0"])


def test_synflow_survives_an_output_beyond_float32():
    """R = 2^160: plain float32 gives inf. Rescaling by powers of two changes nothing but the exponent."""
    grown = {name: weight * 2.0**40 for name, weight in chain((4, 4, 4, 4, 4)).items()}
    plain = scores.synflow(chain((4, 4, 4, 4, 4)), forward, (1, 4))
    got = scores.synflow(grown, forward, (1, 4))
    ratios = np.concatenate([np.ravel(got[name] / plain[name]) for name in got])
    assert np.all(np.isfinite(ratios)) and ratios[0] > 0
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


def test_synflow_scaling_keeps_the_ranking_of_a_residual_network():
    def residual(params, x):
        for name in sorted(params):
            x = x + jax.nn.relu(x @ params[name])
        return x

    params = {name: weight * 2.0**14 for name, weight in chain((6,) * 6).items()}  # R beyond 2^60
    got = scores.synflow(params, residual, (1, 6))
    wide = {name: np.abs(np.asarray(weight, np.float64)) for name, weight in params.items()}
    expected = brute_force_residual(wide)
    ratios = np.concatenate([np.ravel(got[name] / expected[name]) for name in got])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)
    assert ratios[0] < 2.0**-40  # it did rescale


def brute_force_residual(weights):
    names = sorted(weights)
    states = [np.ones(6)]
    for name in names:
        states.append(states[-1] + states[-1] @ weights[name])
    result, back = {}, np.ones(6)
    for name, state in zip(reversed(names), reversed(states[:-1]), strict=True):
        result[name] = weights[name] * np.outer(state, back)
        back = back + weights[name] @ back
    return result
