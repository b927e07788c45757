"""sparsejax: a JAX research framework for sparsity."""

from sparsejax import (
    allocation,
    bayes,
    flops,
    formats,
    interop,
    masks,
    nn,
    patterns,
    proximal,
    pruning,
    schedules,
    scores,
    selection,
    structure,
    transforms,
)
from sparsejax.formats import matmul, unpack
from sparsejax.formats import pack_tree as pack
from sparsejax.masks import apply_masks, churn, densities, exploration_rate, get_masks, sad, sparsity
from sparsejax.natural_galore import natural_galore
from sparsejax.pruning import prune
from sparsejax.target import Target
from sparsejax.transforms import (
    adams,
    ast,
    bdwp,
    cric,
    dense,
    fixed,
    gradual,
    group_lasso,
    hesso,
    mdgf,
    nuclear,
    one_shot,
    prox_l0,
    prox_l1,
    rigl,
    sdgf,
    set_,
    snfs,
    sr_ste,
    ssvi,
    ste,
    turbo_vbi,
    wgsef,
)
