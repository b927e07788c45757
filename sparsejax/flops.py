"""What a sparse model costs: parameters, multiply-adds, FLOPs of inference and training, bytes.

A multiply-add (MAC) is 2 FLOPs. Only the products with kernels are counted, as in the papers: not biases,
norms, activations, nor attention's products of activations with each other. A kernel at density d costs d
times its dense MACs: this is the cost of the arithmetic, not a promise of speed.

Training is counted as the RigL paper does (Evci et al. 2020, appendix H): the backward pass costs twice the
forward pass (gradients of the inputs and of the weights). With f_D and f_S the dense and the sparse forward
FLOPs, a step costs

  dense, AdamS                   3 f_D
  fixed masks, SET               3 f_S
  gradual and one-shot pruning,
  HESSO, CRIC                    3 f_S at the density of that step; over a run, at the mean density
  SNFS, proximal methods         2 f_S + f_D               (the dense weight gradient at every step)
  RigL                           (3 f_S dT + 2 f_S + f_D) / (dT + 1)      (dense once every dT steps)
  STE, SR-STE, MdGF, SdGF, AST   f_S + 2 f_D              (sparse forward pass only)
  BDWP                           f_S + f_B + f_D          (f_B: as f_S, for the backward masks)
  Turbo-VBI                      6 f_S
  SSVI                           (6 f_S dT + 5 f_S + f_D) / (dT + 1)

Straight-through methods update every weight, so their weight gradient is dense. Their input gradient does use
masked weights, but N:M groups lie along the reduction axis of the forward product and not of this one, where
no sparse product could use them: it is counted as dense, as in the BDWP paper (Fang et al. 2023). BDWP has
other masks, with the groups along the right axis, for that product.

The variational methods train with two products per kernel, of the means and of the variances, as if all
kernels were variational; they infer with one.

Layers of factors (Monarch, low rank) cost the products with the factors; SLTrain multiplies by the dense weight
that it builds, and costs as much as a dense layer.

One-off costs (the scores of SNIP, GraSP or SynFlow: a few dense batches) are negligible and left out.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import linen

from sparsejax.masks import INCLUDE, choose, flatten, is_sparsified, matches
from sparsejax.nn.experts import ExpertDense
from sparsejax.nn.factorised import FactorisedLinear
from sparsejax.nn.variational import Variational

# --- multiply-adds -----------------------------------------------------------------------------------


def _dense_macs(layer, kernel, inputs, output) -> int:
    axes = getattr(layer, "axis", -1)
    axes = (axes,) if isinstance(axes, int) else axes
    return output.size * math.prod(inputs.shape[axis] for axis in axes)


def _conv(layer, kernel, inputs, output) -> int:
    return output.size * math.prod(kernel.shape[:-1])


def _conv_local(layer, kernel, inputs, output) -> int:
    return output.size * kernel.shape[-2]


def _conv_transpose(layer, kernel, inputs, output) -> int:
    positions = inputs.size // inputs.shape[-1]
    return positions * kernel.size


def _attend(layer, kernel, inputs, output) -> int:
    return output.size * layer.features


def _factorised(layer, kernel, inputs, output) -> int:
    return output.size // layer.features * layer.macs(kernel, inputs.shape[-1])


# How many MACs one call of a layer does: f(layer, kernel, inputs, output) on shapes, for the whole batch.
# The first class that the layer is an instance of decides; add your own layers here.
COUNTERS = {
    linen.Dense: _dense_macs,
    linen.DenseGeneral: _dense_macs,
    linen.Conv: _conv,
    linen.ConvLocal: _conv_local,
    linen.ConvTranspose: _conv_transpose,
    linen.Embed: _attend,
    ExpertDense: _dense_macs,
    FactorisedLinear: _factorised,
    Variational: _conv,
}
# The calls that multiply by a parameter, as (method, end of the leaf's name); a lookup in an embedding costs
# nothing.
COUNTED = (("__call__", "kernel"), ("attend", "embedding"))


def layer_macs(model: linen.Module, variables, *example_inputs, **kwargs) -> dict[str, int]:
    """Dense multiply-adds per example of every kernel of a linen model, by path name.

    The model is traced with shapes only; nothing is computed. A layer called several times counts each
    time, one that is never called counts zero, an embedding counts zero for lookups and its products in
    `attend`. Inside `nn.scan` or `nn.vmap` a layer is traced, and so counted, once.

    Args:
      model: any linen module, of stock layers or ours.
      variables: its variables, or their `jax.ShapeDtypeStruct`s; `masks` and `backward_masks` are ignored.
      *example_inputs: inputs as for `model.apply`, arrays or `jax.ShapeDtypeStruct`s; the leading axis of the
        first is the batch.
      **kwargs: keywords of the call, for example `train=False`.

    Returns:
      `{path: MACs}` for the parameters with two or more axes called `*kernel` or `*embedding`.

    Raises:
      ValueError: if such a parameter belongs to a called layer of a type that is not in `COUNTERS`.
    """
    macs = {
        name: 0
        for name, leaf in flatten(variables["params"]).items()
        if len(leaf.shape) >= 2 and matches(name, INCLUDE)
    }
    batch = example_inputs[0].shape[0]

    def intercept(call, args, kw, context):
        output = call(*args, **kw)
        layer, path = context.module, "/".join(context.module.path)
        for name in macs:
            owner, _, leaf = name.rpartition("/")
            called = any(context.method_name == method and leaf.endswith(end) for method, end in COUNTED)
            if owner == path and called:
                inputs = next(iter((*args, *kw.values())))
                macs[name] += _counter(layer, name)(layer, layer.get_variable("params", leaf), inputs, output)
        return output

    def forward(variables, *inputs):
        return model.apply(variables, *inputs, mutable=True, **kwargs)

    with linen.intercept_methods(intercept):
        dense = {name: tree for name, tree in variables.items() if name not in ("masks", "backward_masks")}
        jax.eval_shape(forward, dense, *example_inputs)
    return {name: count // batch for name, count in macs.items()}


def _counter(layer, name):
    for kind, counter in COUNTERS.items():
        if isinstance(layer, kind):
            return counter
    raise ValueError(
        f"cannot count the MACs of {name}: its layer {type(layer).__name__} is none of "
        f"{', '.join(kind.__name__ for kind in COUNTERS)}; add it to sparsejax.flops.COUNTERS"
    )


# --- FLOPs -------------------------------------------------------------------------------------------


def inference_flops(macs: Mapping[str, int], densities: Mapping[str, float] | None = None) -> float:
    """FLOPs of one example's forward pass.

    Args:
      macs: dense MACs by path, from `layer_macs`.
      densities: fraction of kept weights by path, for the sparsified kernels (`sparsejax.masks.densities`);
        None, or a path left out, means dense. Paths without MACs of their own (a masked bias) cost nothing.

    Raises:
      ValueError: if no path of a non-empty `densities` is in `macs`: they belong to another model.
    """
    densities = densities or {}
    if densities and not macs.keys() & densities.keys():
        raise ValueError(
            f"the densities are of {', '.join(densities)} but the model's kernels are {', '.join(macs)}"
        )
    return 2.0 * sum(count * densities.get(name, 1.0) for name, count in macs.items())


def _dense_step(dense, sparse, update_every):
    return 3 * dense


def _sparse_step(dense, sparse, update_every):
    return 3 * sparse


def _snfs(dense, sparse, update_every):
    return 2 * sparse + dense


def _straight_through(dense, sparse, update_every):
    return sparse + 2 * dense


def _bdwp(dense, sparse, update_every, backward=None):
    return sparse + (sparse if backward is None else backward) + dense


def _rigl(dense, sparse, update_every):
    return (3 * sparse * update_every + 2 * sparse + dense) / (update_every + 1)


def _variational(dense, sparse, update_every):
    return 6 * sparse


def _ssvi(dense, sparse, update_every):
    return (6 * sparse * update_every + 5 * sparse + dense) / (update_every + 1)


# FLOPs of a training step of every method: f(dense, sparse, update_every). Add your own methods here.
TRAINING = {
    "adams": _dense_step,
    "ast": _straight_through,
    "bdwp": _bdwp,
    "cric": _sparse_step,
    "dense": _dense_step,
    "fixed": _sparse_step,
    "gradual": _sparse_step,
    "hesso": _sparse_step,
    "group_lasso": _snfs,
    "mdgf": _straight_through,
    "nuclear": _dense_step,
    "one_shot": _sparse_step,
    "prox_l0": _snfs,
    "prox_l1": _snfs,
    "rigl": _rigl,
    "sdgf": _straight_through,
    "set_": _sparse_step,
    "snfs": _snfs,
    "sr_ste": _straight_through,
    "ssvi": _ssvi,
    "ste": _straight_through,
    "turbo_vbi": _variational,
    "wgsef": _snfs,
}


def training_flops(
    method: str, dense: float, sparse: float, *, update_every: int = 100, backward: float | None = None
) -> float:
    """FLOPs of one example's training step, averaged over a mask interval (see the module's table).

    It is linear in `sparse`: for a density that changes over a run, pass the mean over its steps.

    Args:
      method: a key of `TRAINING`, the name of the transform.
      dense, sparse: forward FLOPs of an example at full and at the current density (`inference_flops`).
      update_every: steps between two mask updates (dT).
      backward: as `sparse`, at the density of the backward masks of a method that has them.

    Raises:
      ValueError: for an unknown method or an interval below 1.
    """
    if update_every < 1:
        raise ValueError(f"update_every={update_every} must be at least 1")
    extra = {} if backward is None else {"backward": backward}
    return float(choose("method", method, TRAINING)(dense, sparse, update_every, **extra))


def training_flops_ratio(method: str, dense: float, sparse: float, **kwargs) -> float:
    """`training_flops`, with the same arguments, as a fraction of dense training, 3 f_D."""
    return training_flops(method, dense, sparse, **kwargs) / (3.0 * dense)


# --- parameters and bytes ----------------------------------------------------------------------------


def parameters(params, masks=None) -> tuple[int, int]:
    """The number of parameters and how many of them the masks keep (all, without masks)."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if masks is None:
        return total, total
    kept = jax.tree.map(_kept, params, masks)
    return total, sum(jax.tree.leaves(kept))


def bytes_dense(params) -> int:
    """Bytes of the parameters as they are."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(params))


def _bytes(leaf) -> int:
    return leaf.size * np.dtype(leaf.dtype).itemsize


def _kept(leaf, mask) -> int:
    return int(np.count_nonzero(np.asarray(mask))) if is_sparsified(mask) else leaf.size
