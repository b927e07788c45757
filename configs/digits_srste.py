"""SR-STE at 1:16 (Zhou et al. 2021): one weight of every 16 is kept, chosen anew at every step.

  python -m experiments.run --config=configs/digits_srste.py --workdir=/tmp/digits_srste

RESULT `sad` counts the mask entries that have
flipped so far; with --config.method.decay=0, which is STE, there are many times as many.
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
