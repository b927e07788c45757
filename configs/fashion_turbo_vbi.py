"""Turbo-VBI (Xia et al. 2023) on Fashion-MNIST: a mean-field MLP 784-100-50-10 that finds its own sparsity.

  python -m experiments.run --config=configs/fashion_turbo_vbi.py --workdir=/tmp/fashion_turbo_vbi

Arrives at 95.0 % sparsity with 85.0 % test accuracy and runs of active weights of mean length 3.8 along the
pixels, in about 45 seconds on two CPU cores. With `--config.method.structure=independent` the runs are short.
"""

import ml_collections

from configs import fashion


def get_config() -> ml_collections.ConfigDict:
    """A chain prior along the inputs of every neuron; weights are removed after 70 % of ten epochs."""
    config, steps = fashion.lenet()
    layers = {"name": "variational", "sigma": 0.02}
    config.model = ml_collections.ConfigDict({"name": "mlp", "hidden": (100, 50), "linear": layers})
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 0.0
    config.method = ml_collections.ConfigDict(
        {"name": "turbo_vbi", "structure": "chain", "exclude": ("head/*",), "train_size": 60_000}
    )
    config.method.update({"slab": (1.0, 0.015), "spike": (1.0, 0.00015), "p01": 0.01, "p10": 0.2})
    config.method.end = steps * 7 // 10
    return config
