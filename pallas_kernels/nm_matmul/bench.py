"""Bench of `nm_matmul` against dense, BCOO, and on CPUs scipy's CSR."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul.bench import peers
from pallas_kernels.nm_matmul import nm_matmul
from pallas_kernels.nm_matmul.layout import index_bits
from pallas_kernels.nm_matmul.reference import dense
from pallas_kernels.timing import REPEATS, blocking, compare


def cases(size: int | None = None):
    """Square weights of `size`: 2:4 at several batches, on GPUs from one row to thousands, and other patterns."""
    on_gpu = jax.default_backend() == "gpu"
    size = size or (8192 if on_gpu else 2048)
    common = {"size": size, "dtype": "bfloat16" if on_gpu else "float32", "gradients": False}
    for batch in (1, 4, 16, 256, 4096) if on_gpu else (1, 16, 256):
        yield common | {"n": 2, "m": 4, "batch": batch}
    for n, m in ((1, 4), (4, 8), (8, 16)):
        yield common | {"n": n, "m": m, "batch": 16 if on_gpu else 256}
    yield common | {"n": 2, "m": 4, "batch": 256, "gradients": True}


def random_weight(rng, rows: int, columns: int, n: int, m: int):
    """A random n:m weight as `values (rows / m n, columns)` and packed indices."""
    codes = np.sort(rng.random((rows // m, m, columns)).argsort(axis=1)[:, :n], axis=1).reshape(-1, columns)
    bits = (codes[:, None] >> np.arange(index_bits(m))[:, None]) & 1
    indices = np.packbits(bits.reshape(-1, columns).astype(np.uint8), axis=0, bitorder="little")
    return rng.normal(size=codes.shape).astype(np.float32), indices


def run(case: dict, repeats: int = REPEATS) -> dict:
    """Measures a case, see `timing.compare`."""
    rng = np.random.default_rng(0)
    size, batch, n, m, dtype = (case[key] for key in ("size", "batch", "n", "m", "dtype"))
    values, indices = (jnp.asarray(array) for array in random_weight(rng, size, size, n, m))
    x, values = jnp.asarray(rng.normal(size=(batch, size)), dtype), values.astype(dtype)
    weight = jax.jit(dense, static_argnums=(2, 3))(values, indices, n, m)

    def ours(x, values, indices):
        return nm_matmul(x, values, indices, n=n, m=m)

    # On tensor cores without sparsity a compressed weight needs as many operations as a dense one.
    work = 2.0 * batch * size * size, values.dtype.itemsize * (values.size + 2.0 * x.size) + indices.size
    title = f"{n}:{m} of {size}x{size}, batch {batch}"
    if case["gradients"]:
        return _gradients(ours, x, values, indices, weight, title, work, n, m, repeats)
    functions = blocking(ours, x, values, indices), blocking(jnp.dot, x, weight)
    return compare("nm_matmul", title, *functions, peers(x, weight), work, repeats)


def _gradients(ours, x, values, indices, weight, title, work, n, m, repeats):
    """The gradient for x and the one for the weight; the cotangent is x itself."""

    def backward(x, values, indices):
        return jax.vjp(lambda x, values: ours(x, values, indices), x, values)[1](x)

    def dense_backward(x, weight):
        return jax.vjp(jnp.dot, x, weight)[1](x)

    def comparable(gradients):
        groups = gradients[1].reshape(-1, m, gradients[1].shape[1])
        kept = dense(jnp.ones_like(values), indices, n, m).reshape(groups.shape) != 0
        order = jnp.argsort(~kept, axis=1, stable=True)[:, :n]
        return gradients[0], jnp.take_along_axis(groups, order, axis=1).reshape(values.shape)

    functions = blocking(backward, x, values, indices), blocking(dense_backward, x, weight)
    work = tuple(2 * each for each in work)
    return compare("nm_matmul", f"gradients, {title}", *functions, {}, work, repeats, comparable)
