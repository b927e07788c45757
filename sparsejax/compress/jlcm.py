"""JLCM: Jointly Learnable Codebooks and Mappings (Yvinec et al. 2024), weights from codebooks of groups of outputs.

Outputs with similar weights are put next to each other, and each of `groups` contiguous groups of them has one
codebook of `codewords` values; a permutation of outputs can be taken up by the layers around, so that no map from
outputs to codebooks is stored. Codebooks start from k-means. Then values v and the mapping of every weight to its
codeword are learned together, layer by layer, on the layer's outputs for calibration inputs X,

  E = |X (W - W^)|^2 / |X W|^2,      W^_i = v_c(i),      c(i) = the k of highest score m_ik.

By the chain rule with a straight-through mapping, dE/dm_ik = g_i v_k with g = dE/dW^: it grows with the distance of
a codeword from the present one and favours jumps to the extreme ones. It is replaced by one that falls with the
distance, so that the search is proximal: with s the mean distance of neighbours in the codebook,

  dE/dm_ik := g_i sign(v_k - v_c(i)) / (1 + |v_k - v_c(i)| / s).

From the paper's abstract are the groups by re-ordering, the joint learning against the dense layer, and that the
gradient of the mapping should favour near codewords. Ours, as no more was to be had in the open: outputs are ordered
by the root mean square of their weights and cut into equal groups; the form of that gradient; scores start at
-(w_i - v_k)^2 / s^2; Adam, and the state of lowest E is the result.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparsejax.compress.base import Layerwise, masked
from sparsejax.compress.codebook import Codebook, check, dense, kmeans
from sparsejax.compress.quantise import check_dense


class Mapped(NamedTuple):
    """What is learned of a kernel.

    Attributes:
      order: int32 `(out,)`: output `order[i]` of the kernel is the i-th in the codebook.
      codebook: of the re-ordered kernel, dim 1, with a book for each group.
      errors: E `(steps + 1,)` float32, of the start and after each step.
    """

    order: jnp.ndarray
    codebook: Codebook
    errors: jnp.ndarray


def jlcm(
    initial: Layerwise | None = None,
    *,
    codewords: int = 16,
    groups: int = 4,
    steps: int = 100,
    mapping_rate: float = 0.05,
    value_rate: float = 0.01,
) -> Layerwise:
    """Shares the weights that another method keeps; the mask is that method's.

    Args:
      initial: prunes first; None keeps every weight, and then only sparsity 0 is possible.
      codewords, groups, steps, mapping_rate, value_rate: as in `learn`.

    Raises:
      ValueError: for a number out of its range; when it prunes, for a sparsity without `initial`, or as `learn`.
    """
    _check(codewords, groups, steps, mapping_rate, value_rate)
    options = {"codewords": codewords, "groups": groups, "steps": steps}
    options |= {"mapping_rate": mapping_rate, "value_rate": value_rate}

    def prune(kernel, stats, sparsity, pattern="unstructured"):
        mask = jnp.ones(kernel.shape, bool)
        start = kernel
        if initial is None:
            check_dense("jlcm", sparsity, pattern)
        else:
            start, mask = initial.prune(kernel, stats, sparsity, pattern)
        found = learn(kernel, stats["gram"], mask, start=start, **options)
        return masked(restore(found), mask), mask

    needs = tuple(dict.fromkeys((*(() if initial is None else initial.needs), "gram")))
    name = "jlcm" if initial is None else f"{initial.name}+jlcm"
    if initial is None:
        return Layerwise(name, needs, prune, settings=options)
    rules = initial.wrapped_rules(partial(jlcm, **options))
    settings = {"initial": dict(initial.settings), **options}
    return Layerwise(name, needs, prune, initial.patterns, initial.host, rules, settings)


def learn(
    kernel,
    gram,
    mask=None,
    *,
    start=None,
    codewords: int = 16,
    groups: int = 4,
    steps: int = 100,
    mapping_rate: float = 0.05,
    value_rate: float = 0.01,
) -> Mapped:
    """Codebooks and mappings of one kernel.

    Scores, their gradient and Adam's moments, float32 `(in, out, codewords)` each, set the memory: about
    24 in out codewords bytes.

    Args:
      kernel: `(in, out)`, whose outputs are the goal.
      gram: X^T X / n, `(in, in)`.
      mask: bool `(in, out)`, what may differ from 0; None for all.
      start: the kernel that k-means is made on; None for `kernel`.
      codewords: values of a codebook.
      groups: of outputs; they divide them.
      steps: of Adam; 0 leaves k-means.
      mapping_rate: of the scores, which are in units of squared distances of neighbours.
      value_rate: of the values, in distances of neighbours.

    Raises:
      ValueError: for a number out of its range, groups that do not divide the outputs, and as
        `sparsejax.compress.codebook.kmeans`.
    """
    _check(codewords, groups, steps, mapping_rate, value_rate)
    if kernel.ndim == 2 and kernel.shape[1] % groups:
        raise ValueError(f"groups={groups} of jlcm do not divide the {kernel.shape[1]} outputs of the kernel")
    check(kernel.shape, codewords, books=groups)
    mask = jnp.ones(kernel.shape, bool) if mask is None else mask
    start = masked(kernel if start is None else start, mask)
    count = jnp.maximum(jnp.sum(mask, axis=0), 1)
    order = jnp.argsort(jnp.sum(start**2, axis=0) / count).astype(jnp.int32)
    kernel, start, mask = kernel[:, order], start[:, order], mask[:, order]
    codebook = kmeans(start, mask, codewords=codewords, books=groups)
    codebook, errors = _learn(kernel, start, gram, mask, codebook, steps, mapping_rate, value_rate)
    return Mapped(order, codebook, errors)


def _check(codewords, groups, steps, mapping_rate, value_rate) -> None:
    for name, value, least in (("codewords", codewords, 1), ("groups", groups, 1), ("steps", steps, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} of jlcm must be an integer of at least {least}, got {value!r}")
    for name, value in (("mapping_rate", mapping_rate), ("value_rate", value_rate)):
        if not value >= 0:
            raise ValueError(f"{name} of jlcm must be at least 0, got {value!r}")


def restore(mapped: Mapped):
    """The dense kernel `(in, out)` with its outputs in their own order."""
    return jnp.zeros_like(dense(mapped.codebook)).at[:, mapped.order].set(dense(mapped.codebook))


def mapping_gradient(gradient, values, codes, spacing):
    """The proximal gradient of the scores m, float32 `(in, out, codewords)`.

    Args:
      gradient: g = dE/dW^, `(in, out)`.
      values: the codewords of every output, `(out, codewords)`.
      codes: the present ones, int32 `(in, out)`.
      spacing: s of every output, `(out,)`.
    """
    away = values - jnp.take_along_axis(values[None], codes[..., None], axis=2)
    return gradient[..., None] * jnp.sign(away) / (1 + jnp.abs(away) / spacing[:, None])


@jax.jit(static_argnums=5)
def _learn(kernel, start, gram, mask, codebook, steps, mapping_rate, value_rate):
    """The codebook of lowest E, and E of the start and after each step."""
    books, codewords, _ = codebook.values.shape
    book = jnp.arange(kernel.shape[1]) // (kernel.shape[1] // books)
    ordered = jnp.sort(codebook.values[..., 0], axis=1)
    spacing = (ordered[:, -1] - ordered[:, 0]) / max(codewords - 1, 1)
    spacing = jnp.where(spacing > 0, spacing, 1.0)
    scale = jnp.sum(kernel * _product(gram, kernel))
    scale = jnp.where(scale > 0, scale, 1.0)

    def error(codebook):
        off = masked(dense(codebook), mask) - kernel
        image = _product(gram, off)
        return jnp.sum(off * image) / scale, masked(2 * image / scale, mask)

    def step(carry, _):
        codebook, scores, states, best, lowest = carry
        _, gradient = error(codebook)
        # Adam is blind to scale; its rates are in units of s, in which the values are learned
        by_value = jnp.zeros((books, codewords)).at[book, codebook.codes].add(gradient)[..., None]
        by_score = mapping_gradient(gradient, codebook.values[book, :, 0], codebook.codes, spacing[book])
        moves, states = optimiser.update({"values": by_value, "scores": by_score}, states)
        values = codebook.values + spacing[:, None, None] * moves["values"]
        scores = scores + moves["scores"]
        codebook = Codebook(values, jnp.argmax(scores, axis=2).astype(jnp.int32))
        found = error(codebook)[0]
        best = jax.tree.map(lambda new, old: jnp.where(found < lowest, new, old), codebook, best)
        return (codebook, scores, states, best, jnp.minimum(found, lowest)), found

    optimiser = optax.multi_transform(
        {"values": optax.adam(value_rate), "scores": optax.adam(mapping_rate)},
        {"values": "values", "scores": "scores"},
    )
    scores = -(((start[..., None] - codebook.values[book, :, 0]) / spacing[book, None]) ** 2)
    states = optimiser.init({"values": codebook.values, "scores": scores})
    first = error(codebook)[0]
    carry, errors = lax.scan(step, (codebook, scores, states, codebook, first), length=steps)
    return carry[3], jnp.concatenate([first[None], errors])


def _product(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
