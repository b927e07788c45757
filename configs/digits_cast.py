"""CAST at 1:16 on a pretrained MLP (Huang et al. 2025): AdamS, weight scaling and self-distillation.

  python -m experiments.run --config=configs/digits_cast.py --workdir=/tmp/digits_cast

Trains dense for 500 steps (97.5 % test accuracy) and then for 500 with AdamS, which prunes 15 of every 16
hidden weights at the last one: 93.5 % with this seed, and as much before the cut, which
--config.method.prune=False leaves out. `prune_error` in the metrics is the share of the weights' norm that the
cut removes. With --config.method.strength=1e-3 the decay is too weak against the gradients; AdamS alone then
loses tens of points by the cut. About 15 seconds on two CPU cores.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
    """The three parts of CAST; the output layer stays dense."""
    config, _ = digits.pretrained()
    config.method = ml_collections.ConfigDict(
        {"name": "adams", "pattern": "1:16", "exclude": ("*head/*",), "strength": 3e-2, "prune": True}
    )
    config.parameterization = ml_collections.ConfigDict(
        {"name": "weight_scaling", "groups": 2, "exclude": ("head/*",)}
    )
    config.objective = ml_collections.ConfigDict({"distill": 1 / 3, "temperature": 1.0})
    return config
