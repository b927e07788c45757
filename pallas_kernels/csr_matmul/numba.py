"""For CPUs, in numba, called back from XLA.

A tile of the batch is the innermost, contiguous axis, so that every stored weight costs one vector operation on it.
`matmul` adds up a tile of results for a panel of columns that the caches of one core hold, `matmul_transposed` one
row of results at a time. Threads share the tiles and panels; no two write to the same entry, and the sums have one
order whatever their number.
"""

import functools

import jax
import numba
import numpy as np

TILE = 64  # of the batch: four AVX-512 registers of float32
PANEL = 2**17  # entries of results that one core adds up in its cache
GRAIN = 2**18  # products that are worth a thread
LINE = 16  # entries of a cache line
# Sums may be reordered and fused, but infinities and NaN are respected.
FAST = {"contract", "reassoc"}


def matmul(x, data, indices, indptr, columns: int):
    """`x @ W`: `(B, K)` to `(B, columns)`."""
    out = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    return _call(functools.partial(_matmul, columns=columns), out, x, data, indices, indptr)


def matmul_transposed(g, data, indices, indptr):
    """`g @ W.T`: `(B, N)` to `(B, K)`."""
    out = jax.ShapeDtypeStruct((g.shape[0], indptr.shape[0] - 1), g.dtype)
    return _call(_matmul_transposed, out, g, data, indices, indptr)


def sampled(x, g, indices, indptr):
    """`x.T @ g` at the stored entries, `(nnz,)`."""
    return _call(_sampled, jax.ShapeDtypeStruct(indices.shape, x.dtype), x, g, indices, indptr)


def _call(function, out, *args):
    """`function` of numpy arrays from inside XLA; axes that `jax.vmap` adds are looped over."""

    def host(*args):
        args = [np.ascontiguousarray(arg) for arg in args]
        work = args[0].shape[0] * args[-2].size  # products: rows of the batch times stored weights
        numba.set_num_threads(max(1, min(work // GRAIN, numba.config.NUMBA_NUM_THREADS)))
        return function(*args).astype(out.dtype, copy=False)

    return jax.pure_callback(host, out, *args, vmap_method="sequential")


def _tile(batch: int) -> int:
    """Rows of a tile: as many tiles as threads, if these have work for whole vectors."""
    return max(1, min(TILE, max(-(-batch // numba.get_num_threads()), min(16, batch))))


def _matmul(x, data, indices, indptr, columns):
    if not x.shape[0] or not data.size:
        return np.zeros((x.shape[0], columns), x.dtype)
    tile = _tile(x.shape[0])
    width = max(1, min(columns, PANEL // tile))
    starts = _panel_starts(indices, indptr, width, -(-columns // width))
    return _product(_tiled(x, tile), data, indices, starts, x.shape[0], columns, width)


def _matmul_transposed(g, data, indices, indptr):
    if not g.shape[0] or not data.size:
        return np.zeros((g.shape[0], indptr.size - 1), g.dtype)
    return _transposed(_tiled(g, _tile(g.shape[0])), data, indices, indptr, g.shape[0])


def _sampled(x, g, indices, indptr):
    if not x.shape[0] or not indices.size:
        return np.zeros(indices.shape, x.dtype)
    return _dots(np.ascontiguousarray(x.T), np.ascontiguousarray(g.T), indices, indptr)


@numba.njit(cache=True)
def _panel_starts(indices, indptr, width, panels):
    """`(panels + 1, K)`: the first entry of each row whose column lies in a panel or beyond."""
    rows = indptr.size - 1
    starts = np.empty((panels + 1, rows), np.int64)
    for k in range(rows):
        p = indptr[k]
        for panel in range(panels):
            starts[panel, k] = p
            while p < indptr[k + 1] and indices[p] < (panel + 1) * width:
                p += 1
        starts[panels, k] = indptr[k + 1]
    return starts


@numba.njit(parallel=True, cache=True)
def _tiled(x, tile):
    """`(B, K)` as `(ceil(B / tile), K, tile)`, padded with zeros."""
    batch, rows = x.shape
    tiles, stretch = -(-batch // tile), 256
    stretches = -(-rows // stretch)
    tiled = np.zeros((tiles, rows, tile), x.dtype)
    for task in numba.prange(tiles * stretches):
        c, first = task // stretches, task % stretches * stretch
        for k in range(first, min(first + stretch, rows)):
            for b in range(c * tile, min(c * tile + tile, batch)):
                tiled[c, k, b - c * tile] = x[b, k]
    return tiled


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def _product(x, data, indices, starts, batch, columns, width):
    tiles, rows, tile = x.shape
    panels = starts.shape[0] - 1
    y = np.empty((batch, columns), x.dtype)
    for task in numba.prange(tiles * panels):
        c, panel = task // panels, task % panels
        left = panel * width
        right = min(left + width, columns)
        sums = np.zeros((right - left, tile), x.dtype)
        for k in range(rows):
            inputs = x[c, k]
            for p in range(starts[panel, k], starts[panel + 1, k]):
                weight = data[p]
                into = sums[indices[p] - left]
                for b in range(tile):
                    into[b] += weight * inputs[b]
        for first in range(left, right, LINE):  # whole cache lines of both
            for b in range(c * tile, min(c * tile + tile, batch)):
                for j in range(first, min(first + LINE, right)):
                    y[b, j] = sums[j - left, b - c * tile]
    return y


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def _transposed(g, data, indices, indptr, batch):
    tiles, columns, tile = g.shape
    rows, stretch = indptr.size - 1, 256
    stretches = -(-rows // stretch)
    y = np.empty((batch, rows), g.dtype)
    for task in numba.prange(tiles * stretches):
        c, first = task // stretches, task % stretches * stretch
        sums = np.zeros(tile, g.dtype)
        for k in range(first, min(first + stretch, rows)):
            sums[:] = 0
            for p in range(indptr[k], indptr[k + 1]):
                weight = data[p]
                inputs = g[c, indices[p]]
                for b in range(tile):
                    sums[b] += weight * inputs[b]
            for b in range(c * tile, min(c * tile + tile, batch)):
                y[b, k] = sums[b - c * tile]
    return y


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def _dots(x, g, indices, indptr):
    """Of rows of `x (K, B)` and `g (N, B)` at the stored entries."""
    found = np.empty(indices.size, x.dtype)
    for k in numba.prange(indptr.size - 1):
        for p in range(indptr[k], indptr[k + 1]):
            column = g[indices[p]]
            total = x[k, 0] * column[0]
            for b in range(1, x.shape[1]):
                total += x[k, b] * column[b]
            found[p] = total
    return found
