"""Kernels for sparse operations, one folder each; they import only JAX.

In a folder: `reference` (plain jnp, the oracle), `xla` (fast everywhere), `pallas_gpu` (Mosaic GPU), `pallas_tpu` and
`bench`. The public operation picks one of them, see `dispatch`, or runs the one that `implementation` names.
"""

from pallas_kernels.sparse_conv import pack_pattern, pack_pointwise, pattern_conv, sparse_conv
from pallas_kernels.spgemm import SpgemmPlan, spgemm, spgemm_plan

__all__ = [
    "SpgemmPlan",
    "pack_pattern",
    "pack_pointwise",
    "pattern_conv",
    "sparse_conv",
    "spgemm",
    "spgemm_plan",
]
