"""What the Fashion-MNIST experiments share: the data, LeNet-300-100, ten epochs. Not an experiment itself."""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import base

DATA_DIR = placeholder(str)  # None, unless --config.data.data_dir says where to look first


def lenet() -> tuple[ml_collections.ConfigDict, ml_collections.FieldReference]:
    """The configuration without a method, and the reference to its `steps`."""
    config, steps = base.training(steps=6000, batch_size=100)
    config.data = ml_collections.ConfigDict({"name": "fashion_mnist", "data_dir": DATA_DIR})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (300, 100)})
    config.optimizer.weight_decay = 1e-4
    config.log_every = 200
    config.eval_every = 600
    config.checkpoint_every = 2000
    return config, steps
