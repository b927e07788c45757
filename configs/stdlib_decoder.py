"""A byte-level decoder to compress: the Llama family's block, trained on the sources of Python's standard library.

  python -m experiments.run --config=configs/stdlib_decoder.py --workdir=runs/stdlib_decoder

Four blocks of width 128 (0.87M parameters) reach a test loss of 1.26 nats per byte (1.82 bits) in about four minutes on two CPU
cores. The tables on post-training compression start from it, and `experiments.compress --model=runs/stdlib_decoder` takes it.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """A decoder with rotary positions, RMS norms and SwiGLU, for 600 steps of 32 windows."""
    config, _ = base.training(steps=600, batch_size=32)
    config.data = ml_collections.ConfigDict({"name": "stdlib", "length": 128, "size": 8_000_000})
    config.model = ml_collections.ConfigDict(
        {
            "name": "transformer",
            "depth": 4,
            "width": 128,
            "heads": 4,
            "hidden": 352,
            "max_length": 1024,
            "positions": "rotary",
            "norm": "rms",
            "activation": "silu",
            "gated": True,
            "bias": (),
        }
    )
    config.optimizer = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 2e-3,
            "b2": 0.95,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "final_factor": 0.1,
            "warmup_steps": 50,
        }
    )
    config.eval_every = 300
    config.checkpoint_every = 300
    return config
