"""SR-STE at 1:16 (Zhou et al. 2021): one weight of every 16 is kept, chosen anew at every step.

  python -m experiments.run --config=configs/digits_srste.py --workdir=/tmp/digits_srste

Reaches 96.2 % test accuracy with 1,290 of 8,970 weights, in about 10 seconds on two CPU cores, most of them
compilation. `sad` counts the mask entries that have flipped so far, 6,000 in the end; with
--config.method.decay=0.0, which is STE, there are 10,000. The table `sr_ste` compares them over 12 seeds.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Adam normalises the decay with the gradient, so it is larger than the paper's 2e-4 for SGD."""
    config, _ = base.training(steps=1000, batch_size=64)
    config.data = ml_collections.ConfigDict({"name": "digits"})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (64, 64)})
    config.optimizer = ml_collections.ConfigDict(
        {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 0}
    )
    config.method = ml_collections.ConfigDict(
        {"name": "sr_ste", "pattern": "1:16", "exclude": ("head/*",), "decay": 2e-3}
    )
    config.eval_every = 100
    return config
