"""Structured optimal brain surgeon: a layer at many sizes (Kurtic, Frantar, Alistarh 2023).

W is a kernel `(in, out)`, X its inputs, H = 2 X^T X / n + damping, P = H^-1. A structure g is the inputs that one
unit owns (a head group, a channel). With all other inputs free to change, removing it costs

  rho_g = tr(W_g^T (P_gg)^-1 W_g),

half of which is what tr(D^T H D) / 2 grows by, D the change of W; the best change of the others is

  W -= P_:,g (P_gg)^-1 W_g   with   P -= P_:,g (P_gg)^-1 P_g,:

The cheapest goes, one at a time. At every step W is the least-squares fit of the layer on the inputs that are left.

Computed on the host in float64. Removed rows leave the arrays, so that round-off cannot bring them back. Single
inputs go in chunks, within which P and W are the old ones minus a product of few columns; only their norms, the
diagonal and the column of the next pivot are kept up to date.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg

from sparsejax.compress.base import warn

_CHUNK = 64


class Snapshot(NamedTuple):
    """A layer with fewer structures.

    Attributes:
      kept: bools, one per structure.
      rows: float32 `(inputs that are left, out)`.
      error: ||X D|| / ||X W||; 1 if nothing is left.
    """

    kept: np.ndarray
    rows: np.ndarray
    error: float


class Database(NamedTuple):
    """snapshots: {size: Snapshot}; order: structures as they were removed; costs: rho of each of these."""

    snapshots: dict[int, Snapshot]
    order: list[int]
    costs: list[float]


def obs_database(kernel, gram, structures: int, sizes: Iterable[int], *, damping: float = 0.01) -> Database:
    """The layer at several numbers of structures.

    Args:
      kernel: `(in, out)`.
      gram: X^T X / n, `(in, in)`.
      structures: how many there are; each owns in / structures neighbouring inputs.
      sizes: numbers of structures, 0 to `structures`, at which a snapshot is taken.
      damping: share of the mean diagonal of 2 X^T X / n that is added to its diagonal; ten times as much, with a
        `CompressionWarning`, as often as the matrix is not positive definite.

    Raises:
      ValueError: for a Gram matrix that is not finite, or a size out of range.
    """
    kernel, gram = np.asarray(kernel, np.float64), np.asarray(gram, np.float64)
    if not np.isfinite(gram).all():
        raise ValueError("the Gram matrix of the inputs is not finite; the model's activations overflow")
    wanted = sorted({int(size) for size in sizes}, reverse=True)
    if wanted[0] > structures or wanted[-1] < 0:
        raise ValueError(f"sizes must lie in 0 to {structures}, got {wanted}")
    width, inverse, rows = len(kernel) // structures, damped_inverse(2 * gram, damping), kernel
    eliminate = _eliminate_inputs if width == 1 else _eliminate_blocks
    left, found, order, costs = np.arange(structures), {}, [], []
    for size in wanted:
        while left.size > max(size, 1):
            count = min(_CHUNK, left.size - max(size, 1))
            gone, cost, rows, inverse = eliminate(rows, inverse, count, width)
            order += left[gone].tolist()
            costs += cost
            left = np.delete(left, gone)
        if size == 0:  # nothing is left that could change
            order.append(int(left[0]))
            costs.append(float(np.sum(rows * np.linalg.solve(inverse, rows))))
            left, rows = left[:0], rows[:0]
        found[size] = _snapshot(kernel, gram, left, rows, structures)
    return Database(found, order, costs)


def damped_inverse(hessian, damping: float):
    """(H + damping mean(diag H) I)^-1, with the damping that makes it positive definite."""
    scale, tried = np.mean(np.diagonal(hessian)) or 1.0, damping
    while True:
        try:
            factor = scipy.linalg.cho_factor(hessian + tried * scale * np.eye(len(hessian)), lower=True)
        except np.linalg.LinAlgError:
            tried = max(10 * tried, 1e-6)
            continue
        if tried != damping:
            warn(f"the Gram matrix is not positive definite with damping {damping:g}, {tried:g} was used")
        return scipy.linalg.cho_solve(factor, np.eye(len(hessian)))


def _eliminate_inputs(rows, inverse, count: int, _):
    """The `count` cheapest inputs one after the other: (positions, costs, W and P without them)."""
    columns, solved = np.zeros((len(rows), count)), np.zeros((count, rows.shape[1]))
    norms, diagonal = np.sum(rows**2, 1), np.diagonal(inverse).copy()
    alive, costs, gone = np.ones(len(rows), bool), [], []
    for k in range(count):
        at = int(np.argmin(np.where(alive, norms / diagonal, np.inf)))
        before, row = columns[:, :k], rows[at] - columns[at, :k] @ solved[:k]
        column = inverse[:, at] - before @ columns[at, :k]
        pivot = np.sqrt(column[at])
        column, row = column / pivot, row / pivot
        products = rows @ row - before @ (solved[:k] @ row)
        columns[:, k], solved[k] = column, row
        norms = np.maximum(norms + column**2 * (row @ row) - 2 * column * products, 0)
        alive[at] = False
        diagonal = np.where(alive, diagonal - column**2, 1)
        costs.append(float(row @ row))
        gone.append(at)
    columns = columns[alive]
    return gone, costs, rows[alive] - columns @ solved, inverse[np.ix_(alive, alive)] - columns @ columns.T


def _eliminate_blocks(rows, inverse, count: int, width: int):
    """As `_eliminate_inputs`, for structures of `width` inputs."""
    costs, gone, left = [], [], np.arange(len(rows) // width)
    for _ in range(count):
        every = np.arange(left.size)
        blocks = inverse.reshape(left.size, width, left.size, width)[every, :, every]
        parts = rows.reshape(left.size, width, -1)
        rho = np.sum(parts * np.linalg.solve(blocks, parts), (1, 2))
        at = int(np.argmin(rho))
        out = slice(at * width, (at + 1) * width)
        stay = np.delete(np.arange(len(rows)), out)
        ratio = np.linalg.solve(inverse[out, out], inverse[out][:, stay]).T
        rows, inverse = (
            rows[stay] - ratio @ rows[out],
            inverse[np.ix_(stay, stay)] - ratio @ inverse[out][:, stay],
        )
        costs.append(float(rho[at]))
        gone.append(int(left[at]))
        left = np.delete(left, at)
    return gone, costs, rows, inverse


def _snapshot(kernel, gram, left, rows, structures: int) -> Snapshot:
    kept = np.zeros(structures, bool)
    kept[left] = True
    change = kernel.copy()
    change[np.repeat(kept, len(kernel) // structures)] -= rows
    before, after = (np.sum(matrix * (gram @ matrix)) for matrix in (kernel, change))
    error = np.sqrt(max(after, 0) / before) if before > 0 else 0.0
    return Snapshot(kept, rows.astype(np.float32), float(error) if left.size else 1.0)


__all__ = ["Database", "Snapshot", "damped_inverse", "obs_database"]
