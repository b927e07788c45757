"""Bench of `csr_matmul`: the product and its gradients against dense, BCOO and scipy's CSR."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse

from pallas_kernels.csr_matmul import csr_matmul
from pallas_kernels.timing import REPEATS, blocking, compare


def cases(size: int | None = None):
    """Square weights of `size`, unstructured, at the batch of training and at that of serving."""
    size = size or 2048
    for density in (0.05, 0.02, 0.1):
        yield {"size": size, "batch": max(1, size // 8), "density": density, "gradients": False}
    yield {"size": size, "batch": 1, "density": 0.05, "gradients": False}
    yield {"size": size, "batch": max(1, size // 8), "density": 0.05, "gradients": True}


def run(case: dict, repeats: int = REPEATS) -> dict:
    """Measures a case, see `timing.compare`."""
    rng = np.random.default_rng(0)
    size, batch = case["size"], case["batch"]
    scores = rng.random((size, size))
    kept = (
        scores
        <= np.partition(scores, round(case["density"] * size**2) - 1, axis=None)[
            round(case["density"] * size**2) - 1
        ]
    )
    weight = np.where(kept, rng.normal(size=kept.shape), 0).astype(np.float32)
    csr = scipy.sparse.csr_array(weight.T)
    x = jnp.asarray(rng.normal(size=(batch, size)), jnp.float32)
    parts = [jnp.asarray(part) for part in (csr.data, csr.indices, csr.indptr)]

    def ours(x, data, indices, indptr):
        return csr_matmul(x, data, indices, indptr)

    title = f"{1 - case['density']:.0%} of {size}x{size} zero, batch {batch}"
    work = 2.0 * batch * csr.nnz, 8.0 * csr.nnz + 8.0 * batch * size
    if case["gradients"]:
        return _gradients(ours, x, parts, weight, title, work, repeats)
    functions = blocking(ours, x, *parts), blocking(jnp.dot, x, jnp.asarray(weight))
    return compare("csr_matmul", title, *functions, _peers(x, csr), work, repeats)


def _gradients(ours, x, parts, weight, title, work, repeats):
    """The gradient for x and the one for the weight; the cotangent is x itself."""

    def backward(x, data, *pattern):
        return jax.vjp(lambda x, data: ours(x, data, *pattern), x, data)[1](x)

    def dense_backward(x, weight):
        return jax.vjp(jnp.dot, x, weight)[1](x)

    functions = blocking(backward, x, *parts), blocking(dense_backward, x, jnp.asarray(weight))
    work = tuple(2 * each for each in work)
    kept = np.nonzero(weight.T)[::-1]
    return compare(
        "csr_matmul",
        f"gradients, {title}",
        *functions,
        {},
        work,
        repeats,
        lambda dense: (dense[0], dense[1][kept]),
    )


def _peers(x, csr) -> dict:
    peers = {"BCOO": blocking(lambda x, w: x @ w, x, sparse.BCOO.from_scipy_sparse(csr.T))}
    if jax.default_backend() == "cpu":
        host = np.asarray(x)
        peers["scipy CSR"] = lambda: csr @ host.T
    return peers
