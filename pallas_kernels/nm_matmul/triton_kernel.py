"""The Triton function of `triton`; Triton itself is imported with it, and only then."""

import triton
import triton.language as tl


@triton.jit
def nm_kernel(
    x_ref,
    values_ref,
    indices_ref,
    y_ref,
    batch: tl.constexpr,
    inner: tl.constexpr,
    columns: tl.constexpr,
    entries: tl.constexpr,
    n: tl.constexpr,
    m: tl.constexpr,
    bits: tl.constexpr,
    steps: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`y[part] = x @ W` over one part of the contracted axis, for all rows and `COLUMNS` columns."""
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        entry = (part * steps + step) * ENTRIES + tl.arange(0, ENTRIES)
        stored = (entry < entries)[:, None] & (column < columns)[None, :]
        value = tl.load(values_ref + entry[:, None] * columns + column[None, :], stored, 0.0)
        byte = tl.load(indices_ref + (entry * bits // 8)[:, None] * columns + column[None, :], stored, 0)
        code = (byte.to(tl.int32) >> (entry * bits % 8)[:, None]) & (m - 1)
        k = (entry // n * m)[:, None] + code
        wanted = (row < batch)[:, None, None] & stored[None, :, :]
        x = tl.load(x_ref + row[:, None, None] * inner + k[None, :, :], wanted, 0.0)
        total += tl.sum(value[None, :, :].to(tl.float32) * x.to(tl.float32), axis=1)
    at = (part * batch + row)[:, None] * columns + column[None, :]
    tl.store(y_ref + at, total, (row < batch)[:, None] & (column < columns)[None, :])
