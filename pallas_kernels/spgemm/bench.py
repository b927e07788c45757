"""Bench of `spgemm`'s numeric phase, and of its gradients, against dense, BCOO, and on CPUs scipy's CSR."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from pallas_kernels.spgemm import spgemm, spgemm_plan
from pallas_kernels.spgemm.reference import dense
from pallas_kernels.spgemm.symbolic import coordinates
from pallas_kernels.timing import REPEATS, blocking, compare

BCOO_PAIRS = 2**24  # BCOO multiplies every entry of one factor with every entry of the other


def cases(size: int | None = None):
    """Square matrices of `size` with entries at random places, or in a band as wide as the rows are long."""
    on_gpu = jax.default_backend() == "gpu"
    size = size or (8192 if on_gpu else 2048)
    common = {"size": size, "dtype": "bfloat16" if on_gpu else "float32"}
    for density in (0.001, 0.01, 0.05):
        yield common | {"density": density, "band": False, "gradients": False}
    yield common | {"density": 0.05, "band": True, "gradients": False}
    yield common | {"density": 0.01, "band": False, "gradients": True}


def csr(rng, size: int, density: float, band: bool):
    """The arrays of a CSR matrix with rows of `density * size` entries, on average if they are at random places."""
    if band:
        offset = np.abs(np.arange(size)[:, None] - np.arange(size))
        kept = 2 * offset < max(1, density * size)
    else:
        kept = rng.random((size, size)) < density
    rows, columns = np.nonzero(kept)
    indptr = np.searchsorted(rows, np.arange(size + 1))
    data = rng.normal(size=rows.size).astype(np.float32)
    return data, columns.astype(np.int32), indptr.astype(np.int32)


def run(case: dict, repeats: int = REPEATS) -> dict:
    """Measures a case, see `timing.compare`."""
    rng = np.random.default_rng(0)
    size, dtype = case["size"], case["dtype"]
    host = [csr(rng, size, case["density"], case["band"]) for _ in range(2)]
    a, b = ((jnp.asarray(data, dtype), *map(jnp.asarray, places)) for data, *places in host)
    plan = spgemm_plan(a, b, columns=size)
    full = [dense(data, coordinates(*places), (size, size)) for data, *places in (a, b)]
    products = int(np.diff(host[1][2])[host[0][1]].sum())
    entries = a[0].size + b[0].size + plan.indices.size
    work = 2.0 * products, (4.0 + a[0].dtype.itemsize) * entries
    title = f"{case['density']:.1%} x {case['density']:.1%} of {size}x{size}" + (
        ", banded" if case["band"] else ""
    )

    def ours(a, b, plan):
        return spgemm(a, b, columns=size, plan=plan)[0]

    if case["gradients"]:
        return _gradients(ours, a, b, plan, full, title, work, repeats)
    place = coordinates(plan.indices, plan.indptr)
    functions = blocking(ours, a, b, plan), blocking(jnp.dot, *full)
    return compare("spgemm", title, *functions, peers(host, full), work, repeats, lambda whole: whole[place])


def _gradients(ours, a, b, plan, full, title, work, repeats):
    """The gradients for both factors; the cotangent is all ones."""

    def backward(a, b, plan):
        def total(x, y):
            return ours((x, *a[1:]), (y, *b[1:]), plan).sum()

        return jax.grad(total, (0, 1))(a[0], b[0])

    def dense_backward(a, b):
        return jax.grad(lambda a, b: jnp.dot(a, b).sum(), (0, 1))(a, b)

    def comparable(gradients):
        return tuple(whole[coordinates(*each[1:])] for whole, each in zip(gradients, (a, b), strict=True))

    functions = blocking(backward, a, b, plan), blocking(dense_backward, *full)
    work = tuple(2 * each for each in work)
    return compare("spgemm", f"gradients, {title}", *functions, {}, work, repeats, comparable)


def peers(host, full) -> dict:
    """Other ways to multiply two sparse matrices, given as CSR arrays on the host and as dense arrays."""
    found = {}
    if host[0][0].size * host[1][0].size <= BCOO_PAIRS:
        pair = [sparse.BCOO.fromdense(whole) for whole in full]
        found["BCOO"] = blocking(lambda a, b: (a @ b).data, *pair)
    if jax.default_backend() == "cpu":
        import scipy.sparse

        shape = full[0].shape
        left, right = (scipy.sparse.csr_array(each, shape=shape) for each in host)
        found["scipy CSR"] = lambda: left @ right
    return found
