"""Bench of `block_sparse_matmul`: the product and its gradients against dense, BCOO, and on CPUs scipy's CSR and BSR."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.reference import dense
from pallas_kernels.sampled_matmul.reference import block_sampled
from pallas_kernels.timing import REPEATS, blocking, compare


def cases(size: int | None = None):
    """Square weights of `size`, in blocks of 128 and 32 at random places, or as many in every column."""
    on_gpu = jax.default_backend() == "gpu"
    size = size or (8192 if on_gpu else 2048)
    batch = size if on_gpu else max(1, size // 8)
    common = {"size": size, "batch": batch, "dtype": "bfloat16" if on_gpu else "float32"}
    for side, density in ((128, 0.1), (128, 0.05), (128, 0.2), (32, 0.1)):
        for balanced in (False, True):
            yield common | {
                "block": min(side, size),
                "density": density,
                "balanced": balanced,
                "gradients": False,
            }
    yield common | {"block": min(128, size), "density": 0.1, "balanced": False, "gradients": True}


def block_ell(rng, size: int, side: int, density: float, balanced: bool):
    """Blocks `(columns, slots, side, side)` and their row blocks, chosen at random; `balanced` for equal columns."""
    count = size // side
    total = max(1, round(count * count * density))
    scores = rng.random((count, count))
    if balanced:
        ranks = scores.argsort(axis=0).argsort(axis=0)
        scores = ranks + scores / 2
    kept = scores <= np.sort(scores, axis=None)[total - 1]
    length = max(1, kept.sum(axis=0).max())
    indices = np.full((count, length), -1, np.int32)
    for column in range(count):
        found = np.flatnonzero(kept[:, column])
        indices[column, : found.size] = found
    blocks = rng.normal(size=(count, length, side, side)) * (indices >= 0)[..., None, None]
    return blocks.astype(np.float32), indices


def run(case: dict, repeats: int = REPEATS) -> dict:
    """Measures a case, see `timing.compare`."""
    rng = np.random.default_rng(0)
    size, batch, dtype = case["size"], case["batch"], case["dtype"]
    blocks, indices = block_ell(rng, size, case["block"], case["density"], case["balanced"])
    x = jnp.asarray(rng.normal(size=(batch, size)), dtype)
    blocks, indices = jnp.asarray(blocks, dtype), jnp.asarray(indices)
    weight = jax.jit(dense, static_argnums=2)(blocks, indices, size)

    def ours(x, blocks, indices):
        return block_sparse_matmul(x, blocks, indices, rows=size)

    stored = int((indices >= 0).sum()) * case["block"] ** 2
    work = 2.0 * batch * stored, jnp.dtype(dtype).itemsize * (stored + 2.0 * batch * size)
    title = f"{case['block']}x{case['block']} {case['density']:.0%} of {size}x{size}, batch {batch}"
    title += ", balanced" if case["balanced"] else ""
    if case["gradients"]:
        return _gradients(ours, x, blocks, indices, weight, title, work, repeats)
    functions = blocking(ours, x, blocks, indices), blocking(jnp.dot, x, weight)
    return compare("block_sparse_matmul", title, *functions, peers(x, weight, case["block"]), work, repeats)


def _gradients(ours, x, blocks, indices, weight, title, work, repeats):
    """The gradient for x and the one for the weight; the cotangent is x itself."""

    def backward(x, blocks, indices):
        return jax.vjp(lambda x, blocks: ours(x, blocks, indices), x, blocks)[1](x)

    def dense_backward(x, weight):
        return jax.vjp(jnp.dot, x, weight)[1](x)

    def comparable(gradients):
        return gradients[0], block_sampled(jnp.eye(x.shape[1]), gradients[1], indices, blocks.shape[2:])

    functions = blocking(backward, x, blocks, indices), blocking(dense_backward, x, weight)
    work = tuple(2 * each for each in work)
    title = f"gradients, {title}"
    return compare("block_sparse_matmul", title, *functions, {}, work, repeats, comparable)


def peers(x, weight, side: int | None = None) -> dict:
    """Other ways to multiply with a weight that is mostly zeros, in blocks of `side` if given."""
    found = {}
    bcoo = jax.jit(sparse.BCOO.fromdense, static_argnames="nse")(weight, nse=int((weight != 0).sum()))
    found["BCOO"] = blocking(lambda x, w: x @ w, x, bcoo)
    if jax.default_backend() == "cpu":
        import scipy.sparse

        host, turned = np.asarray(x, np.float32), scipy.sparse.csr_array(np.asarray(weight, np.float32).T)
        found["scipy CSR"] = lambda: turned @ host.T
        if side:
            blocked = turned.tobsr((side, side))
            found["scipy BSR"] = lambda: blocked @ host.T
    return found
