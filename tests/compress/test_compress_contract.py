"""What every layer-wise method must do; a method joins by a line in `CASES`."""

import itertools
import typing
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import compress
from sparsejax.compress import statistics
from sparsejax.compress.base import Layerwise
from sparsejax.patterns import Block, Unstructured, parse

INPUTS, OUTPUTS = 32, 24

# name: (the method, the scope in which its unstructured count is exact)
CASES = {
    "dsnot": (compress.dsnot(), "row"),
    "group_pruning": (compress.group_pruning(), "layer"),
    "jlcm": (compress.jlcm(compress.wanda(), codewords=4, groups=2, steps=3), "row"),
    "least_squares": (compress.least_squares(), "row"),
    "magnitude": (compress.magnitude(), "layer"),
    "rtn": (compress.rtn(compress.wanda()), "row"),
    "sparsegpt": (compress.sparsegpt(block=12), "layer"),
    "wanda": (compress.wanda(), "row"),
}
ROUNDED = ("jlcm", "rtn")  # also quantise
COLUMNS = ("group_pruning",)  # only blocks of one output
PATTERNS = (
    *(("unstructured", 0.3), ("2:4", None), ("4:8", 0.5), ("1:4", 0.75)),
    *(("block:4x4", 0.3), ("block:8x1", 0.3)),
)


def can(name, pattern) -> bool:
    return isinstance(parse(pattern), CASES[name][0].patterns) and (name not in COLUMNS or "x1" in pattern)


def usual(name) -> str:
    return "block:8x1" if name in COLUMNS else "unstructured"


GRID = [
    (name, pattern, sparsity)
    for name, (pattern, sparsity) in itertools.product(CASES, PATTERNS)
    if can(name, pattern)
]


@cache
def layer(kind="normal"):
    """A kernel and the statistics of its inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 20, INPUTS)) * np.exp(rng.normal(size=INPUTS)) + rng.normal(size=INPUTS)
    kernel = rng.normal(size=(INPUTS, OUTPUTS))
    if kind == "dead":
        x[..., 3:20] = 0
    if kind == "all dead":
        x[:] = 0
    if kind == "constant":
        x[:], kernel[:] = 1.5, -0.25
    if kind == "few tokens":
        x = x[:1, :3]
    stats = statistics.of(statistics.NAMES, jnp.asarray(x, jnp.float32))
    return jnp.asarray(kernel, jnp.float32), stats


@cache
def pruned(name, pattern, sparsity, kind="normal"):
    return CASES[name][0].prune(*layer(kind), sparsity, pattern)


def check(name, pattern, sparsity, kernel, mask):
    """Counts, pattern, zeros, dtypes."""
    kernel, mask = np.asarray(kernel), np.asarray(mask)
    assert kernel.dtype == np.float32 and mask.dtype == np.bool_
    assert kernel.shape == mask.shape == (INPUTS, OUTPUTS)
    assert np.isfinite(kernel).all() and not kernel[~mask].any()
    rule = parse(pattern)
    if isinstance(rule, Unstructured) and CASES[name][1] == "row":
        assert (mask.sum(0) == INPUTS - int(sparsity * INPUTS)).all()
    elif isinstance(rule, Unstructured):
        assert mask.sum() == mask.size - int(sparsity * mask.size)
    elif isinstance(rule, Block):
        rows, columns = rule.shape
        units = mask.reshape(INPUTS // rows, rows, OUTPUTS // columns, columns).transpose(0, 2, 1, 3)
        assert (units.all((2, 3)) == units.any((2, 3))).all()
        count = units.shape[0] * units.shape[1]
        assert units.all((2, 3)).sum() == count - int(sparsity * count)
    else:
        assert (mask.reshape(INPUTS // rule.m, rule.m, OUTPUTS).sum(1) == rule.n).all()


def test_every_layerwise_method_is_here():
    returns = {
        name: typing.get_type_hints(factory).get("return") for name, factory in compress.METHODS.items()
    }
    assert sorted(CASES) == sorted(name for name, kind in returns.items() if kind is Layerwise)


@pytest.mark.parametrize(("name", "pattern", "sparsity"), GRID)
def test_counts_and_pattern_are_exact(name, pattern, sparsity):
    check(name, pattern, sparsity, *pruned(name, pattern, sparsity))


@pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name, pattern, _ in GRID])
def test_sparsity_zero_is_the_kernel_itself(name, pattern):
    kernel, mask = pruned(name, pattern, 0.0)
    if name not in ROUNDED:
        np.testing.assert_array_equal(kernel, layer()[0])
    assert np.asarray(mask).all()


@pytest.mark.parametrize("kind", ["dead", "all dead", "constant", "few tokens"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", CASES)
def test_odd_inputs(name, pattern, kind):
    if can(name, pattern):
        check(name, pattern, 0.5, *pruned(name, pattern, 0.5, kind))


@pytest.mark.parametrize("name", CASES)
def test_deterministic(name):
    again = CASES[name][0].prune(*layer(), 0.3, usual(name))
    for one, other in zip(pruned(name, usual(name), 0.3), again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_jit(name):
    method = CASES[name][0]
    run = jax.jit(lambda kernel, stats: method.prune(kernel, stats, 0.3, usual(name)))
    if method.host:
        with pytest.raises(ValueError, match="host"):
            run(*layer())
        return
    kernel, mask = run(*layer())
    expected, expected_mask = pruned(name, usual(name), 0.3)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    method = CASES[name][0]
    kernel, stats = layer()
    with pytest.raises(
        ValueError, match=r"cannot do the pattern channel \(it can do: .*(block:|unstructured)"
    ):
        method.prune(kernel, stats, 0.5, "channel")
    for sparsity in (1.0, -0.1, None):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
            method.prune(kernel, stats, sparsity, usual(name))
    if name in COLUMNS:
        return
    with pytest.raises(ValueError, match="its sparsity must be a multiple of 1/4, got 0.3"):
        method.prune(kernel, stats, 0.3, "2:4")
    with pytest.raises(ValueError, match="divisible by 64"):
        method.prune(kernel, stats, None, "1:64")
