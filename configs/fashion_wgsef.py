"""LeNet-300-100 on Fashion-MNIST, trained towards half of its hidden neurons by WGSEF (Refael et al. 2022).

  python -m experiments.run --config=configs/fashion_wgsef.py --workdir=/tmp/fashion_wgsef

Reaches 89.0 % test accuracy after ten epochs with 200 of the 400 hidden neurons (0.50 x the dense inference
FLOPs), in about 45 seconds on two CPU cores. The penalty alone leaves 207 neurons (`groups_before_end` in the
summary); with ten times its strength it leaves exactly 200, at 87.5 %.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """Proximal SGD; the neurons are fixed for the last quarter of training."""
    config, _ = fashion.lenet()
    config.method = ml_collections.ConfigDict(
        {"name": "wgsef", "sparsity": 0.5, "pattern": "channel", "exclude": ("head*",), "strength": 0.01}
    )
    return config
