"""Benches of the inner loops: `python -m sparsejax.bench [selection|transforms] [--json] [--repeats=N]`.

As in `experiments.run`, freed memory is kept (see `sparsejax.allocator`). Every line compares ours with a
baseline measured in the same process, each the median of repeats that alternate between the two. For
selection the ratio is baseline / ours (how many times faster), for transforms it is ours / baseline (what it
costs).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparsejax
from sparsejax import models, selection
from sparsejax.allocator import keep_freed_memory
from sparsejax.masks import choose


class Result(NamedTuple):
    """One line of a bench; times in milliseconds."""

    case: str
    ours_ms: float
    baseline: str
    baseline_ms: float
    ratio: float
    ratio_is: str


def measure(
    case: str, ours: Callable, baseline: str, other: Callable, repeats: int, cost: bool = False
) -> Result:
    """Times two functions of no arguments alternately; each must block until its result is ready."""
    times = {ours: [], other: []}
    for function in times:
        function()
    for _ in range(repeats):
        for function, seen in times.items():
            start = time.perf_counter()
            function()
            seen.append(1e3 * (time.perf_counter() - start))
    mine, theirs = (statistics.median(seen) for seen in times.values())
    ratio, ratio_is = (mine / theirs, "ours/baseline") if cost else (theirs / mine, "baseline/ours")
    return Result(case, mine, baseline, theirs, ratio, ratio_is)


def blocking(function: Callable, *args) -> Callable:
    """`function(*args)` compiled, as a function of no arguments that waits for the result."""
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*args))


# --- selection ---------------------------------------------------------------------------------------


def selection_bench(repeats: int) -> Iterator[Result]:
    """Exact top-k at 16M float32 scores: whole array, whole tree, rows, and groups of four."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (4096, 4096)))
    tenth = jnp.uint32(scores.size // 10)
    flat = scores.reshape(-1)
    run = partial(measure, repeats=repeats)
    yield run(
        "top 10 % of 16M float32",
        blocking(selection.top_k_mask, flat, tenth),
        "jnp.sort",
        blocking(jnp.sort, flat),
    )
    tied = jnp.round(flat, 1)
    yield run(
        "top 10 % of 16M float32, 50 values", blocking(selection.top_k_mask, tied, tenth), "jnp.sort",
        blocking(jnp.sort, tied),
    )  # fmt: skip
    tree = dict(enumerate(jnp.split(scores, 8)))
    yield run(
        "top 10 % of a tree of 8 x 2M", blocking(selection.global_top_k_masks, tree, tenth), "jnp.sort",
        blocking(jnp.sort, flat),
    )  # fmt: skip
    yield run(
        "top 410 of each of 4096 rows", blocking(lambda x, k: selection.top_k_mask(x, k, axis=1), scores, 410),
        "lax.top_k", blocking(lambda x: jax.lax.top_k(x, 410), scores),
    )  # fmt: skip
    groups = scores.reshape(-1, 4)
    pattern = sparsejax.patterns.NM(2, 4, axis=-1)
    yield run(
        "2:4 of 16M",
        blocking(pattern.mask, scores),
        "lax.top_k",
        blocking(lambda x: jax.lax.top_k(x, 2), groups),
    )


# --- transforms --------------------------------------------------------------------------------------


def transforms_bench(repeats: int) -> Iterator[Result]:
    """RigL at 90 % on a 4M-weight MLP: one mask update in Adam updates, and a training step against dense."""
    model = models.build("mlp", 10, hidden=(1664, 1664))
    batch = {"x": jax.random.normal(jax.random.key(1), (128, 784)), "y": jnp.arange(128) % 10}
    params = model.init(jax.random.key(0), batch["x"])["params"]
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), params)
    adam = optax.adam(1e-3)

    def one_update(tx):
        state = tx.init(params)
        if tx is not adam:
            state = state._replace(count=jnp.ones([], jnp.int32))  # nothing changes at step 0
        return blocking(tx.update, grads, state, params)

    for name in ("rigl", "set_", "snfs"):
        tx = sparsejax.transforms.build(name, adam, sparsity=0.9, update_every=1)
        yield measure(
            f"{name}: update with a change of masks, 4M weights", one_update(tx), "Adam update", one_update(adam),
            repeats, cost=True,
        )  # fmt: skip
    steps = 100
    tx = sparsejax.rigl(adam, sparsity=0.9, update_every=steps)
    dense = _training(model, sparsejax.dense(adam), params, batch, steps)
    for case, every_step in (("", False), (", masked again in every step", True)):
        yield measure(
            f"rigl: {steps} training steps, one change of masks{case}",
            _training(model, tx, params, batch, steps, every_step), "dense training steps", dense,
            repeats, cost=True,
        )  # fmt: skip


def _training(model, tx, params, batch, steps: int, every_step: bool = False) -> Callable:
    """A function that takes `steps` training steps, starting where it stopped before.

    The weights are masked once at the start; every update keeps them zero outside the masks, so that masking
    them again in every step is only needed for straight-through methods.
    """

    def step(params, state):
        masks = sparsejax.get_masks(state)

        def loss(params):
            params = sparsejax.apply_masks(params, masks) if every_step else params
            logits = model.apply({"params": params}, batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    params = sparsejax.apply_masks(params, sparsejax.get_masks(state))
    carry = jax.tree.map(jnp.array, (params, state))  # copies: the step donates its arguments

    def run():
        nonlocal carry
        for _ in range(steps):
            carry = step(*carry)
        jax.block_until_ready(carry)

    return run


BENCHES = {"selection": selection_bench, "transforms": transforms_bench}


def main() -> None:
    """Runs the benches named on the command line, all of them if none is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench", description=__doc__.split("\n")[0])
    parser.add_argument("bench", nargs="*", metavar="|".join(BENCHES), help="which benches (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken (%(default)s)")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    try:
        benches = [choose("bench", name, BENCHES) for name in args.bench or BENCHES]
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    for bench in benches:
        for result in bench(args.repeats):
            print(json.dumps(result._asdict()) if args.json else _line(result), flush=True)


def _line(result: Result) -> str:
    return (
        f"{result.case:66s} {result.ours_ms:9.1f} ms   {result.baseline:22s} {result.baseline_ms:9.1f} ms   "
        f"{result.ratio_is} = {result.ratio:.3g}"
    )


if __name__ == "__main__":
    main()
