"""GQSA: Group Quantization and Sparsity (Zeng et al. 2025), 4-bit codes in groups of inputs that are kept or dropped.

Of a kernel `(in, out)`, the unit is a group of G consecutive inputs of one output, pattern `block:Gx1`. With the
damped H = 2/n X^T X + lambda I of its inputs, a group scores the mean of w_j^2 / [H^-1]_jj over its weights, and the
lowest `sparsity` of the groups are dropped. The others have a scale and a zero each (`sparsejax.compress.quantise`).

  stage 1, BQPO     block by block, on the outputs of the compressed blocks before: minimises the mean of
                    (block_dense(x) - block_quantised(x))^2 over the kept weights, their scales and zeros; rounding is
                    straight-through, the mask is fixed
  stage 2, E2E-OQP  codes and masks are fixed; scales and zeros are trained on the language-model loss, or on the dense
                    model's predictions (`sparsejax.compress.topkld`)

Both keep their best state at the end of an epoch, the start included, so that neither ends worse than it began.

Departures. The score is that of optimal brain surgeon, the square of Wanda's for a diagonal H; the paper writes
[H^-1]_jj^2 after SparseGPT, where it is the square of a Cholesky factor's diagonal. A scale is its initial value
times an exponential that is trained: it stays positive, and one rate suits all layers. Rates and epochs were not
to be had in the open; ours are the keywords' defaults.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sparsejax.compress.base import SCOPES, Compressed, Layerwise, Whole, is_traced, masked, select
from sparsejax.compress.calibration import naming
from sparsejax.compress.gqsa_stages import bqpo, e2e_oqp, kernels_of
from sparsejax.compress.objectives import check_distil, objective
from sparsejax.compress.quantise import Quantised, check, check_bits
from sparsejax.compress.sparsegpt import inverse_factor
from sparsejax.compress.stream import Stream
from sparsejax.formats import GroupQuantisedArray
from sparsejax.masks import check_sparsity, choose, map_with_name
from sparsejax.patterns import Block, Unstructured, parse

# --- the mask ----------------------------------------------------------------------------------------


def group_pruning(*, scope: str = "layer", damping: float = 0.01) -> Layerwise:
    """Drops groups of inputs of an output, without an update; the pattern is `block:Gx1`.

    Args:
      scope: "layer" ranks all groups of a layer; "row" those of every output, which then do equal work.
      damping: lambda in units of the mean diagonal of H.
    """
    choose("scope", scope, SCOPES)

    def prune(kernel, stats, sparsity, pattern):
        sparsity, group = _budget("group_pruning", sparsity, pattern)
        if sparsity == 0:
            return kernel, jnp.ones(kernel.shape, bool)
        if kernel.shape[0] % group:
            raise ValueError(
                f"the G of group_pruning's pattern block:Gx1 must divide the {kernel.shape[0]} inputs, got {group}"
            )
        if is_traced(kernel, stats["gram"]):
            raise ValueError(
                "group_pruning factorises on the host, so that its arrays cannot be traced by jax.jit"
            )
        means = saliency(kernel, stats["gram"], damping).reshape(-1, group, kernel.shape[1]).mean(1)
        keep = select(means, sparsity, Unstructured(), scope)
        mask = jnp.repeat(keep, group, axis=0)
        return masked(kernel, mask), mask

    settings = {"scope": scope, "damping": damping}
    return Layerwise("group_pruning", ("gram",), prune, (Block,), host=True, settings=settings)


def _budget(name: str, sparsity: float | None, pattern) -> tuple[float, int]:
    """The sparsity, and the G of a pattern `block:Gx1`, checked."""
    found = parse(pattern)
    if not isinstance(found, Block) or len(found.shape) != 2 or found.shape[1] != 1:
        raise ValueError(f"{name} cannot do the pattern {pattern} (it can do: block:Gx1 such as block:16x1)")
    return check_sparsity(sparsity), found.shape[0]


def saliency(kernel, gram, damping: float = 0.01):
    """w_j^2 / [H^-1]_jj, float32 `(in, out)`; weights of inputs that are always 0 score 0.

    Args:
      kernel: `(in, out)`.
      gram: X^T X / n, `(in, in)`.
      damping: as in `group_pruning`; errors as `sparsejax.compress.sparsegpt.inverse_factor`.
    """
    factor, dead = inverse_factor(gram, damping)
    inverse = jnp.sum(factor**2, axis=0)  # H^-1 = U^T U
    return jnp.where(dead[:, None], 0.0, kernel**2 / inverse[:, None])


# --- the method --------------------------------------------------------------------------------------


def gqsa(
    *,
    bits: int = 4,
    scope: str = "layer",
    damping: float = 0.01,
    block_epochs: int = 5,
    weight_rate: float = 1e-4,
    scale_rate: float = 1e-3,
    epochs: int = 1,
    tune_rate: float = 1e-4,
    distil: Mapping | None = None,
    packed: bool = False,
    batch: int = 8,
    seed: int = 0,
) -> Whole:
    """Groups of 16 inputs, or the G of a pattern `block:Gx1`, dropped or quantised; then both stages.

    Args:
      bits: of a weight, 1 to 16.
      scope, damping: as in `group_pruning`.
      block_epochs, weight_rate, scale_rate: of stage 1; 0 epochs leave it out. Zeros, in units of codes, have ten times
        the rate of scales.
      epochs, tune_rate: of stage 2, whose zeros have ten times the rate of scales, too.
      distil: None: stage 2 is trained on the next token; keywords of `sparsejax.compress.topkld`: on the dense model's
        predictions.
      packed: whether the parameters have a `GroupQuantisedArray` for every kernel, which models take and
        `sparsejax.formats.save` writes, or its dense values; needs at most 4 bits and groups of even size.
      batch: sequences of a batch, in both stages.
      seed: of the order of batches.

    Returns:
      A `Whole`, for which the pattern "unstructured" is that of groups of 16. Its report has "sparsity", "layers" (of
      each its "sparsity", "density", "notes", and after stage 1 the "error" of `sparsejax.compress.prune_layers`),
      "blocks" ({block: the losses of stage 1}) and "losses" (of stage 2), both before the first epoch and after each.

    Raises:
      ValueError: for settings out of range; when it runs and before any work, for patterns other than `block:Gx1`,
        layers that have experts or that groups do not fit, and as `sparsejax.compress.topkld`; later, naming the layer,
        for inputs that are not finite.
    """
    check_bits(bits)
    if packed and bits > 4:
        raise ValueError(f"gqsa packs codes of at most 4 bits, got bits={bits}")
    for name, value in (("block_epochs", block_epochs), ("epochs", epochs)):
        if value < 0:
            raise ValueError(f"{name} of gqsa must be at least 0, got {value}")
    check_distil(distil)
    pruning = group_pruning(scope=scope, damping=damping)
    rates = dict(
        epochs=block_epochs,
        weight_rate=weight_rate,
        scale_rate=scale_rate,
        zero_rate=10 * scale_rate,
        seed=seed,
    )

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None):
        if pattern is None or isinstance(parse(pattern), Unstructured):
            pattern = "block:16x1"
        sparsity, group = _budget("gqsa", sparsity, pattern)
        stream, trees, layers, losses = Stream(model, params, tokens, batch), {}, {}, {}
        _check_layers(stream, bits, group, packed)
        params = {part: params[part] for part in model.parts()}
        loss, sequences = objective(model, params, stream.tokens, batch, distil)
        errors, notes = {}, {}
        with tqdm(stream.blocks, disable=None if progress is None else not progress, unit="block") as bar:
            for part in bar:
                block, masks, batches = _look(stream, part, params[part], pruning, sparsity, pattern, notes)
                trained = bqpo(_Apply(block), params[part], masks, batches, bits=bits, group=group, **rates)
                trees[part], losses[part] = trained.params, trained.losses
                layers |= {f"{part}/{path}": layer for path, layer in trained.layers.items()}
                off = stream.errors(block, params[part], trained.params, masks)
                errors |= {f"{part}/{path}": error for path, error in off.items()}
                stream.hidden = stream.run(block, trained.params)
        rate = dict(scale_rate=tune_rate, zero_rate=10 * tune_rate, epochs=epochs, seed=seed)
        tuned = e2e_oqp(loss, {**params, **trees}, layers, sequences, **rate)
        report = _report(tuned.layers, errors, notes, bits, group) | {
            "blocks": losses,
            "losses": tuned.losses,
        }
        new = pack(tuned.params, tuned.layers) if packed else tuned.params
        return Compressed(model, new, _masks(tuned), report)

    return Whole("gqsa", run)


def _check_layers(stream: Stream, bits: int, group: int, packed: bool) -> None:
    """Raises ValueError, naming the layer, unless all layers are kernels `(in, out)` that groups fit."""
    for part, layers in stream.layers.items():
        for path, layer in layers.items():
            if len(layer.shape) != 2:
                raise ValueError(f"gqsa cannot do experts, and {part}/{path} has {layer.shape[0]}")
            check(jax.ShapeDtypeStruct(layer.shape, jnp.float32), bits, group, f"{part}/{path}")
    if packed and group % 2:
        raise ValueError(f"gqsa packs groups of even size, got groups of {group} inputs")


def _look(stream: Stream, part: str, tree, pruning: Layerwise, sparsity: float, pattern, notes: dict):
    """The block, the masks of its layers, and its batches of inputs with the dense outputs; adds to `notes`."""
    block = stream.block(part)
    found = stream.layers[part]
    stats, targets = stream.observe(block, tree, found, pruning.needs)
    masks = {}
    for path, kernel in kernels_of(tree, found).items():
        kernel = jnp.asarray(kernel).astype(jnp.float32)
        with naming(f"{part}/{path}") as notes[f"{part}/{path}"]:
            masks[path] = pruning.prune(kernel, stats[found[path].source], sparsity, pattern)[1]
    batches, start = [], 0
    for inputs in stream.batches():
        end = start + len(inputs[0])
        batches.append((jax.device_get(inputs), targets[start:end]))  # they wait on the host
        start = end
    return block, masks, batches


def _masks(trained):
    """A tree of masks: bools of the quantised kernels, else the scalar True."""
    layers = trained.layers
    return map_with_name(
        lambda name, _: layers[name].mask if name in layers else jnp.asarray(True), trained.params
    )


@dataclasses.dataclass(frozen=True)
class _Apply:
    """The outputs of a block for a pair (hidden states, context)."""

    block: Any

    def __call__(self, params, inputs):
        hidden, context = inputs
        return self.block.apply({"params": params}, hidden, **context)


def _report(layers: Mapping[str, Quantised], errors: Mapping, notes: Mapping, bits: int, group: int) -> dict:
    kept = {name: int(layer.mask.sum()) for name, layer in layers.items()}
    size = sum(layer.mask.size for layer in layers.values())
    return {
        "method": "gqsa",
        "pattern": f"block:{group}x1",
        "bits": bits,
        "sparsity": 1 - sum(kept.values()) / size,
        "layers": {
            name: {
                "sparsity": 1 - kept[name] / layer.mask.size,
                "density": kept[name] / layer.mask.size,
                "error": errors[name],
                "notes": notes[name],
            }
            for name, layer in layers.items()
        },
    }


def pack(params, layers: Mapping[str, Quantised]):
    """The tree with a `GroupQuantisedArray` in place of every kernel in `layers`, for `formats.save` and models.

    Raises:
      ValueError: for codes of more than 4 bits, or groups of odd size.
    """

    def leaf(name, value):
        if name not in layers:
            return value
        codes, grid, mask = layers[name]
        keep = mask[:: len(mask) // len(grid.scale)]
        return GroupQuantisedArray.from_codes(codes, *grid, keep, name=name)

    return map_with_name(leaf, params)
