"""An MLP of Monarch layers on Fashion-MNIST, trained from scratch (Dao et al. 2022): 45 % of the parameters.

  python -m experiments.run --config=configs/fashion_monarch.py --workdir=/tmp/fashion_monarch

Reaches 89.5 % test accuracy with 303,114 parameters in place of 669,706, in about 35 seconds on two CPU cores.
Other layers in the same place: --config.model.linear="{'name': 'low_rank', 'rank': 128}" has as many parameters.
"""

import ml_collections

from configs import base, fashion


def get_config() -> ml_collections.ConfigDict:
    """Two hidden layers of 512, of four blocks each; five epochs of Adam."""
    config, _ = base.training(steps=2345, batch_size=128)
    config.data = ml_collections.ConfigDict({"name": "fashion_mnist", "data_dir": fashion.DATA_DIR})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (512, 512)})
    config.model.linear = ml_collections.ConfigDict({"name": "monarch", "blocks": 4})
    config.optimizer = ml_collections.ConfigDict(
        {"name": "adam", "learning_rate": 2e-3, "schedule": "linear", "warmup_steps": 0}
    )
    config.eval_every = 469
    return config
