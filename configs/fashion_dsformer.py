"""DSFormer on Fashion-MNIST (Chand et al. 2023): a trained MLP becomes dictionary x 3:16 codes, 27 % of the size.

  python -m experiments.run --config=configs/fashion_dsformer.py --workdir=/tmp/fashion_dsformer

Test accuracy is 87.8 %, from 88.7 % of the dense network; about a minute on two CPU cores. The factors follow the weights at every step (STF). Factorise first and fine-tune the factors instead, with
the table `dsformer`.
"""

import ml_collections

from configs import base, fashion


def get_config() -> ml_collections.ConfigDict:
    """Three epochs at a fifth of the learning rate, from the weights of a network trained for three; dense head."""
    config, _ = base.training(steps=1407, batch_size=128)
    config.data = ml_collections.ConfigDict({"name": "fashion_mnist", "data_dir": fashion.DATA_DIR})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (256, 256)})
    config.method = ml_collections.ConfigDict({"name": "dense"})
    config.optimizer.learning_rate = 0.01
    config.pretrained = ml_collections.ConfigDict({"optimizer": {**config.optimizer, "learning_rate": 0.05}})
    config.parameterization = ml_collections.ConfigDict(
        {"name": "dsformer", "budget": 0.28, "pattern": "3:16", "block": 16, "exclude": ("head/*",)}
    )
    config.eval_every = 469
    return config
