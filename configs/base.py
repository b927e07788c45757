"""What the experiments share: fork one of the others, not this one.

`training` gives a `steps` reference with which other fields are computed, so that `--config.steps=500`
reaches them too: `config.method.update_end = steps * 3 // 4`.
"""

import ml_collections


def training(*, steps: int, batch_size: int, seed: int = 0) -> tuple[ml_collections.ConfigDict, ml_collections.FieldReference]:
    """A configuration with empty sections and SGD with momentum, and the reference to its `steps`."""
    reference = ml_collections.FieldReference(steps)
    config = ml_collections.ConfigDict()
    config.seed = seed
    config.steps = reference
    config.batch_size = batch_size
    config.eval_batch_size = 1000
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 500
    config.keep_checkpoints = 2
    config.optimizer = ml_collections.ConfigDict(
        {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "schedule": "cosine", "warmup_steps": 0}
    )
    return config, reference
