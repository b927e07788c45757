"""Mask-decay gradient flow at 1:16 (Bambhaniya et al. 2024): the masks of 15 weights in 16 fade out.

  python -m experiments.run --config=configs/digits_mdgf.py --workdir=/tmp/digits_mdgf

RESULT Dense for 100 steps, then the pruned weights
count exp(-beta j) and get that share of their gradient, strictly 1:16 in the last quarter. `sdgf` decays the
structure instead: --config.method="{'name': 'sdgf', 'pattern': '1:16', 'exclude': ('head/*',), 'end': 750}".
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
