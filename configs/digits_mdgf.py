"""Mask-decay gradient flow at 1:16 (Bambhaniya et al. 2024): the masks of 15 weights in 16 fade out.

  python -m experiments.run --config=configs/digits_mdgf.py --workdir=/tmp/digits_mdgf

Reaches 95.7 % test accuracy with 1,290 of 8,970 weights, in about 10 seconds on two CPU cores, most of them
compilation. Dense for 100 steps; then the pruned weights count exp(-beta j) and get that share of their
gradient; strictly 1:16 in the last quarter. The table `progressive_gradient_flow` has the other decays.
"""

import ml_collections

from configs import digits_srste


def get_config() -> ml_collections.ConfigDict:
    """As for SR-STE; beta makes the decay as long as this short training allows."""
    config = digits_srste.get_config()
    steps = config.get_ref("steps")
    config.method = ml_collections.ConfigDict(
        {"name": "mdgf", "pattern": "1:16", "exclude": ("head/*",), "decay": "exponential"}
    )
    config.method.begin = steps // 10
    config.method.end = steps * 3 // 4
    config.method.beta = 5.0 / (config.method.get_oneway_ref("end") - config.method.get_oneway_ref("begin"))
    return config
