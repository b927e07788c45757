"""DSnoT against a plain loop over outputs, and what must hold of every swap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress import statistics
from sparsejax.compress.base import Layerwise
from sparsejax.compress.calibration import prune_layers
from sparsejax.compress.dsnot import SEQUENCE, dsnot, refine
from sparsejax.compress.wanda import wanda
from sparsejax.masks import flatten
from sparsejax.models import Transformer
from sparsejax.patterns import NM, Unstructured, parse

NEEDS = ("mean", "square", "within")


def problem(seed=0, inputs=24, outputs=7, shift=1.0):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    x = rng.normal(size=(5, 9, inputs)) * rng.gamma(2.0, size=inputs) + shift * rng.normal(size=inputs)
    return kernel, statistics.of(NEEDS, jnp.asarray(x, jnp.float32))


def by_hand(kernel, pruned, mask, stats, cycles, threshold, same_sign, group, power=1.0):
    """One output at a time, one swap at a time, in float64."""
    kernel, pruned, mask = np.asarray(kernel, float), np.asarray(pruned, float), np.array(mask)
    mean, square, within = (np.asarray(stats[name], float) for name in NEEDS)
    variance = np.maximum(within, 1e-6 * within.mean()) ** power
    before, after = (kernel - pruned).T @ mean, []
    for r in range(kernel.shape[1]):
        start, eps = mask[:, r].copy(), before[r]
        value = np.where(start, pruned[:, r], kernel[:, r])
        d, score = value * mean, np.abs(value) * np.sqrt(square)
        used = set()
        for _ in range(cycles):
            if abs(eps) * SEQUENCE <= threshold:
                break
            sign = 1 if eps > 0 else -1
            grow = [j for j in np.flatnonzero(~start) if j not in used and sign * d[j] > 0]
            if not grow:
                break
            grown = max(grow, key=lambda j: sign * d[j] / variance[j])
            free = [j for j in np.flatnonzero(start) if j not in used]
            if group:
                free = [j for j in free if j // group == grown // group]
            else:
                free = [j for j in free if sign * d[j] < 0]
            if not free and group:
                used.add(grown)
                continue
            if not free:
                break
            dropped = min(free, key=lambda j: score[j])
            new = eps + d[dropped] - d[grown]
            if same_sign and new * eps <= 0:
                break
            used.add(grown)
            if group and abs(new) >= abs(eps):
                continue
            used.add(dropped)
            eps = new
            mask[grown, r], mask[dropped, r] = True, False
        after.append(eps)
    return mask, before, np.asarray(after)


@pytest.mark.parametrize(
    ("pattern", "cycles", "same_sign"),
    [
        ("unstructured", 1, False),
        ("unstructured", 40, False),
        ("unstructured", 40, True),
        ("2:4", 40, False),
        ("4:8", 3, False),
    ],
)
def test_equals_the_plain_loop(pattern, cycles, same_sign):
    pattern = parse(pattern)
    group = pattern.m if isinstance(pattern, NM) else None
    swaps = 0
    for seed in range(4):
        kernel, stats = problem(seed)
        pruned, mask = wanda().prune(kernel, stats, 0.5, pattern)
        found = refine(kernel, pruned, mask, stats, pattern, cycles=cycles, same_sign=same_sign)
        expected, before, after = by_hand(
            kernel, pruned, mask, stats, cycles, 0.1, same_sign or group is not None, group
        )
        np.testing.assert_array_equal(found.mask, expected)
        np.testing.assert_allclose(found.before, before, atol=1e-4)
        np.testing.assert_allclose(found.after, after, atol=1e-4)
        swaps += int(found.swaps.sum())
    assert swaps > 0


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_power_of_the_variance_changes_what_is_grown_first(power):
    kernel, stats = problem()
    pruned, mask = wanda().prune(kernel, stats, 0.5, "unstructured")
    given = (kernel, pruned, mask, stats)
    expected, *_ = by_hand(*given, 2, 0.1, False, None, power)
    assert (expected != by_hand(*given, 2, 0.1, False, None)[0]).any()
    found = dsnot(cycles=2, power=power).prune(kernel, stats, 0.5, "unstructured")[1]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_counts_values_and_the_running_error(pattern):
    pattern = parse(pattern)
    kernel, stats = problem(1, inputs=64, outputs=10)
    pruned, mask = wanda().prune(kernel, stats, 0.5, pattern)
    found = refine(kernel, pruned, mask, stats, pattern, cycles=10)
    new, old = np.asarray(found.mask), np.asarray(mask)
    np.testing.assert_array_equal(new.sum(0), old.sum(0))
    if isinstance(pattern, NM):
        assert np.all(new.reshape(16, 4, 10).sum(1) == 2)
    np.testing.assert_array_equal((new & ~old).sum(0), found.swaps)
    np.testing.assert_array_equal(found.kernel, np.where(new, kernel, 0))
    np.testing.assert_allclose((kernel - found.kernel).T @ stats["mean"], found.after, atol=1e-4)
    assert np.abs(found.after).sum() < np.abs(found.before).sum()


@pytest.mark.slow
def test_each_swap_brings_the_error_down_unless_it_crosses_zero():
    crossed = 0
    for seed in range(5):
        kernel, stats = problem(seed, inputs=40)
        pruned, mask = wanda().prune(kernel, stats, 0.6, "unstructured")
        errors = [
            np.asarray(refine(kernel, pruned, mask, stats, Unstructured(), cycles=cycles).after)
            for cycles in (0, 1, 2, 3, 4)
        ]
        for old, new in zip(errors, errors[1:], strict=False):
            falls = (np.abs(new) < np.abs(old)) | (old == new)
            assert np.all(falls | (old * new < 0))
            crossed += int(np.sum(old * new < 0))
        strict = refine(kernel, pruned, mask, stats, Unstructured(), cycles=4, same_sign=True)
        assert np.all(np.sign(strict.after) == np.sign(strict.before))
    assert crossed > 0


def test_nothing_changes_without_cycles_or_means():
    kernel, stats = problem(2)
    pruned, mask = wanda().prune(kernel, stats, 0.5, "unstructured")
    for method, given in (
        (dsnot(cycles=0), stats),
        (dsnot(cycles=50), stats | {"mean": jnp.zeros(24)}),
        (dsnot(cycles=50, threshold=1e9), stats),
    ):
        found, kept = method.prune(kernel, given, 0.5, "unstructured")
        np.testing.assert_array_equal(kept, mask)
        np.testing.assert_array_equal(found, pruned)
    full, kept = dsnot().prune(kernel, stats, 0.0, "unstructured")
    assert bool(kept.all())
    np.testing.assert_array_equal(full, kernel)


def test_default_cycles_are_a_share_of_the_inputs():
    kernel, stats = problem(3, inputs=200, shift=3.0)
    found = dsnot(threshold=0.0).prune(kernel, stats, 0.5, "unstructured")[1]
    before = wanda().prune(kernel, stats, 0.5, "unstructured")[1]
    assert int((found & ~before).sum(0).max()) == 3  # ceil(0.0125 * 200)


def test_inputs_without_variance_are_guarded():
    kernel, stats = problem(4)
    for within in (jnp.zeros(24), stats["within"].at[5].set(0.0)):
        given = stats | {"within": within}
        pruned, mask = wanda().prune(kernel, given, 0.5, "unstructured")
        found = refine(kernel, pruned, mask, given, Unstructured(), cycles=5)
        assert np.all(np.isfinite(found.kernel)) and np.all(np.isfinite(found.after))
        np.testing.assert_array_equal(found.mask.sum(0), mask.sum(0))
        assert np.abs(found.after).sum() < np.abs(found.before).sum()


def test_a_first_method_that_changes_weights_keeps_what_it_changed():
    kernel, stats = problem(5, inputs=64)

    def doubled(kernel, stats, sparsity, pattern):
        pruned, mask = wanda().prune(kernel, stats, sparsity, pattern)
        return 1.2 * pruned, mask

    initial = Layerwise("doubled", ("square",), doubled)
    method = dsnot(initial, cycles=4)
    assert method.name == "doubled+dsnot" and method.needs == ("square", "mean", "within")
    found, mask = jax.jit(lambda kernel: method.prune(kernel, stats, 0.5, "unstructured"))(kernel)
    old = doubled(kernel, stats, 0.5, "unstructured")[1]
    grown = np.asarray(mask & ~old)
    assert grown.sum() > 0
    np.testing.assert_array_equal(np.asarray(found)[grown], np.asarray(kernel)[grown])
    stayed = np.asarray(mask & old)
    np.testing.assert_allclose(np.asarray(found)[stayed], 1.2 * np.asarray(kernel)[stayed], rtol=1e-6)
    result = refine(kernel, *doubled(kernel, stats, 0.5, "unstructured"), stats, Unstructured(), cycles=4)
    np.testing.assert_allclose((kernel - found).T @ stats["mean"], result.after, atol=1e-4)


@pytest.mark.slow
def test_skipped_layers_are_left_to_the_initial_method_and_errors_are_reported():
    model = Transformer(classes=11, depth=1, width=16, heads=2, mlp_ratio=2, max_length=8)
    tokens = np.random.default_rng(0).integers(0, 11, (4, 8))
    params = model.init(jax.random.key(0), jnp.asarray(tokens))["params"]
    results = [
        prune_layers(method, model, params, tokens, 0.5, progress=False)
        for method in (wanda(), dsnot(cycles=4, threshold=0.0, same_sign=True, skip="mlp/*"))
    ]
    layers = results[1].report["layers"]
    for name, mask in flatten(results[1].masks).items():
        if name in layers:
            same = bool(jnp.all(mask == flatten(results[0].masks)[name]))
            assert same == ("mlp" in name or layers[name]["swaps"] == 0)
            assert ("expected_error_before" in layers[name]) == ("mlp" not in name)
    query = layers["block_0/attention/query/kernel"]
    assert query["swaps"] > 0 and query["expected_error_after"] < query["expected_error_before"]
    assert "swaps" not in results[0].report["layers"]["block_0/attention/query/kernel"]
    with pytest.raises(ValueError, match=r"rule 'ffn/\*' of wanda\+dsnot matches no layer"):
        prune_layers(dsnot(skip=("ffn/*",)), model, params, tokens, 0.5)


def test_bad_input():
    kernel, stats = problem()
    with pytest.raises(ValueError, match="cycles of dsnot must be an integer of at least 0 or None, got -1"):
        dsnot(cycles=-1)
    with pytest.raises(ValueError, match="threshold of dsnot must be at least 0, got nan"):
        dsnot(threshold=float("nan"))
    with pytest.raises(ValueError, match="dsnot cannot do the pattern block:4x1"):
        dsnot().prune(kernel, stats, 0.5, "block:4x1")
