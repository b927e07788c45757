"""Flax linen layers that carry masks, and structured ones that stand in for a Dense."""

from collections.abc import Mapping

from sparsejax.masks import choose
from sparsejax.nn.butterfly import Butterfly, StNN, butterfly_matmul, fourier_factors
from sparsejax.nn.dense_sparse import DenseSparse
from sparsejax.nn.experts import ExpertDense
from sparsejax.nn.factorised import FactorisedLinear, convert, from_dense, to_dense
from sparsejax.nn.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DenseGeneral,
    Embed,
    LayerNorm,
    MaskedParams,
    RMSNorm,
)
from sparsejax.nn.low_rank import LowRank
from sparsejax.nn.monarch import Monarch, monarch_dense, monarch_matmul, monarch_project
from sparsejax.nn.sparse_low_rank import SparseLowRank
from sparsejax.nn.structured import Circulant, Hankel, Toeplitz
from sparsejax.nn.variational import Variational, VariationalConv, VariationalDense

# What a model's `linear` field may name; every class takes `features` and `use_bias`.
LINEARS = {
    "butterfly": Butterfly,
    "circulant": Circulant,
    "dense": Dense,
    "dense_sparse": DenseSparse,
    "hankel": Hankel,
    "low_rank": LowRank,
    "monarch": Monarch,
    "sparse_low_rank": SparseLowRank,
    "stnn": StNN,
    "toeplitz": Toeplitz,
    "variational": VariationalDense,
}


def linear(spec: Mapping | None, features: int, **kwargs):
    """A linear layer of the class that `spec` names.

    Args:
      spec: `{"name": a key of LINEARS, **its keywords}`, or None for `Dense`.
      features: width of the output.
      **kwargs: keywords of linen's Dense (`name`, `dtype`, `kernel_init`...).

    Raises:
      ValueError: for an unknown name or keyword, listing the known ones.
    """
    spec = dict(spec or {"name": "dense"})
    layer = choose("linear layer", spec.pop("name", None), LINEARS)
    known = [field for field in layer.__dataclass_fields__ if field not in ("parent", "name", "features")]
    for key in spec:
        choose(f"keyword of linear layer {layer.__name__!r}", key, known)
    kwargs = {key: value for key, value in kwargs.items() if key in (*known, "name")}
    return layer(features, **spec, **kwargs)


def reads_masks(spec: Mapping | None) -> bool:
    """Whether the layers that `spec` names must be given the masks (see `sparsejax.training.step`)."""
    return spec is not None and getattr(LINEARS.get(spec.get("name")), "reads_masks", False)


__all__ = [
    "BatchNorm",
    "Butterfly",
    "Circulant",
    "Conv",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "DenseSparse",
    "Embed",
    "ExpertDense",
    "FactorisedLinear",
    "Hankel",
    "LINEARS",
    "LayerNorm",
    "LowRank",
    "MaskedParams",
    "Monarch",
    "RMSNorm",
    "SparseLowRank",
    "StNN",
    "Toeplitz",
    "Variational",
    "VariationalConv",
    "VariationalDense",
    "butterfly_matmul",
    "convert",
    "fourier_factors",
    "from_dense",
    "linear",
    "monarch_dense",
    "monarch_matmul",
    "monarch_project",
    "reads_masks",
    "to_dense",
]
