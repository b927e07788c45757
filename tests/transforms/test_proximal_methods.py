"""The proximal methods on problems whose solution is known: scikit-learn's lasso, optimality conditions,
NumPy steps, planted supports; and what they share: the end, the counts, the metric, the errors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.linear_model

import sparsejax
from sparsejax.patterns import Channel, Group
from sparsejax.proximal import wgsef_prox, wgsef_value

ROWS, COLUMNS, GROUPS, TRUE = 120, 80, 40, 8


def least_squares(seed=0, noise=0.3):
    """y = A x + noise with groups of two coefficients of which the first `TRUE` are nonzero: (A, y)."""
    rng = np.random.default_rng(seed)
    x = np.zeros((GROUPS, COLUMNS // GROUPS))
    x[:TRUE] = rng.standard_normal((TRUE, COLUMNS // GROUPS))
    a = rng.standard_normal((ROWS, COLUMNS)) / np.sqrt(ROWS)
    return jnp.asarray(a, jnp.float32), jnp.asarray(
        a @ x.ravel() + noise / ROWS**0.5 * rng.standard_normal(ROWS)
    )


@functools.partial(jax.jit, static_argnames=("tx", "shape", "steps"))
def run(tx, a, y, shape, steps):
    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: 0.5 * jnp.sum((a @ p["kernel"].reshape(-1) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), state.metrics["groups"]

    params = {"kernel": jnp.zeros(shape)}
    return jax.lax.scan(step, (params, tx.init(params)), None, steps)


def solve(tx, a, y, shape, steps):
    """Runs a transform on 1/2 ||A x - y||^2 from zero: (x, last state, number of groups after each step)."""
    (params, state), groups = run(tx, a, y, shape, steps)
    return np.asarray(params["kernel"]), state, np.asarray(groups)


def build(name, inner=None, rate=0.2, **kwargs):
    inner = optax.sgd(rate) if inner is None else inner
    known = sparsejax.transforms.keywords(name)
    given = {"learning_rate": rate, **kwargs}
    return sparsejax.transforms.build(name, inner, **{k: v for k, v in given.items() if k in known})


@pytest.mark.parametrize("metric", ["euclidean", "adam"])
def test_prox_l1_converges_to_the_lasso(metric):
    """In Adam's metric too: the fixed point of an exact prox does not depend on the metric. Adam's first
    moment is switched off, because steps that are not gradients of one point have no such fixed point."""
    a, y = least_squares()
    lam = 0.1
    a64, y64 = np.float64(a), np.float64(y)
    lasso = sklearn.linear_model.Lasso(alpha=lam / ROWS, fit_intercept=False, tol=1e-10, max_iter=100_000)
    expected = lasso.fit(a64, y64).coef_
    inner = optax.sgd(0.2)
    rate = 0.2
    if metric == "adam":
        rate = optax.exponential_decay(0.02, 1000, 0.1, staircase=True)
        inner = optax.adam(rate, b1=0.0)
    tx = build("prox_l1", inner, rate=rate, strength=lam, metric=metric, k=5, end=10**6)
    found, *_ = solve(tx, a, y, (GROUPS, 2), 3000)
    np.testing.assert_allclose(found.ravel(), expected, atol=2e-3 if metric == "adam" else 1e-5)
    if metric == "euclidean":
        np.testing.assert_array_equal(found.ravel() == 0, np.abs(expected) < 1e-9)


def test_group_lasso_meets_its_optimality_conditions():
    """A_g^T (y - A x) = lam sqrt(2) x_g / ||x_g|| on nonzero groups, no longer than that on the others."""
    a, y = least_squares()
    lam = 0.1
    tx = build("group_lasso", strength=lam, k=5, end=10**6, pattern=Channel(0))
    x, state, groups = solve(tx, a, y, (GROUPS, 2), 3000)
    pull = (np.asarray(a).T @ (y - np.asarray(a) @ x.ravel())).reshape(GROUPS, 2)
    norms = np.linalg.norm(x, axis=1)
    alive = norms > 0
    assert 3 < alive.sum() < GROUPS - 3 and groups[-1] == alive.sum()
    np.testing.assert_allclose(pull[alive], lam * 2**0.5 * x[alive] / norms[alive, None], atol=2e-5)
    assert (np.linalg.norm(pull[~alive], axis=1) <= lam * 2**0.5).all()
    np.testing.assert_array_equal(np.asarray(state.masks["kernel"])[:, 0], alive)


def test_wgsef_minimises_the_penalised_loss():
    """No perturbation of the limit, in or out of its support, lowers loss + lam GS_k (a convex function)."""
    a, y = least_squares()
    lam, k = 0.3, TRUE
    x, _, _ = solve(build("wgsef", strength=lam, k=k, end=10**6, pattern=Channel(0)), a, y, (GROUPS, 2), 3000)

    def objective(x):
        return 0.5 * jnp.sum((a @ x.reshape(-1) - y) ** 2) + lam * wgsef_value(x, k, groups=Channel(0))

    steps = jax.random.normal(jax.random.key(0), (300, GROUPS, 2)) * jnp.logspace(-3, 0, 300)[:, None, None]
    sparse = steps * (x != 0)
    others = jax.jit(jax.vmap(objective))(x + jnp.concatenate([steps, sparse]))
    assert float(others.min()) > float(objective(x)) - 1e-6
    assert (x != 0).any(1).sum() < GROUPS


def f1(found, true=TRUE):
    hits = found[:true].sum()
    return 2 * hits / (found.sum() + true)


def test_wgsef_recovers_the_support_at_any_strength():
    """The convex warm-up: 40 groups, 8 true, k = 8 of them kept from `end` on. Far above the best strength,
    where nothing is left to the group lasso, WGSEF still has 8 to 14 groups, and the better ones."""
    scores, counts = {}, {}
    for name in ("wgsef", "group_lasso"):
        for strength in (0.2, 2.0, 20.0):
            tx = build(name, strength=strength, k=TRUE, end=800, pattern=Channel(0))
            ends = [solve(tx, *least_squares(seed), (GROUPS, 2), 1000) for seed in range(4)]
            scores[name, strength] = np.mean([f1((x != 0).any(1)) for x, *_ in ends])
            counts[name, strength] = [int(state.metrics["groups_before_end"]) for _, state, _ in ends]
    for strength in (2.0, 20.0):
        assert min(counts["wgsef", strength]) >= TRUE > max(counts["group_lasso", strength]) + 4
    assert scores["wgsef", 0.2] > 0.95 and scores["group_lasso", 0.2] > 0.95
    assert scores["wgsef", 2.0] > scores["group_lasso", 2.0] + 0.05


def test_prox_l0_is_iterative_hard_thresholding():
    """Against a NumPy loop, and it finds the planted support."""
    a, y = least_squares(noise=0.01)
    x, _, groups = solve(build("prox_l0", k=TRUE, end=10**6, pattern=Channel(0)), a, y, (GROUPS, 2), 400)
    expected = np.zeros((GROUPS, 2))
    for _ in range(400):
        v = expected - 0.2 * (np.asarray(a).T @ (np.asarray(a) @ expected.ravel() - np.asarray(y))).reshape(
            expected.shape
        )
        norms = np.linalg.norm(v, axis=1)
        expected = np.where((norms >= np.sort(norms)[-TRUE])[:, None], v, 0)
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert (groups == TRUE).all() and f1((x != 0).any(1)) == 1.0


def test_a_step_of_each_method_in_adams_metric():
    """From a common state after a few steps, against NumPy on that state."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}
    grads = [jax.random.normal(jax.random.key(i), (6, 5)) for i in (1, 2, 3)]
    for name in ("prox_l1", "prox_l0", "group_lasso", "wgsef"):
        tx = build(name, optax.adam(0.1), 0.1, strength=0.7, metric="adam", k=2, end=100, pattern=Channel(1))
        step, state, p = jax.jit(tx.update), tx.init(params), params
        for g in grads:
            before = p
            updates, state = step({"kernel": g}, state, p)
            p = optax.apply_updates(p, updates)
        inner = state.inner_state[0]
        d = np.sqrt(np.float64(inner.nu["kernel"]) / (1 - 0.999**3)) + 1e-8
        v = before["kernel"] - 0.1 * np.float64(inner.mu["kernel"]) / (1 - 0.9**3) / d
        lam, mean = 0.07, d.mean(0)
        norms = np.linalg.norm(v, axis=0)
        if name == "prox_l1":
            expected = np.sign(v) * np.maximum(np.abs(v) - lam / d, 0)
        elif name == "prox_l0":
            energy = (d * v**2).sum(0)
            expected = np.where(energy >= np.sort(energy)[-2], v, 0)
        elif name == "group_lasso":
            expected = v * np.maximum(1 - lam * 6**0.5 / mean / norms, 0)
        else:
            expected = wgsef_prox(jnp.asarray(v), lam, 2, groups=Channel(1), metric=jnp.asarray(mean))
        np.testing.assert_allclose(p["kernel"], expected, atol=1e-5)


