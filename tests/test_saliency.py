"""Saliency of groups against plain numpy, the choice of the lowest against enumeration, the decay against
its closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import saliency
from sparsejax.structure import Groups, Layer, Slices

# Two layers of three and four channels; "scale" holds one channel of the first layer nowhere, one twice.
GROUPS = Groups(
    [
        Layer("a", 3, {"a": Slices(-1, np.arange(3)), "scale": Slices(0, np.array([0, 1, -1, 1]))}, {"b": Slices(0, np.arange(3))}),
        Layer("b", 4, {"b": Slices(-1, np.arange(4))}, {}),
    ]
)  # fmt: skip


def trees(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in
         {"a": (5, 3), "b": (3, 4), "other": (2,), "scale": (4,)}.items()}
        for _ in range(2)
    )  # fmt: skip


def members(tree):
    """The own weights of every group as a list of numpy vectors."""
    a, b, scale = (np.asarray(tree[name], np.float64) for name in ("a", "b", "scale"))
    first = [np.append(a[:, 0], scale[0]), np.concatenate([a[:, 1], scale[[1, 3]]]), a[:, 2]]
    return first + [b[:, i] for i in range(4)]


def mixture(params, updates, criteria):
    """The formulas of the module, one group at a time."""
    total = np.zeros(GROUPS.count)
    for name in criteria:
        scores = []
        for x, u in zip(members(params), members(updates), strict=True):
            g = -u
            cosine = x @ g / np.linalg.norm(x) / np.linalg.norm(g)
            scores.append({
                "magnitude": np.linalg.norm(x),
                "average_magnitude": np.linalg.norm(x) / x.size,
                "cosine": 1 - cosine,
                "cosine_released": 1 + cosine,
                "taylor": abs(x @ g),
                "taylor_squared": 0.5 * (x @ g) ** 2,
            }[name])  # fmt: skip
        total += 0.2 * np.asarray(scores) / np.linalg.norm(scores)
    return total


@pytest.mark.parametrize("criteria", [saliency.DEFAULT, *([name] for name in saliency.CRITERIA)], ids=str)
def test_saliency_equals_numpy(criteria):
    params, updates = trees()
    found = saliency.saliency(GROUPS, params, updates, criteria)
    np.testing.assert_allclose(found, mixture(params, updates, criteria), rtol=1e-5)
    for factor in (1e-12, 7, 1e9):
        scaled = jax.tree.map(lambda u, factor=factor: factor * u, updates)
        np.testing.assert_allclose(saliency.saliency(GROUPS, params, scaled, criteria), found, rtol=1e-4)


def test_a_group_on_its_way_to_zero_is_redundant():
    """The sign of the cosine: all groups are equally large, one shrinks, one grows, the others turn."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4)), "scale": jnp.zeros(4)}
    turn = jnp.asarray([[1.0], [-1.0]])
    updates = {
        "a": jnp.tile(turn, 3).at[:, 0].set(-1.0),
        "b": jnp.tile(turn, 4).at[:, 2].set(1.0),
        "scale": jnp.zeros(4),
    }
    scores = saliency.saliency(GROUPS, params, updates, ["cosine"])
    assert np.argmin(scores) == 0 and np.argmax(scores) == 5
    released = saliency.saliency(GROUPS, params, updates, ["cosine_released"])
    assert np.argmin(released) == 5 and np.argmax(released) == 0


def test_saliency_without_a_gradient_is_finite():
    params, updates = trees()
    still = jax.tree.map(jnp.zeros_like, updates)
    assert np.isfinite(saliency.saliency(GROUPS, params, still)).all()
    assert np.isfinite(saliency.saliency(GROUPS, still, still)).all()


@pytest.mark.parametrize("seed", range(4))
def test_lowest_equals_enumeration(seed):
    """The set of least total score among those of the right size that leave every layer its best."""
    rng = np.random.default_rng(seed)
    scores, available = rng.random(7).astype(np.float32), rng.random(7) < 0.8
    available[[0, 3]] = True
    layers = [[i for i in range(3) if available[i]], [i for i in range(3, 7) if available[i]]]
    allowed = [i for layer in layers for i in layer if i != max(layer, key=lambda i: scores[i])]
    for k in range(len(allowed) + 1):
        best = min(itertools.combinations(allowed, k), key=lambda chosen: scores[list(chosen)].sum())
        found = saliency.lowest(GROUPS, jnp.asarray(scores), k, jnp.asarray(available))
        assert set(np.flatnonzero(found)) == set(best)


def test_lowest_is_exact_among_equals():
    found = saliency.lowest(GROUPS, jnp.ones(7), 5)
    assert found.sum() == 5 and not found[:3].all() and not found[3:].all()


def test_shrinking_is_a_line_to_exactly_zero():
    params, _ = trees()
    flags = jnp.arange(7) % 2 == 0
    still, now, steps = jax.tree.map(jnp.zeros_like, params), params, 7
    for t in range(steps):
        updates = saliency.shrink(GROUPS, flags, (steps - t - 1) / (steps - t), still, now)
        now = jax.tree.map(jnp.add, now, updates)
        line = jax.tree.map(lambda x, t=t: x * (1 - (t + 1) / steps), params)
        expected = GROUPS.select(flags, line, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), now, expected)
    gone = members(now)
    assert all(not gone[i].any() for i in range(0, 7, 2))
    np.testing.assert_array_equal(now["other"], params["other"])
    assert now["scale"][2] == params["scale"][2], "a weight that belongs to no channel stays"


def test_an_update_comes_before_the_shrinking():
    params, updates = trees()
    changed = saliency.shrink(GROUPS, jnp.ones(7, bool), 0.25, updates, params)
    np.testing.assert_allclose(
        params["a"] + changed["a"], 0.25 * (params["a"] + updates["a"]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(changed["other"], updates["other"])


@pytest.mark.parametrize("sparsity, count", [(0.0, 0), (0.28, 1), (0.29, 2), (0.5, 3), (0.72, 5)])
def test_the_count_is_floored(sparsity, count):
    assert saliency.redundant_count(GROUPS, sparsity) == count


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"sparsity=0.9 removes 6 of 7 groups, but each of the 2 layers keeps one: at most 5"
    ):
        saliency.redundant_count(GROUPS, 0.9)
    with pytest.raises(TypeError, match="groups must be a sparsejax.structure.Groups.*got 'channels'"):
        saliency.redundant_count("channels", 0.5)
    with pytest.raises(ValueError, match="unknown criterion of saliency 'cosinus'; did you mean 'cosine'"):
        saliency.check_criteria(["magnitude", "cosinus"])
    with pytest.raises(ValueError, match="saliency needs at least one criterion"):
        saliency.check_criteria(())
