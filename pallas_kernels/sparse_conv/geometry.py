"""Strides, padding and sizes of convolutions, and the copies of an image in which positions become whole rows."""

import numbers
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def as_pair(name: str, value) -> tuple[int, int]:
    """An integer or a pair of them as a pair; ValueError unless they are at least 1."""
    pair = _integers((value, value) if isinstance(value, numbers.Integral) else value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two integers of at least 1, got {value}")
    return pair


def _integers(values) -> tuple[int, ...]:
    """The integers in a sequence; none if it is no sequence of integers."""
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        return ()


def pads_of(shape, kernel_size, strides, padding):
    """The padding `((low, high), (low, high))` of images `(batch, H, W, I)`; ValueError if it cannot be."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID", "SAME_LOWER"):
            raise ValueError(
                f"padding must be SAME, SAME_LOWER, VALID or two pairs of integers of at least 0, got {padding!r}"
            )
        pads = lax.padtype_to_pads(shape[1:3], kernel_size, strides, padding.upper())
    else:
        pads = tuple(map(_integers, padding)) if isinstance(padding, Iterable) else ()
        if len(pads) != 2 or any(len(pair) != 2 or min(pair) < 0 for pair in pads):
            raise ValueError(
                f"padding must be SAME, SAME_LOWER, VALID or two pairs of integers of at least 0, got {padding}"
            )
    padded = [size + sum(pair) for size, pair in zip(shape[1:3], pads, strict=True)]
    if any(size < kernel for size, kernel in zip(padded, kernel_size, strict=True)):
        raise ValueError(
            f"the padded images must be at least as large as the kernel {kernel_size}, got {tuple(padded)}"
        )
    return tuple(pads)


def out_size(shape, kernel_size, strides) -> tuple[int, int]:
    """The height and width of the result for padded images `(batch, H, W, I)`."""
    return tuple(
        (size - kernel) // stride + 1
        for size, kernel, stride in zip(shape[1:3], kernel_size, strides, strict=True)
    )


def lengths(indices):
    """`(B,)` int32: how many of the slots `(B, L)` are used; padding before a used one counts."""
    slots = jnp.arange(1, indices.shape[1] + 1)
    return jnp.max(jnp.where(indices >= 0, slots, 0), axis=1).astype(jnp.int32)


class Shifted(NamedTuple):
    """Copies of images in which a position of the kernel is an image and a number of rows.

    Attributes:
      images: `(copies, batch, rows, width, I)`; the width is a multiple of what was asked for, filled up with zeros.
      source: `(B, P)` int32: the copy of each kept position.
      row: `(B, P)` int32: how many rows further down in it.
    """

    images: jax.Array
    source: jax.Array
    row: jax.Array


def shifted(x, positions, kernel_size, strides, multiple: int) -> Shifted:
    """One copy of padded images for each column of the kernel and each phase of its rows.

    Kernels can begin to read at any row, but along a row only at whole tiles; so shifts along rows are made beforehand.
    Columns are already those of the result, rows are every `strides[0]`-th.
    """
    (kernel_rows, kernel_columns), (down, right) = kernel_size, strides
    height, width = out_size(x.shape, kernel_size, strides)
    rows = height + (kernel_rows - 1) // down
    x = jnp.pad(x, ((0, 0), (0, max(0, rows * down - x.shape[1])), (0, 0), (0, 0)))
    copies = [
        x[:, phase : phase + (rows - 1) * down + 1 : down, column : column + (width - 1) * right + 1 : right]
        for phase in range(min(down, kernel_rows))
        for column in range(kernel_columns)
    ]
    images = jnp.pad(jnp.stack(copies), ((0, 0),) * 3 + ((0, -width % multiple), (0, 0)))
    row, column = positions // kernel_columns, positions % kernel_columns
    source = row % down * kernel_columns + column
    return Shifted(images, source.astype(jnp.int32), (row // down).astype(jnp.int32))
