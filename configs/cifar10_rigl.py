"""RigL on CIFAR-10 with a Wide-ResNet-22-2, 90 % sparse, in the setting of the paper (Evci et al. 2020).

  python -m experiments.run --config=configs/cifar10_rigl.py \\
    --workdir=/tmp/cifar10_rigl --config.data.data_dir=DIR

This configuration has not been run: it needs the CIFAR-10 binary files and an accelerator (250 epochs; days
on two CPU cores). The authors report 92.9 % for RigL with ERK at 90 %, 91.5 % for static masks and 93.3 % for
pruning.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import base

DATA_DIR = placeholder(str)  # None, unless --config.data.data_dir says where to look first


def get_config() -> ml_collections.ConfigDict:
    """250 epochs of SGD with momentum; the learning rate falls by 5 every 77 epochs (30,000 steps)."""
    config, steps = base.training(steps=97_656, batch_size=128)
    config.data = ml_collections.ConfigDict({"name": "cifar10", "data_dir": DATA_DIR, "augment": "crop_flip"})
    config.model = ml_collections.ConfigDict({"name": "wide_resnet", "depth": 22, "width": 2})
    config.optimizer = ml_collections.ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "schedule": "piecewise",
            "boundaries": (0.307, 0.614, 0.922),
            "factor": 0.2,
            "warmup_steps": 0,
        }
    )
    config.method = ml_collections.ConfigDict(
        {"name": "rigl", "sparsity": 0.9, "allocation": "erk", "update_every": 100, "drop_fraction": 0.3}
    )
    config.method.update_end = steps * 3 // 4
    config.eval_every = 2000
    config.checkpoint_every = 2000
    return config
