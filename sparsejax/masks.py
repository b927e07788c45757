"""Masks: pytrees with exactly the structure of the parameters.

A sparsified leaf of a mask tree is a bool array of the parameter's shape (or a float array in [0, 1]
for soft masks); every other leaf is the scalar `True`. Because the structures always match,
`jax.tree.map(f, params, masks)` always works, inside and outside `jax.jit`.

Leaves are named by their path, for example `Dense_0/kernel`; rules on paths are shell patterns
(`fnmatch`, where `*` also crosses `/`).
"""

import difflib
import fnmatch
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Masks = Any
INCLUDE = ("*kernel", "*embedding")


@jax.custom_jvp
def mask_weight(weight, mask):
    """`weight * mask` whose derivative with respect to `weight` is the identity.

    The gradient that reaches `weight` is therefore the one of the *masked* weight, also where the mask
    is zero. Growth criteria and straight-through estimators need this dense gradient; methods that must
    not see it mask it in their `update`.

    Args:
      weight: array of any shape and float dtype.
      mask: scalar (returned unchanged), bool array of the same shape, or float array in [0, 1].
    """
    if jnp.ndim(mask) == 0:
        return weight
    if jnp.result_type(mask) == jnp.bool_:
        return jnp.where(mask, weight, jnp.zeros_like(weight))
    return weight * mask.astype(weight.dtype)


@mask_weight.defjvp
def _mask_weight_jvp(primals, tangents):
    weight, mask = primals
    weight_dot, mask_dot = tangents
    if jnp.ndim(mask) > 0 and jnp.result_type(mask) != jnp.bool_:
        weight_dot = weight_dot + weight * mask_dot.astype(weight.dtype)
    return mask_weight(weight, mask), weight_dot


def apply_masks(params, masks):
    """The parameters as the model sees them: zero wherever a mask is zero.

    Differentiating through it gives the gradient with respect to the masked weights (see `mask_weight`).
    """
    return jax.tree.map(mask_weight, params, masks)


def dense_masks(params) -> Masks:
    """Masks that sparsify nothing: the scalar `True` for every leaf."""
    return jax.tree.map(lambda _: jnp.asarray(True), params)


def copy_masks(masks) -> Masks:
    """The same masks in buffers of their own, so that a training step may donate its state."""
    return jax.tree.map(jnp.array, masks)


def check_masks(masks, params) -> None:
    """Raises ValueError, naming the first leaf, unless the masks fit the parameters."""
    found, leaves = flatten(masks), flatten(params)
    for name in (*leaves, *found):
        if name not in found or name not in leaves:
            raise ValueError(
                f"masks and parameters must have the same leaves, but only one of them has {name!r}"
            )
        if jnp.shape(found[name]) not in ((), jnp.shape(leaves[name])):
            raise ValueError(
                f"the mask of {name} has shape {jnp.shape(found[name])}; it must be a scalar or of the parameter's "
                f"shape {jnp.shape(leaves[name])}"
            )


def is_sparsified(mask) -> bool:
    """Whether a mask leaf belongs to a sparsified parameter (the scalar `True` marks a dense one)."""
    return jnp.ndim(mask) > 0


def get_masks(opt_state) -> Masks:
    """The masks held by a sparsejax transform, wherever it sits in an Optax state.

    Raises:
      ValueError: if the state holds no masks, or those of more than one transform.
    """
    return get_field(opt_state, "masks")


def get_field(opt_state, name: str):
    """The field `name` of the only NamedTuple in `opt_state` that has it (masks, fired, count ...)."""
    found = _fields(opt_state, name)
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} fields named {name!r} instead of one; "
            "it must come from exactly one sparsejax transform"
        )
    return found[0]


def find_field(opt_state, name: str):
    """As `get_field`, but None if nothing in `opt_state` has the field."""
    return get_field(opt_state, name) if _fields(opt_state, name) else None


def _fields(opt_state, name: str) -> list:
    return [
        value
        for path, value in optax.tree_utils.tree_get_all_with_path(opt_state, name)
        if isinstance(path[-1], optax.tree_utils.NamedTupleKey)
    ]


# --- paths -------------------------------------------------------------------------------------------


