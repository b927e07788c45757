"""Products of a dense input with packed weights against the dense product, timed in one process; the runs of the
table `speedup`."""

import json
import pathlib
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax
from pallas_kernels.timing import blocking, max_error, measure
from sparsejax.allocator import keep_freed_memory
from sparsejax.formats import pack, to_bcoo, to_scipy
from sparsejax.masks import choose
from sparsejax.patterns import parse

ENGINES = ("sparsejax", "BCOO", "scipy")


def product(engine: str, x, packed):
    """A function of no arguments that multiplies `x` with a packed weight in an engine, and blocks."""
    if choose("engine", engine, ENGINES) == "sparsejax":
        return blocking(sparsejax.matmul, x, packed)
    if engine == "BCOO":
        return blocking(lambda x, w: x @ w, x, to_bcoo(packed))
    host, turned = np.asarray(x), to_scipy(packed).T.tocsr()
    return lambda: (turned @ host.T).T


def run(config: Mapping, workdir: pathlib.Path) -> dict:
    """Executes one row of the table; see `sparsejax.training.run` for the face of such a function.

    Args:
      config: `seed`; `size` of the square weight and `batch` of the input, float32; `pattern` and `sparsity` of its
        mask, by magnitude; `format`, as `sparsejax.formats.pack` takes it; `engine`, one of `ENGINES`; `repeats`, of
        which the median is taken.
      workdir: where `summary.json` is left.

    Returns:
      `speedup`, the milliseconds of the dense product in XLA over those of the engine's; `milliseconds` and
      `dense_milliseconds`; `memory`, the bytes of the packed weight over those of the dense one; `max_error`,
      relative to the largest output; `seconds` in all.
    """
    begun = time.perf_counter()
    keep_freed_memory()
    keys = jax.random.split(jax.random.key(config["seed"]), 2)
    w = jax.random.normal(keys[0], (config["size"],) * 2)
    x = jax.random.normal(keys[1], (config["batch"], config["size"]))
    mask = parse(config["pattern"]).mask(jnp.abs(w), config["sparsity"])
    packed = pack(w, mask, config["format"])
    functions = {
        "dense": blocking(jnp.dot, x, jnp.where(mask, w, 0)),
        "ours": product(config["engine"], x, packed),
    }
    times = measure(functions, config["repeats"])
    summary = {
        "speedup": times["dense"] / times["ours"],
        "milliseconds": times["ours"],
        "dense_milliseconds": times["dense"],
        "memory": packed.nbytes / w.nbytes,
        "max_error": max_error(functions["ours"](), functions["dense"]()),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
