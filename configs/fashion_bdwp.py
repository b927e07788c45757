"""BDWP at 2:8 on Fashion-MNIST (Fang et al. 2023): N:M masks along the inputs forward, the outputs backward.

  python -m experiments.run --config=configs/fashion_bdwp.py --workdir=/tmp/fashion_bdwp

RESULT
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """Two hidden layers of 256; the head stays dense."""
    config, _ = fashion.lenet()
    config.model.hidden = (256, 256)
    config.method = ml_collections.ConfigDict(
        {"name": "bdwp", "variant": "bdwp", "pattern": "2:8", "exclude": ("head/*",)}
    )
    return config