def test_prox_l0_chooses_in_the_metric_of_the_step_at_the_end_too():
    """The small weight has the larger D; gradients of alternating sign leave the weights where they are."""
    params = {"kernel": jnp.array([[1.0, 0.9]])}
    tx = build("prox_l0", optax.adam(1e-6), 1e-6, metric="adam", strength=0.0, k=1, end=3, pattern="channel")
    step, state = jax.jit(tx.update), tx.init(params)
    for index in range(5):
        grads = {"kernel": (-1.0) ** index * jnp.array([[0.01, 1.0]])}
        _, state = step(grads, state, params)
        assert state.masks["kernel"].tolist() == [[False, True]]


@pytest.mark.parametrize("name", ["wgsef", "group_lasso", "prox_l1"])
def test_the_end_keeps_the_best_groups_and_fixes_them(name):
    a, y = least_squares()
    end, steps = 40, 60
    tx = build(name, strength=0.05, k=TRUE, end=end, pattern=Channel(0))
    params = {"kernel": jnp.zeros((GROUPS, 2))}
    step, state, seen = jax.jit(tx.update), tx.init(params), []
    for _ in range(steps):
        grads = {"kernel": (a.T @ (a @ params["kernel"].reshape(-1) - y)).reshape(GROUPS, 2)}
        updates, state = step(grads, state, params)
        stepped = params["kernel"] - 0.2 * grads["kernel"]
        params = optax.apply_updates(params, updates)
        seen.append((params["kernel"], state, stepped))
    x, state, stepped = seen[end]
    norms = np.linalg.norm(stepped, axis=1)
    expected = np.where((norms >= np.sort(norms)[-TRUE])[:, None], stepped, 0)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    alive = [int((np.asarray(x) != 0).any(1).sum()) for x, *_ in seen]
    assert [int(s.metrics["groups"]) for _, s, _ in seen] == alive
    assert alive[end - 1] > TRUE and set(alive[end:]) == {TRUE}
    assert int(seen[-1][1].metrics["groups_before_end"]) == alive[end - 1]
    np.testing.assert_array_equal(seen[-1][1].masks["kernel"], state.masks["kernel"])
    later = np.where(state.masks["kernel"], seen[end + 1][2], 0)
    np.testing.assert_allclose(seen[end + 1][0], later, atol=1e-6)  # nothing shrinks any more


