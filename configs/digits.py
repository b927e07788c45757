"""What the retraining experiments on digits share: a dense MLP, pretrained for 500 steps. Not an experiment."""

import ml_collections
from ml_collections.config_dict import FieldReference

from configs import base


def pretrained() -> tuple[ml_collections.ConfigDict, FieldReference]:
    """500 steps of Adam from the weights of 500 dense ones, without a method; and the reference to `steps`."""
    config, steps = base.training(steps=500, batch_size=64)
    config.data = ml_collections.ConfigDict({"name": "digits"})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (64, 64)})
    config.optimizer = ml_collections.ConfigDict(
        {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 0}
    )
    config.pretrained = ml_collections.ConfigDict({"steps": 500})
    config.eval_every = 100
    return config, steps
