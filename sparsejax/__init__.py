"""sparsejax: a JAX research framework for sparsity."""

from sparsejax import (
    allocation,
    flops,
    masks,
    nn,
    patterns,
    pruning,
    schedules,
    scores,
    selection,
    transforms,
)
from sparsejax.masks import apply_masks, churn, densities, exploration_rate, get_masks, sparsity
from sparsejax.pruning import prune
from sparsejax.target import Target
from sparsejax.transforms import dense, fixed, gradual, one_shot, rigl, set_, snfs