def test_groups_of_all_leaves_compete_under_a_global_allocation():
    """One envelope over the neurons of two leaves, and over whole layers."""
    params = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": 3 * jnp.ones((3, 2))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = sparsejax.wgsef(
        optax.sgd(1.0), learning_rate=1.0, strength=5.0, k=2, end=1, pattern="channel", allocation="global"
    )
    updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
    x = optax.apply_updates(params, updates)
    together = jnp.concatenate([params["a"]["kernel"], params["b"]["kernel"]], 1)
    expected = wgsef_prox(together, 5.0, 2, groups=Channel(1))
    np.testing.assert_allclose(jnp.concatenate([x["a"]["kernel"], x["b"]["kernel"]], 1), expected, rtol=1e-5)
    _, state = jax.jit(tx.update)(zeros, state, x)
    assert not state.masks["a"]["kernel"].any() and state.masks["b"]["kernel"].all()
    nothing = build("wgsef", strength=5.0, end=1, sparsity=0.0, pattern="channel", allocation="global")
    updates, _ = jax.jit(nothing.update)(params, nothing.init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda p: -jnp.float32(0.2) * p, params))
    layers = sparsejax.prox_l0(optax.sgd(1.0), end=5, sparsity=0.5, pattern=Group([0]), allocation="global")
    _, state = jax.jit(layers.update)(zeros, layers.init(params), params)
    assert not state.masks["a"]["kernel"].any() and state.masks["b"]["kernel"].all()


def test_weights_of_unequal_groups():
    """Groups of 1, 2 and 5 entries: the prox with d_g = n_g, and the selection by ||v_g|| / sqrt(n_g)."""
    labels = np.asarray([[0, 1, 1, 2], [2, 2, 2, 2]])
    params = {"kernel": jnp.asarray([[1.0, 0.9, 0.8, 0.7], [0.7, 0.7, 0.7, 0.7]])}
    zeros = {"kernel": jnp.zeros((2, 4))}
    for weights, d, kept in (("sizes", np.asarray([1.0, 2.0, 5.0]), {0, 1}), ("ones", np.ones(3), {1, 2})):
        tx = build(
            "wgsef", optax.sgd(1.0), 1.0, strength=0.4, k=2, end=1, weights=weights, pattern=Group(labels)
        )
        updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
        expected = wgsef_prox(params["kernel"], 0.4, 2, groups=labels, weights=d)
        np.testing.assert_allclose(params["kernel"] + updates["kernel"], expected, rtol=1e-6)
        _, state = jax.jit(tx.update)(zeros, state, params)
        assert set(labels[np.asarray(state.masks["kernel"])]) == kept


def test_k_by_rules():
    params = {n: {"kernel": jax.random.normal(jax.random.key(i), (4, 6))} for i, n in enumerate("ab")}
    tx = sparsejax.prox_l0(optax.sgd(0.1), end=5, k={"a/*": 1, "*": 4}, pattern="channel")
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert [int(np.asarray(state.masks[n]["kernel"])[0].sum()) for n in "ab"] == [1, 4]


