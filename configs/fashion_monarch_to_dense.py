"""Reverse sparsification on Fashion-MNIST (Dao et al. 2022): Monarch layers first, multiplied out, then dense ones.

  python -m experiments.run --config=configs/fashion_monarch_to_dense.py --workdir=/tmp/fashion_monarch_to_dense

Reaches 89.8 % test accuracy in about 35 seconds on two CPU cores; the Monarch stage is trained first, in its own
folder, and found again by other runs that start from it.
The other way round, a trained dense network is projected on Monarch matrices and tuned: swap the two `linear`.
"""

import ml_collections

from configs import fashion_monarch


def get_config() -> ml_collections.ConfigDict:
    """Three quarters of the steps with Monarch layers, one quarter dense; one linear schedule through both."""
    config = fashion_monarch.get_config()
    config.steps = 586
    config.eval_every = 293
    monarch = config.model.linear
    config.model.linear = ml_collections.ConfigDict({"name": "dense"})
    model = {**config.model.to_dict(), "linear": monarch.to_dict()}
    rate = config.optimizer.learning_rate
    first = {**config.optimizer.to_dict(), "final_factor": 0.25}
    config.pretrained = ml_collections.ConfigDict({"steps": 1759, "model": model, "optimizer": first})
    config.optimizer.learning_rate = rate / 4
    return config
