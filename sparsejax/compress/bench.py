"""Wanda and SparseGPT on one square layer: `python -m sparsejax.compress.bench [--size=4096] [--tokens=N] [--json]`.

Ours against plain NumPy and SciPy implementations of the same equations, in one process, the median of alternating
repeats after a first run of each. One line per case:

  gram             X^T X of a batch of tokens, and its running mean
  wanda            row-wise mask at 50 %
  wanda 2:4
  sparsegpt        factor and sweep at 50 %, blocks of 128
  sparsegpt 2:4

The memory is the peak of the process during one call of ours above what it held before, in copies of the layer (the
kernel and the Gram matrix exist already), sampled every millisecond from the operating system (Linux).
"""

import argparse
import ctypes
import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from pallas_kernels.timing import measure
from sparsejax.compress import sparsegpt, statistics, wanda

BLOCK, DAMPING, SPARSITY = 128, 0.01, 0.5


def gram_numpy(rows, gram, count):
    """The mean of x x^T over the tokens so far and those in `rows`."""
    total = count + len(rows)
    return gram * (count / total) + (rows.T @ rows) / total


def wanda_numpy(weights, norms, nm=None):
    """Wanda for weights `(out, in)`: new weights."""
    scores = np.abs(weights) * norms
    mask = np.ones(weights.shape, bool)
    if nm is None:
        lowest = np.argpartition(scores, int(SPARSITY * scores.shape[1]), axis=1)
        np.put_along_axis(mask, lowest[:, : int(SPARSITY * scores.shape[1])], False, 1)
    else:
        groups = scores.reshape(len(scores), -1, nm[1])
        lowest = np.argpartition(groups, nm[1] - nm[0], axis=2)[..., : nm[1] - nm[0]]
        np.put_along_axis(mask.reshape(groups.shape), lowest, False, 2)
    return np.where(mask, weights, 0)


def sparsegpt_numpy(weights, gram, nm=None):
    """SparseGPT for weights `(out, in)`, in the form of the paper: new weights.

    The Hessian is factorised, inverted and factorised again by LAPACK in float64; the sweep is in float32.
    """
    w = np.array(weights, np.float32)
    h = 2.0 * gram.astype(np.float64)
    h[np.diag_indices_from(h)] += DAMPING * np.mean(np.diag(h))
    h, _ = scipy.linalg.lapack.dpotri(scipy.linalg.cholesky(h, lower=True, overwrite_a=True), lower=1)
    h = np.tril(h) + np.tril(h, -1).T
    u = scipy.linalg.cholesky(h, overwrite_a=True).astype(np.float32)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        block, corner = w[:, start:end].copy(), u[start:end, start:end]
        mask, errors = np.ones(block.shape, bool), np.zeros_like(block)
        if nm is None:
            scores = (block / np.diag(corner)) ** 2
            count = int(SPARSITY * scores.size)
            mask.ravel()[np.argpartition(scores, count, axis=None)[:count]] = False
        for j in range(end - start):
            if nm and j % nm[1] == 0:
                scores = (block[:, j : j + nm[1]] / np.diag(corner)[j : j + nm[1]]) ** 2
                lowest = np.argpartition(scores, nm[1] - nm[0], axis=1)[:, : nm[1] - nm[0]]
                np.put_along_axis(mask[:, j : j + nm[1]], lowest, False, 1)
            q = np.where(mask[:, j], block[:, j], 0)
            errors[:, j] = (block[:, j] - q) / corner[j, j]
            block[:, j:] -= np.outer(errors[:, j], corner[j, j:])
            block[:, j] = q
        w[:, start:end] = block
        w[:, end:] -= errors @ u[start:end, end:]
    return w


def cases(size: int, tokens: int):
    """{name: (ours, NumPy's)}, functions of no arguments that block and return a kernel `(in, out)`, or a Gram matrix."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((tokens, size), np.float32)
    rows += 2 * rows[:, rng.integers(size, size=size)]  # correlated inputs
    weights = rng.standard_normal((size, size), np.float32)
    gram = gram_numpy(rows, np.zeros((size, size), np.float32), 0)
    norms = np.sqrt(np.diagonal(gram))
    kernel, x = jnp.asarray(weights.T.copy()), jnp.asarray(rows)[None]
    stats = {"gram": jnp.asarray(gram), "square": jnp.asarray(norms**2)}
    before = statistics.of(("gram",), x)
    update = jax.jit(statistics.update)

    def ours(method, pattern):
        # another method each time: it may keep what it made of the Gram matrix
        return lambda: jax.block_until_ready(method().prune(kernel, stats, SPARSITY, pattern)[0])

    return {
        "gram": (
            lambda: jax.block_until_ready(update(before, x)["gram"]),
            lambda: gram_numpy(rows, gram, tokens),
        ),
        "wanda": (ours(wanda, "unstructured"), lambda: wanda_numpy(weights, norms).T),
        "wanda 2:4": (ours(wanda, "2:4"), lambda: wanda_numpy(weights, norms, (2, 4)).T),
        "sparsegpt": (ours(sparsegpt, "unstructured"), lambda: sparsegpt_numpy(weights, gram).T),
        "sparsegpt 2:4": (ours(sparsegpt, "2:4"), lambda: sparsegpt_numpy(weights, gram, (2, 4)).T),
    }


def resident() -> int:
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_extra(function) -> int:
    """Bytes that the process holds at most during a call, above what it held before."""
    ctypes.CDLL(None).malloc_trim(0)  # else the call would be given what earlier ones freed
    before, seen, done = resident(), [0], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(resident() - before)
            time.sleep(1e-3)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return max(seen)


def run(size: int, tokens: int, repeats: int):
    """Yields one dict per case."""
    for name, (ours, theirs) in cases(size, tokens).items():
        found, expected = np.asarray(ours()), theirs()
        times = measure({"ours": ours, "numpy": theirs}, repeats)
        peak = peak_extra(ours)
        yield {
            "case": name,
            "size": size,
            **times,
            "ratio": times["numpy"] / times["ours"],
            "peak_extra_mib": peak / 2**20,
            "peak_extra_layers": peak / (4 * size * size),
            "difference": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--tokens", type=int, default=0, help="of the batch; default twice the size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    for result in run(options.size, options.tokens or 2 * options.size, options.repeats):
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        print(
            "{case:14s} {size}x{size}  ours {ours:9.1f} ms  NumPy {numpy:9.1f} ms  NumPy/ours {ratio:6.2f}  memory "
            "+{peak_extra_layers:.2f} layers  relative difference {difference:.1e}".format(**result),
            flush=True,
        )


if __name__ == "__main__":
    main()
