"""Benches of the inner loops: `python -m sparsejax.bench [NAME ...] [--json] [--repeats=N]`, all without a name.

As in `experiments.run`, freed memory is kept (see `sparsejax.allocator`). Every line compares ours with a
baseline measured in the same process, each the median of repeats that alternate between the two (of training
steps the mean, which counts the changes of masks). For selection and proximal operators the ratio is
baseline / ours (how many times faster), for transforms it is ours / baseline (what it costs). The memory bench
runs nothing: it asks the compiler.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import sparsejax
from pallas_kernels import timing
from pallas_kernels.timing import blocking
from sparsejax import models, nn, proximal, selection
from sparsejax.allocator import keep_freed_memory
from sparsejax.masks import choose


class Result(NamedTuple):
    """One line of a bench: ours and a baseline's time (or memory), in `unit`."""

    case: str
    ours: float
    baseline: str
    theirs: float
    ratio: float
    ratio_is: str
    unit: str = "ms"


def measure(
    case: str,
    ours: Callable,
    baseline: str,
    other: Callable,
    repeats: int,
    cost: bool = False,
    average: Callable = statistics.median,
) -> Result:
    """Times two functions of no arguments alternately; each must block until its result is ready."""
    mine, theirs = timing.measure({"ours": ours, "baseline": other}, repeats, average).values()
    ratio, ratio_is = (mine / theirs, "ours/baseline") if cost else (theirs / mine, "baseline/ours")
    return Result(case, mine, baseline, theirs, ratio, ratio_is)


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
    # Short stretches follow the machine's moods; the mean, not the median, since one in four changes the masks.
    steps, stretches = 25, 4
    tx = sparsejax.rigl(adam, sparsity=0.9, update_every=steps * stretches)
    dense = _training(model, sparsejax.dense(adam), params, batch, steps)
    for case, every_step in (("", False), (", masked again in every step", True)):
        yield measure(
            f"rigl: {steps} training steps, masks changed every {steps * stretches}{case}",
            _training(model, tx, params, batch, steps, every_step), "dense training steps", dense,
            stretches * repeats, cost=True, average=statistics.mean,
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


# --- proximal operators ------------------------------------------------------------------------------


def proximal_bench(repeats: int) -> Iterator[Result]:
    """The WGSEF prox of a million groups, a tenth of them kept, against sorting all breakpoints."""
    norms = jnp.abs(jax.random.normal(jax.random.key(0), (10**6,)))
    sizes = jnp.exp(0.5 * jax.random.normal(jax.random.key(1), norms.shape))
    prox = jax.jit(lambda v, lam, k, weights: proximal.wgsef_prox(v, lam, k, weights=weights))
    k = jnp.uint32(norms.size // 10)
    for title, weights in (("", jnp.ones_like(norms)), (", unequal weights", sizes)):
        for lam in (0.01, 1.0, 100.0):
            case = f"WGSEF prox, 1M groups, lam {lam:g}{title}"
            ours = blocking(prox, norms, lam, k, weights)
            yield measure(case, ours, "jnp.sort", blocking(_prox_by_sorting, norms, lam, k, weights), repeats)
    host = [np.asarray(array, np.float32) for array in (norms, weights)]
    numpy_version = partial(_prox_by_sorting, host[0], np.float32(lam), int(k), host[1], np)
    yield measure(case, ours, "np.sort", numpy_version, repeats)


def _prox_by_sorting(v, lam, k, weights, xp=jnp):
    """The textbook solution: all breakpoints of sum clip(b t - c, 0, 1) sorted, the sum at each of them by
    cumulative sums of the slopes that begin and end there, and t interpolated where it reaches k."""
    c = lam * weights
    b = xp.sqrt(c) * xp.abs(v)
    breaks = xp.concatenate([c / b, (1 + c) / b])
    order = xp.argsort(breaks)
    breaks, slopes = breaks[order], xp.cumsum(xp.concatenate([b, -b])[order])
    sums = xp.concatenate([xp.zeros(1, v.dtype), xp.cumsum(slopes[:-1] * xp.diff(breaks))])
    i = xp.searchsorted(sums, xp.asarray(k, v.dtype)) - 1
    t = breaks[i] + (k - sums[i]) / slopes[i]
    u = xp.clip(b * t - c, 0, 1)
    return v * u / (u + c)


# --- memory ------------------------------------------------------------------------------------------

# XLA orders CPU programs for concurrency unless told otherwise; on an accelerator memory comes first anyway.
MEMORY_FIRST = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def memory_bench(repeats: int) -> Iterator[Result]:
    """Peak memory of an Adam step on a stack of linear layers, parameters and optimizer state included."""
    del repeats
    width, depth = 1024, 6
    layers = {
        "low_rank": {"rank": width // 8},
        "monarch": {},
        "sparse_low_rank": {"rank": width // 8, "density": 0.03},
    }
    orders = (
        {"memory first": MEMORY_FIRST, "default order": {}} if jax.default_backend() == "cpu" else {"": {}}
    )
    for order, options in orders.items():
        dense = _peak({"name": "dense"}, width, depth, options)
        for name, keywords in layers.items():
            ours = _peak({"name": name, **keywords}, width, depth, options)
            case = f"{name}: Adam step of {depth} layers {width} x {width}, {order}".removesuffix(", ")
            yield Result(case, ours, "dense layers", dense, ours / dense, "ours/baseline", "MiB")


def _peak(spec: dict, width: int, depth: int, options: dict) -> float:
    """MiB that XLA plans for a training step of `depth` linear layers on a batch of 128."""
    model = linen.Sequential([nn.linear(spec, width) for _ in range(depth)])
    x, adam = jax.ShapeDtypeStruct((128, width), jnp.float32), optax.adam(1e-3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = variables.pop("params")

    def step(params, state, variables, x):
        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params, **variables}, x)))

        updates, state = adam.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(adam.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, variables, x)
    plan = lowered.compile(compiler_options=options).memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (held + plan.temp_size_in_bytes) / 2**20


BENCHES = {
    "selection": selection_bench,
    "proximal": proximal_bench,
    "transforms": transforms_bench,
    "memory": memory_bench,
}


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
            print(json.dumps(_fields(result)) if args.json else _line(result), flush=True)


def _fields(result: Result) -> dict:
    """The result with its unit in the names: `ours_ms` and `baseline_ms`, or `ours_mib` and `baseline_mib`."""
    found, unit = result._asdict(), result.unit.lower()
    names = {"ours": f"ours_{unit}", "theirs": f"baseline_{unit}"}
    return {names.get(name, name): value for name, value in found.items() if name != "unit"}


def _line(result: Result) -> str:
    return (
        f"{result.case:66s} {timing.four_digits(result.ours):>9s} {result.unit:3s}  {result.baseline:22s} "
        f"{timing.four_digits(result.theirs):>9s} {result.unit:3s}  "
        f"{result.ratio_is} = {result.ratio:.3g}"
    )


if __name__ == "__main__":
    main()
