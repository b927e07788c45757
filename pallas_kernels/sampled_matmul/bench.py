"""Bench of `sampled_matmul` and `block_sampled_matmul` against the whole product and BCOO's sampled product."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from pallas_kernels.block_sparse_matmul.bench import block_ell
from pallas_kernels.sampled_matmul import block_sampled_matmul, sampled_matmul
from pallas_kernels.sampled_matmul.reference import block_sampled
from pallas_kernels.timing import REPEATS, blocking, compare


def cases(size: int | None = None):
    """Square products of `size` with an inner size of an eighth: single entries, then blocks."""
    on_gpu = jax.default_backend() == "gpu"
    size = size or (8192 if on_gpu else 2048)
    common = {"size": size, "inner": max(1, size // 8), "dtype": "bfloat16" if on_gpu else "float32"}
    for density in (0.001, 0.01, 0.1):
        yield common | {"block": None, "density": density}
    for side in (32, 128):
        yield common | {"block": min(side, size), "density": 0.1}


def run(case: dict, repeats: int = REPEATS) -> dict:
    """Measures a case, see `timing.compare`."""
    rng = np.random.default_rng(0)
    size, inner, dtype = case["size"], case["inner"], case["dtype"]
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((size, inner), (inner, size)))
    title = f"{case['density']:.1%} of {size}x{size}, inner {inner}"
    return (_blocks if case["block"] else _entries)(case, rng, a, b, title, repeats)


def bcoo_sampled(a, b, pairs):
    """The entries of `a @ b` at `pairs (nnz, 2)`, by the sampled product of `jax.experimental.sparse`."""
    dimensions = (((1,), (0,)), ((), ()))
    return sparse.bcoo_dot_general_sampled(a, b, pairs, dimension_numbers=dimensions)


def _work(a, count: int):
    size = a.dtype.itemsize
    return 2.0 * count * a.shape[1], size * (count + 2.0 * a.size)


def _entries(case, rng, a, b, title, repeats):
    size = case["size"]
    count = max(1, round(size * size * case["density"]))
    positions = np.sort(rng.choice(size * size, count, replace=False))
    rows, cols = (jnp.asarray(part, jnp.int32) for part in divmod(positions, size))
    pairs = jnp.stack([rows, cols], axis=1)
    peers = {"BCOO": blocking(bcoo_sampled, a, b, pairs)}
    functions = blocking(sampled_matmul, a, b, rows, cols), blocking(jnp.dot, a, b)
    return compare(
        "sampled_matmul",
        f"entries, {title}",
        *functions,
        peers,
        _work(a, count),
        repeats,
        lambda c: c[rows, cols],
    )


def _blocks(case, rng, a, b, title, repeats):
    side = case["block"]
    _, indices = block_ell(rng, case["size"], side, case["density"], balanced=False)
    indices = jnp.asarray(indices)

    def ours(a, b, indices):
        return block_sampled_matmul(a, b, indices, (side, side))

    def comparable(whole):
        return block_sampled(jnp.eye(case["size"], dtype=whole.dtype), whole, indices, (side, side))

    count = int((indices >= 0).sum()) * side * side
    functions = blocking(ours, a, b, indices), blocking(jnp.dot, a, b)
    title = f"blocks {side}x{side}, {title}"
    return compare("sampled_matmul", title, *functions, {}, _work(a, count), repeats, comparable)
