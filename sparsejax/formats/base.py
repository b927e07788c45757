"""What all packed formats share: frozen dataclasses that are pytrees.

The arrays of a format are its leaves; the dense shape and the pattern are static. `jax.jit`, `jax.device_put`,
`jax.tree.map` and shardings therefore see plain arrays, and `jax.vmap` may map over formats whose leaves were
stacked. Unflattening checks nothing; `check` does, on the host.

A format stores the *matrix view* of a weight: all axes but the last, merged, are the rows K, the last is the
columns N, so that a convolution's kernel (h, w, in, out) is the matrix (h w in, out) of its im2col product. The
weight's own shape is kept, and `to_dense` and `mask` return it.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

MAX_SIZE = 2**31 - 1  # positions and counts are int32


class Packed:
    """Base class of the formats; see the module.

    Attributes:
      shape: the dense shape.
      data: the leaf with the kept weights, the only one that has a gradient.
    """

    NAME: ClassVar[str]
    DATA: ClassVar[str]  # the leaf that holds the kept weights

    shape: tuple[int, ...]

    @property
    def format(self) -> str:
        """The format as `sparsejax.formats.pack` takes it."""
        return self.NAME

    def with_data(self, data):
        """The same pattern with other weights, an array of the shape of `data`."""
        return dataclasses.replace(self, **{self.DATA: data})

    @property
    def dtype(self):
        """The dtype of the weights."""
        return getattr(self, self.DATA).dtype

    @property
    def ndim(self) -> int:
        """How many axes the dense array has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many entries the dense array has."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(K, N) of the matrix view."""
        return matrix_shape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def compression_ratio(self) -> float:
        """Bytes of the dense array over `nbytes`."""
        return self.size * jnp.dtype(self.dtype).itemsize / self.nbytes

    def to_dense(self):
        """The dense array: kept weights bit for bit, zeros elsewhere."""
        raise NotImplementedError

    def mask(self):
        """Bool array of the dense shape: True where the format stores a weight, also if that is zero."""
        raise NotImplementedError

    def check(self, name: str = "array") -> None:
        """Raises ValueError, naming `name`, unless the leaves are of the format; host only."""
        raise NotImplementedError

    def __array__(self, dtype=None, copy=None):
        """For `np.asarray`: the dense array on the host, always a copy."""
        if copy is False:
            raise ValueError(f"{self!r} is packed, so that its dense array is a copy")
        return np.asarray(self.to_dense(), dtype)

    def __repr__(self):
        data = getattr(self, self.DATA)
        dtype = getattr(data, "dtype", "?")  # transformed trees hold anything in place of leaves
        return f"{type(self).__name__}({self.format}, {dtype}{list(self.shape)})"


def static(**kwargs) -> Any:
    """A dataclass field that belongs to the structure of the pytree and not to its leaves."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def register(cls):
    """Makes a subclass of `Packed` a frozen dataclass and a pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls))


def is_packed(leaf) -> bool:
    """Whether `leaf` is an array in a packed format; the `is_leaf` of maps over packed trees."""
    return isinstance(leaf, Packed)


def matrix_shape(shape) -> tuple[int, int]:
    """(K, N) of the matrix view of an array of `shape`."""
    return math.prod(shape[:-1]), shape[-1]


def inner_rows(shape) -> int:
    """Entries of axis -2 (1 for a vector): groups and blocks of rows must not straddle it."""
    return shape[-2] if len(shape) > 1 else 1


def is_traced(*arrays) -> bool:
    """Whether any of the arrays is being traced."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_pair(w, mask, name: str) -> None:
    """Raises ValueError unless `mask` has the shape of `w`, which has axes and from 1 to 2**31 - 1 entries."""
    if not w.shape or not w.size:
        raise ValueError(f"{name} of shape {w.shape} holds nothing that a format could pack")
    if w.size > MAX_SIZE:
        raise ValueError(f"{name} has {w.size} entries, but formats hold at most {MAX_SIZE}")
    check_mask(w, mask, name)


def check_mask(w, mask, name: str) -> None:
    """Raises ValueError unless `mask` has the shape of `w`."""
    if mask.shape != w.shape:
        raise ValueError(
            f"the mask of {name} has shape {mask.shape}, but it must be of the weight's shape {w.shape}"
        )


def check_shape(shape, name: str) -> None:
    """Raises ValueError unless a format can have this shape: at least one axis, from 1 to 2**31 - 1 entries."""
    if not shape or min(shape) < 1 or math.prod(shape) > MAX_SIZE:
        raise ValueError(
            f"the shape of {name} must have at least one axis and from 1 to {MAX_SIZE} entries, got {shape}"
        )


def on_host(w, mask, name: str, format: str):
    """The matrix views of a weight and its mask as numpy arrays; weights under a soft mask are scaled by it.

    Args:
      w: array with at least one axis.
      mask: array of the same shape, bool, or float as in soft masks: what is not zero is kept.
      name, format: for errors.

    Returns:
      `(K, N)` array of the dtype of `w`, and `(K, N)` bool array.

    Raises:
      ValueError: while tracing, or if the shapes differ.
    """
    if is_traced(w, mask):
        raise ValueError(
            f"{name} cannot be packed as {format} inside jax.jit, where the count of kept weights, and with it "
            "the shapes of the result, is unknown; pack it outside"
        )
    w, mask = np.asarray(w), np.asarray(mask)
    check_pair(w, mask, name)
    if mask.dtype != bool:
        w, mask = w * mask.astype(w.dtype), mask != 0
    view = matrix_shape(w.shape)
    return w.reshape(view), mask.reshape(view)


def index_of(row: int, column: int, shape) -> tuple[int, ...]:
    """Index into an array of `shape` of an entry of its matrix view."""
    return tuple(int(i) for i in np.unravel_index(row * shape[-1] + column, shape))


def expect(name: str, field: str, array, shape, *dtypes: str) -> None:
    """Raises ValueError unless a leaf has this shape and one of these dtypes (none named: any)."""
    if tuple(array.shape) != tuple(shape):
        raise ValueError(
            f"{field} of {name} must have shape {tuple(shape)}, but its shape is {tuple(array.shape)}"
        )
    if dtypes and str(array.dtype) not in dtypes:
        raise ValueError(f"{field} of {name} must be {' or '.join(dtypes)}, but it is {array.dtype}")
