"""AST at 1:16 on a pretrained MLP (Huang et al. 2025): annealed SR-STE in AdamW, distillation, SLoRB.

  python -m experiments.run --config=configs/digits_ast.py --workdir=/tmp/digits_ast

Trains dense for 500 steps (97.5 % test accuracy) and then for 500 under 1:16 masks: 96.8 %. `sad` in the
metrics counts the flips of masks so far, most of them in the first hundred steps. About 15 seconds on two CPU
cores.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
    """The boosted variant; without `config.parameterization` it is the naive one."""
    config, _ = digits.pretrained()
    pattern = ml_collections.FieldReference("1:16")  # one for both, also if overridden
    config.method = ml_collections.ConfigDict(
        {"name": "ast", "pattern": pattern, "exclude": ("*head/*",), "strength": 1e-2}
    )
    config.parameterization = ml_collections.ConfigDict(
        {"name": "slorb", "block": 16, "pattern": pattern, "exclude": ("head/*",)}
    )
    config.objective = ml_collections.ConfigDict({"distill": 2 / 3, "temperature": 2.0})
    return config
