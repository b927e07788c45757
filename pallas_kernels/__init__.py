"""Kernels for sparse operations, one folder each; they import only JAX. There is none yet: today masks
simulate sparsity."""