def test_nuclear_matches_numpy_and_ends_at_the_rank():
    key = jax.random.key(0)
    for shape in ((6, 4), (4, 6)):
        params = {"kernel": jax.random.normal(key, shape), "bias": jnp.ones(3)}
        tx = build("nuclear", strength=0.9, sparsity=0.5, update_every=2, end=4)
        step, state, p = jax.jit(tx.update), tx.init(params), params
        x = np.float64(params["kernel"])
        for index in range(8):
            grads = {"kernel": jax.random.normal(jax.random.key(index), shape), "bias": jnp.ones(3)}
            updates, state = step(grads, state, p)
            p = optax.apply_updates(p, updates)
            x = x - 0.2 * np.asarray(grads["kernel"])
            left, values, right = np.linalg.svd(x, full_matrices=False)
            if index in (1, 3):
                x = (left * np.maximum(values - 2 * 0.2 * 0.9, 0)) @ right
                assert int(state.metrics["rank"]) == (values > 2 * 0.2 * 0.9).sum()
            elif index == 4:
                basis = left[:, :2] if shape[0] < shape[1] else right[:2].T
            if index >= 4:
                x = basis @ basis.T @ x if shape[0] < shape[1] else x @ basis @ basis.T
            np.testing.assert_allclose(p["kernel"], x, atol=1e-5)
        assert np.linalg.matrix_rank(np.asarray(p["kernel"]), tol=1e-4) == 2
        np.testing.assert_allclose(p["bias"], 1 - 8 * 0.2, rtol=1e-5)


KERNEL = {"dense": {"kernel": jnp.ones((4, 6))}}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"k": 7, "pattern": "channel"},
            "k for dense/kernel must be an integer from 1 to its 6 groups, got 7",
        ),
        (
            {"k": {"dense/*": 0}, "pattern": "channel"},
            "k for dense/kernel must be an integer from 1 to its 6",
        ),
        (
            {"k": 7, "pattern": "channel", "allocation": "global"},
            "k for all leaves together must be an integer",
        ),
        ({"k": {"other/*": 1}}, r"no rule of k matches 'dense/kernel' \(rules: other/\*\)"),
        ({"k": {"other/*": 1, "*": 2}}, r"k rule 'other/\*' matches no sparsified parameter .*dense/kernel"),
        ({"k": 2, "pattern": "2:4"}, "dense/kernel has pattern 2:4, which fixes its own number: leave k out"),
        (
            {"k": 2, "allocation": {"*": 0.5}},
            "give either allocation or k, got allocation={'\\*': 0.5} and k=2",
        ),
        ({"k": 2, "sparsity": 0.5}, "give either sparsity or k, got sparsity=0.5 and k=2"),
        ({"sparsity": 0.5, "allocation": "lamp"}, "a prox needs fixed numbers of groups"),
        (
            {"sparsity": 0.5, "pattern": "2:4", "allocation": "global"},
            "dense/kernel cannot share a budget with others",
        ),
        ({"sparsity": 0.5, "strength": -1.0}, "strength must be a finite number of at least 0, got -1.0"),
        ({"sparsity": 0.5, "end": None}, "give either end, .* or steps"),
        ({"sparsity": 0.5, "end": -1}, "end must be a step that is at least 0, got -1"),
        ({"sparsity": 0.5, "metric": "euclid"}, "unknown metric 'euclid'; did you mean 'euclidean'"),
        ({"sparsity": 0.5, "metric": "adam"}, "needs an inner optimizer that keeps second moments"),
        ({"sparsity": 0.5, "weights": "size"}, "unknown weights 'size'; did you mean 'sizes'"),
        ({"sparsity": 0.5, "pattern": Group(np.zeros((5, 1), int))}, "do not broadcast to dense/kernel"),
    ],
)
def test_bad_input(keywords, message):
    given = {"learning_rate": 0.1, "strength": 1.0, "end": 5, **keywords}
    with pytest.raises(ValueError, match=message):
        sparsejax.wgsef(optax.sgd(0.1), **given).init(KERNEL)


def test_steps_place_the_end():
    tx = sparsejax.prox_l0(optax.sgd(0.1), steps=8, k=1, pattern="channel")
    params = {"kernel": jax.random.normal(jax.random.key(0), (2, 3))}
    step, state, ends = jax.jit(tx.update), tx.init(params), []
    for _ in range(8):
        _, state = step(
            {"kernel": 10 * jax.random.normal(jax.random.key(int(state.count)), (2, 3))}, state, params
        )
        ends.append(np.asarray(state.masks["kernel"])[0])
    np.testing.assert_array_equal(ends[6], ends[7])
    assert any((x != y).any() for x, y in itertools.pairwise(ends[:6]))
