"""LeNet-300-100 on Fashion-MNIST, 90 % sparse with RigL (Evci et al. 2020): drop small, grow by gradient.

  python -m experiments.run --config=configs/fashion_rigl.py --workdir=/tmp/fashion_rigl

Reaches 88.7 % test accuracy after ten epochs at 0.10 x the dense training FLOPs, in about 35 seconds on two
CPU cores. One seed does not rank the methods at this sparsity: see the table `rigl`.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """RigL; masks rest during the last quarter."""
    config, steps = fashion.lenet()
    config.method = ml_collections.ConfigDict(
        {"name": "rigl", "sparsity": 0.9, "allocation": "erk", "update_every": 100, "drop_fraction": 0.3}
    )
    config.method.update_end = steps * 3 // 4
    return config
