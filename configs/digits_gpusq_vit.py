"""GPUSQ-ViT on digits (Yu et al. 2023): a vision transformer, pruned to 2:4 and then quantised to INT4.

  python -m experiments.run --config=configs/digits_gpusq_vit.py --workdir=/tmp/digits_gpusq_vit

Three runs in one: dense pretraining; 2:4 masks by magnitude, fixed while the rest is fine-tuned; training
under quantisation with these masks. The last two learn from the network they start from as well as from the
labels. Test accuracy is 97.5 % after each of them; about half a minute on two CPU cores.
"""

import ml_collections

from configs import base

DATA = {"name": "digits"}
MODEL = {"name": "vit", "patch": 4, "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2}
BLOCKS = ("*block_*kernel",)
DISTILL = {"distill": 0.5, "temperature": 2.0, "features": 1.0}


def adam(learning_rate: float) -> dict:
    """Adam with a cosine."""
    return {"name": "adam", "learning_rate": learning_rate, "schedule": "cosine", "warmup_steps": 0}


DENSE = {"steps": 1000, "optimizer": adam(2e-3)}


def pruned(objective: dict) -> dict:
    """The first stage, from the dense network."""
    return {
        "steps": 300,
        "optimizer": adam(1e-3),
        "method": {"name": "fixed", "score": "magnitude", "pattern": "2:4", "include": BLOCKS},
        "objective": objective,
        "pretrained": DENSE,
    }


def quantised(bits: int, objective: dict) -> dict:
    """The second stage, from the network that the first one leaves."""
    return {
        "steps": 300,
        "optimizer": adam(5e-4),
        "method": {"name": "fixed", "score": "pretrained"},
        "parameterization": {"name": "fake_quant", "bits": bits, "include": BLOCKS},
        "objective": objective,
        "pretrained": pruned(objective),
    }


def get_config() -> ml_collections.ConfigDict:
    """Both stages with distillation."""
    config, _ = base.training(steps=300, batch_size=64)
    config.data, config.model = ml_collections.ConfigDict(DATA), ml_collections.ConfigDict(MODEL)
    for field, value in quantised(4, DISTILL).items():
        config[field] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    config.eval_every = 100
    return config
