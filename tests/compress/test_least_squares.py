"""Masked least squares against numpy's solver, one output at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import compress
from sparsejax.compress import statistics

RNG = np.random.default_rng(0)
W = RNG.normal(size=(32, 24)).astype(np.float32)
X = (
    RNG.normal(size=(4, 20, 32)) @ (np.eye(32) + 0.3 * RNG.normal(size=(32, 32))) + RNG.normal(size=32)
).astype(np.float32)
STATS = statistics.of(("gram", "square"), jnp.asarray(X))
MASK = RNG.random(W.shape) < 0.5


def hessian(damping):
    gram = np.asarray(STATS["gram"], np.float64)
    return 2 * (gram + damping * np.mean(np.diag(gram)) * np.eye(32))


def solved(mask, damping):
    h, best = hessian(damping), np.zeros(W.shape)
    for o, kept in enumerate(np.asarray(mask).T):
        best[kept, o] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ W[:, o].astype(np.float64))
    return best


def loss(kernel, damping=0.01):
    delta = W - np.asarray(kernel, np.float64)
    return 0.5 * np.trace(delta.T @ hessian(damping) @ delta)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_equals_a_solve_per_output(damping):
    found = compress.masked_least_squares(jnp.asarray(W), jnp.asarray(MASK), STATS["gram"], damping=damping)
    np.testing.assert_allclose(found, solved(MASK, damping), atol=2e-4)
    assert not np.asarray(found)[~MASK].any()


def test_every_iteration_is_nearer():
    def after(n):
        return loss(
            compress.masked_least_squares(jnp.asarray(W), jnp.asarray(MASK), STATS["gram"], iterations=n)
        )

    losses = [after(n) for n in (0, 1, 2, 4, 8)]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[0] == pytest.approx(loss(np.where(MASK, W, 0)))


@pytest.mark.parametrize("initial", [compress.magnitude(), compress.sparsegpt()])
def test_refits_what_another_method_keeps(initial):
    method = compress.least_squares(initial)
    start, mask = initial.prune(jnp.asarray(W), STATS, 0.5, "unstructured")
    kernel, refitted = method.prune(jnp.asarray(W), STATS, 0.5, "unstructured")
    np.testing.assert_array_equal(mask, refitted)
    np.testing.assert_allclose(kernel, solved(mask, 0.01), atol=2e-4)
    assert loss(kernel) < loss(start)
    assert method.name == f"{initial.name}+least_squares" and "gram" in method.needs
    assert method.host == initial.host


def test_dead_inputs_lose_nothing_and_change_nothing_else():
    live = np.arange(32) != 5
    gram = STATS["gram"] * live * live[:, None]
    found = compress.masked_least_squares(jnp.asarray(W), jnp.asarray(MASK), gram)
    np.testing.assert_allclose(np.asarray(found)[5], np.where(MASK, W, 0)[5], atol=1e-5)
    rest = compress.masked_least_squares(jnp.asarray(W[live]), jnp.asarray(MASK[live]), gram[live][:, live])
    np.testing.assert_allclose(np.asarray(found)[live], rest, atol=1e-4)


def test_wrappers_keep_what_they_wrap():
    for wrap in (compress.least_squares, compress.rtn, compress.jlcm, compress.dsnot):
        assert wrap(compress.sparsegpt()).host
        rules = wrap(compress.dsnot(skip="mlp/*")).rules
        assert {rule: method.name for rule, method in rules.items()} == {"mlp/*": wrap(compress.wanda()).name}
        assert wrap(compress.wanda()).rules is None
    assert compress.rtn(compress.group_pruning()).patterns == compress.group_pruning().patterns


@pytest.mark.parametrize("name", ["damping", "tolerance", "iterations"])
@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"least_squares needs a finite {name} >= 0, got {value}"):
        compress.least_squares(**{name: value})


def test_a_full_mask_gives_the_kernel():
    found = compress.masked_least_squares(jnp.asarray(W), jnp.ones(W.shape, bool), STATS["gram"])
    np.testing.assert_array_equal(found, W)
