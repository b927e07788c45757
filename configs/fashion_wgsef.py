"""LeNet-300-100 on Fashion-MNIST, trained towards half of its hidden neurons by WGSEF (Refael et al. 2022).

  python -m experiments.run --config=configs/fashion_wgsef.py --workdir=/tmp/fashion_wgsef

The summary's `groups_before_end` tells how many of the 400 neurons were nonzero before 200 were fixed.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """Proximal SGD; the neurons are fixed for the last quarter of training."""
    config, _ = fashion.lenet()
    config.method = ml_collections.ConfigDict(
        {"name": "wgsef", "sparsity": 0.5, "pattern": "channel", "exclude": ("head*",), "strength": 0.1}
    )
    return config