def path_name(path) -> str:
    """`Dense_0/kernel` for the key path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree) -> dict[str, Any]:
    """The leaves of a tree by path name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_name(function, tree, *rest):
    """`jax.tree.map` whose function first receives the leaf's path name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def owner(path, owners: Mapping):
    """The value in `owners`, by parameter path, that a leaf of an optimizer state belongs to, or None.

    It is that of the longest parameter path that the leaf's own path ends with: the moments of
    `params["a"]["kernel"]` end in `["a"]["kernel"]` wherever an Optax chain keeps them.

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      owners: {key path of a parameter: anything}; it must hold all parameters, or a leaf could be taken for
        that of a parameter with a shorter path.
    """
    return next((owners[path[start:]] for start in range(len(path) + 1) if path[start:] in owners), None)


def matches(name: str, rules: Iterable[str]) -> bool:
    """Whether a path name matches one of the shell patterns in `rules`."""
    return any(fnmatch.fnmatchcase(name, rule) for rule in rules)


def best_rule(name: str, rules: Iterable[str]) -> str | None:
    """The most specific of the shell patterns that match a path name: the one with most literal characters.

    The order of the patterns does not matter (configs do not keep it), except between equals: first wins.
    """
    found = [rule for rule in rules if matches(name, (rule,))]
    return max(found, key=lambda rule: sum(letter not in "*?[]" for letter in rule), default=None)


def choose(kind: str, name: str, known: Mapping[str, Any] | Iterable[str]):
    """`known[name]`, or one sentence that lists the known names and suggests the nearest."""
    names = sorted(known)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
    return known[name] if isinstance(known, Mapping) else name


def check_sparsity(sparsity, what: str = "sparsity") -> float:
    """The sparsity as a float, or a ValueError that names the value and its range."""
    if isinstance(sparsity, numbers.Real) and not isinstance(sparsity, bool) and 0 <= sparsity < 1:
        return float(sparsity)
    raise ValueError(f"{what} must be in [0, 1), got {sparsity}")


def sparsifiable(params, include: Iterable[str] = INCLUDE, exclude: Iterable[str] = ()) -> dict[str, Any]:
    """The leaves that a rule selects, by path name: two or more axes, included and not excluded.

    Args:
      params: the parameters, or any tree of the same structure with `.shape` leaves.
      include, exclude: shell patterns on path names.

    Raises:
      ValueError: if nothing is selected, or a pattern (other than those of `INCLUDE`) matches no leaf.
    """
    include, exclude = _rules(include), _rules(exclude)
    leaves = flatten(params)
    chosen = {
        name: leaf
        for name, leaf in leaves.items()
        if len(leaf.shape) >= 2 and matches(name, include) and not matches(name, exclude)
    }
    for kind, rules in (("include", set(include) - set(INCLUDE)), ("exclude", exclude)):
        for rule in rules:
            if chosen and not any(matches(name, (rule,)) for name in leaves):
                raise ValueError(
                    f"{kind} rule {rule!r} matches no parameter (parameters: {', '.join(leaves)})"
                )
    if not chosen:
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} select no parameter with two or more axes "
            f"(parameters: {', '.join(leaves)})"
        )
    return chosen


def _rules(rules) -> tuple[str, ...]:
    return (rules,) if isinstance(rules, str) else tuple(rules)


# --- measures ----------------------------------------------------------------------------------------


def count(flags, axis: int | None = None):
    """How many entries of a bool array are True, as uint32: in all, or along `axis` with it kept.

    Groups of 8 (and then 16) neighbours are first summed in uint8, which XLA on a CPU vectorises; a plain
    bool-to-int sum takes four times as long. On a sharded array the only communication is that of the count,
    provided that each device's part of the last axis (or of `axis`) is a multiple of 128, or of 8 if that
    axis has fewer than 128 entries; otherwise XLA moves flags between devices to form the groups.
    """
    if axis is not None:
        return jnp.sum(_group_sums(flags, axis, 8), axis=axis, keepdims=True, dtype=jnp.uint32)
    if flags.ndim == 0:
        return flags.astype(jnp.uint32)
    counts = _group_sums(flags, flags.ndim - 1, 8)
    if counts.shape[-1] >= 16:
        counts = _group_sums(counts, counts.ndim - 1, 16)
    return jnp.sum(counts, dtype=jnp.uint32)


def _group_sums(values, axis: int, size: int):
    """Sums of `size` neighbours along `axis` in uint8, zero-padded to a multiple."""
    length = values.shape[axis]
    pad = -length % size
    if pad:
        values = jnp.pad(values, [(0, pad if i == axis else 0) for i in range(values.ndim)])
    shape = values.shape[:axis] + ((length + pad) // size, size) + values.shape[axis + 1 :]
    return jnp.sum(values.reshape(shape), axis=axis + 1, dtype=jnp.uint8)


def densities(masks) -> dict[str, float]:
    """The fraction of kept weights of every sparsified leaf, by path name (host floats)."""
    return {
        name: int(count(mask != 0)) / mask.size
        for name, mask in flatten(masks).items()
        if is_sparsified(mask)
    }


def sparsity(masks) -> float:
    """The fraction of zeros over all sparsified leaves, in [0, 1); 0.0 if there is none."""
    leaves = [mask for mask in jax.tree.leaves(masks) if is_sparsified(mask)]
    total = sum(mask.size for mask in leaves)
    return 1.0 - sum(int(count(mask != 0)) for mask in leaves) / total if total else 0.0


def churn(old, new) -> float:
    """The fraction of the kept weights of `new` that `old` did not keep: how fast the topology moves."""
    grown = kept = 0
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if is_sparsified(after):
            kept += int(count(after != 0))
            grown += int(count((after != 0) & (before == 0)))
    return grown / kept if kept else 0.0


def sad(old, new):
    """Sparse Architecture Divergence, sum ||M_new - M_old||_1 over the sparsified leaves (Zhou et al. 2021).

    For bool masks the number of entries that differ. A float32 scalar; jit-safe.
    """
    total = jnp.zeros([], jnp.float32)
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if is_sparsified(after) and after.dtype == before.dtype == jnp.bool_:
            total += count(before != after).astype(jnp.float32)
        elif is_sparsified(after):
            total += jnp.sum(jnp.abs(after.astype(jnp.float32) - before.astype(jnp.float32)))
    return total


def exploration_rate(opt_state) -> float:
    """In-time over-parameterisation R_s (Liu et al. 2021): the share of weights active at least once."""
    return 1.0 - sparsity(get_field(opt_state, "fired"))
