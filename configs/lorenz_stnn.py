"""The next state of the Lorenz system from 16 delayed ones, with Hankel layers (StNN, Aluvihare et al. 2025).

  python -m experiments.run --config=configs/lorenz_stnn.py --workdir=/tmp/lorenz_stnn

Test error 0.00088 (mean squared, in units of the target's variance) with 1,195 parameters; about 15 seconds on two
CPU cores. With dense layers, --config.model.linear="{'name': 'dense'}": 0.00036 with 23,171. The table `stnn` has
wider layers of this kind, and blocks.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Two hidden layers of 128, each a stack of Hankel matrices that are trained as diagonals."""
    config, _ = base.training(steps=2000, batch_size=128)
    config.data = ml_collections.ConfigDict({"name": "lorenz", "window": 16})
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (128, 128)})
    config.model.linear = ml_collections.ConfigDict({"name": "stnn"})
    config.method = ml_collections.ConfigDict({"name": "dense"})
    config.optimizer = ml_collections.ConfigDict(
        {"name": "adam", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 0}
    )
    config.eval_every = 500
    return config
