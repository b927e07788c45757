"""A winning ticket on digits: iterative magnitude pruning with rewinding (Frankle & Carbin 2019).

  python -m experiments.run --config=configs/lottery_ticket.py --workdir=/tmp/lottery_ticket

Reaches 97.1 % test accuracy at 98 % sparsity (dense: 98.1 %), in about 20 seconds on two CPU cores.
Try the controls: `--config.procedure.control=reinit` (same masks, new weights), `random` (shuffled masks),
`finetune` or `learning_rate_rewinding` (keep the trained weights).
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Eight rounds of 20 epochs, each removing 39 % of the remaining weights, and 60 epochs at the end."""
    config, steps = base.training(steps=320, batch_size=64)
    config.data = ml_collections.ConfigDict({"name": "digits"})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (300, 100)})
    config.method = ml_collections.ConfigDict({"name": "dense"})
    config.procedure = ml_collections.ConfigDict(
        {
            "name": "imp",
            "rounds": 8,
            "prune_fraction": 0.3868,
            "rewind_step": 0,
            "scope": "global",
            "control": "ticket",
        }
    )
    config.procedure.final_steps = steps * 3
    config.eval_every = 160
    config.checkpoint_every = 320
    return config
