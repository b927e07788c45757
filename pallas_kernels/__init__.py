"""Kernels for sparse operations, one folder each; they import only JAX.

In a folder: `reference` (plain jnp, the oracle), `xla` (fast everywhere), `pallas_gpu` (Mosaic GPU), `pallas_tpu` and
`bench`. The public operation picks one of them, see `dispatch`, or runs the one that `implementation` names.
"""

from pallas_kernels import sparse_decode_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.csr_matmul import csr_matmul
from pallas_kernels.nm_matmul import nm_matmul
from pallas_kernels.sampled_matmul import block_sampled_matmul, sampled_matmul
from pallas_kernels.softmax import softmax
from pallas_kernels.sparse_conv import pack_pattern, pack_pointwise, pattern_conv, sparse_conv
from pallas_kernels.spgemm import SpgemmPlan, spgemm, spgemm_plan

__all__ = [
    "SpgemmPlan",
    "block_sampled_matmul",
    "block_sparse_attention",
    "block_sparse_matmul",
    "csr_matmul",
    "nm_matmul",
    "pack_pattern",
    "pack_pointwise",
    "pattern_conv",
    "sampled_matmul",
    "softmax",
    "sparse_conv",
    "sparse_decode_attention",
    "spgemm",
    "spgemm_plan",
]
