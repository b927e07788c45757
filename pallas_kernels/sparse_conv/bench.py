"""Bench of `sparse_conv` and `pattern_conv` against dense, and for 1 x 1 on CPUs scipy's CSR and BSR."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv import pack_pattern, pack_pointwise, pattern_conv, reference, sparse_conv
from pallas_kernels.timing import REPEATS, blocking, compare

PATTERNS = 8  # of the kept positions of 3 x 3 filters: four each, with the one in the middle


def cases(size: int | None = None):
    """Layers with `size` input and output channels on images of 28 x 28, of which one is a batch on CPUs."""
    on_gpu = jax.default_backend() == "gpu"
    size = size or 512
    common = {
        "size": size,
        "batch": 64 if on_gpu else 1,
        "image": 28,
        "dtype": "bfloat16" if on_gpu else "float32",
    }
    for block, density in ((1, 0.1), (2, 0.1), (4, 0.1), (4, 0.05), (16, 0.1)):
        yield common | {"kernel": 1, "block": block, "density": density, "gradients": False}
    for strides in (1, 2):
        yield common | {"kernel": 3, "strides": strides, "gradients": False}
    yield common | {"kernel": 1, "block": 4, "density": 0.1, "gradients": True}
    yield common | {"kernel": 3, "strides": 1, "gradients": True}


def pointwise_kernel(rng, size: int, block: int, density: float):
    """A kernel `(1, 1, size, size)` whose blocks of output channels keep a share of the input channels at random."""
    kept = rng.random((size, -(-size // block))) < density
    kept = np.repeat(kept, block, axis=1)[:, :size]
    return (rng.normal(size=(size, size)) * kept).astype(np.float32)[None, None]


def pattern_kernel(rng, size: int):
    """A kernel `(3, 3, size, size)` whose filters follow `PATTERNS` patterns, by turns."""
    masks = np.zeros((PATTERNS, 9), bool)
    masks[:, 4] = True
    for mask in masks:
        mask[rng.choice(np.delete(np.arange(9), 4), 3, replace=False)] = True
    kept = masks[np.arange(size) % PATTERNS].T.reshape(3, 3, 1, size)
    return (rng.normal(size=(3, 3, size, size)) * kept).astype(np.float32)


def run(case: dict, repeats: int = REPEATS) -> dict:
    """Measures a case, see `timing.compare`."""
    rng = np.random.default_rng(0)
    size, dtype, kernel_side = case["size"], case["dtype"], case["kernel"]
    strides = case.get("strides", 1)
    x = jnp.asarray(rng.normal(size=(case["batch"], case["image"], case["image"], size)), dtype)
    if kernel_side == 1:
        host = pointwise_kernel(rng, size, case["block"], case["density"])
        packed = pack_pointwise(host, block=case["block"])
        ours, unpack = _pointwise(size)
        title = f"1x1 in blocks of {case['block']}, {case['density']:.0%} of {size} to {size}"
    else:
        host = pattern_kernel(rng, size)
        packed = pack_pattern(host)
        ours, unpack = _pattern(size, strides)
        title = f"3x3, {PATTERNS} patterns of 4, {size} to {size}, stride {strides}"
    packed = packed[0].astype(dtype), *packed[1:]
    title += f", {case['batch']}x{case['image']}x{case['image']}"
    dense = jnp.asarray(host, dtype)

    def theirs(x, kernel):
        return reference.convolve(x, kernel, (strides, strides), "SAME")

    stored = int((host != 0).sum())
    pixels = x[..., 0].size // strides**2
    work = 2.0 * pixels * stored, x.dtype.itemsize * (stored + x.size + float(pixels) * size)
    if case["gradients"]:
        return _gradients((ours, theirs), x, packed, dense, unpack, title, work, repeats)
    functions = blocking(ours, x, *packed), blocking(theirs, x, dense)
    others = peers(x, host, case["block"]) if kernel_side == 1 else {}
    return compare("sparse_conv", title, *functions, others, work, repeats)


def _pointwise(size):
    """The convolution with a packed kernel, and how to unpack one."""

    def unpack(values, indices):
        return reference.pointwise_kernel(values, indices, size, size)[None, None]

    return lambda x, values, indices: sparse_conv(x, values, indices, features=size), unpack


def _pattern(size, strides):
    """As `_pointwise`, for 3 x 3 kernels."""

    def convolve(x, *packed):
        return pattern_conv(x, *packed, kernel_size=(3, 3), features=size, strides=strides)

    return convolve, lambda *packed: reference.pattern_kernel(*packed, (3, 3), size)


def _gradients(functions, x, packed, dense, unpack, title, work, repeats):
    """The gradients for the images and for the weights; the cotangent is all ones."""
    ours, theirs = functions

    def backward(x, values, *indices):
        return jax.grad(lambda x, values: ours(x, values, *indices).sum(), (0, 1))(x, values)

    def dense_backward(x, kernel):
        return jax.grad(lambda x, kernel: theirs(x, kernel).sum(), (0, 1))(x, kernel)

    def comparable(gradients):
        kept = jax.vjp(lambda values: unpack(values, *packed[1:]), packed[0])[1](gradients[1])
        return gradients[0], *kept

    both = blocking(backward, x, *packed), blocking(dense_backward, x, dense)
    work = tuple(2 * each for each in work)
    return compare("sparse_conv", f"gradients, {title}", *both, {}, work, repeats, comparable)


def peers(x, kernel, block: int) -> dict:
    """Other ways to multiply pixels with a 1 x 1 kernel that is mostly zeros."""
    if jax.default_backend() != "cpu":
        return {}
    import scipy.sparse

    pixels = np.ascontiguousarray(np.asarray(x, np.float32).reshape(-1, x.shape[-1]).T)
    turned = scipy.sparse.csr_array(kernel[0, 0].T)
    found = {"scipy CSR": lambda: turned @ pixels}
    if block > 1 and turned.shape[0] % block == 0:
        blocked = turned.tobsr((block, 1))
        found["scipy BSR"] = lambda: blocked @ pixels
    return found
