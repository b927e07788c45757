"""What the experiments share: fork one of the others, not this one.

`training` gives a `steps` reference with which other fields are computed, so that `--config.steps=500`
reaches them too: `config.method.update_end = steps * 3 // 4`.
"""

import ml_collections

from sparsejax.training.config import DEFAULTS


def training(
    *, steps: int, batch_size: int, seed: int = 0
) -> tuple[ml_collections.ConfigDict, ml_collections.FieldReference]:
    """All fields with their defaults, SGD with momentum and a cosine, and the reference to `steps`.

    The sections `data`, `model` and `method` are left to the experiment.
    """
    reference = ml_collections.FieldReference(steps)
    config = ml_collections.ConfigDict(DEFAULTS)
    config.seed = seed
    config.steps = reference
    config.batch_size = batch_size
    config.optimizer = ml_collections.ConfigDict(
        {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "schedule": "cosine", "warmup_steps": 0}
    )
    return config, reference
