"""The next state of the Lorenz system from 16 delayed ones, with Hankel layers (StNN, Aluvihare et al. 2025).

  python -m experiments.run --config=configs/lorenz_stnn.py --workdir=/tmp/lorenz_stnn

RESULT
The same with dense layers: --config.model.linear="{'name': 'dense'}".
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
