"""GQSA: groups dropped and quantised, with and without its two stages, against 2:4 and two bits; six minutes
on two cores once the decoders are trained."""

from experiments import compression
from experiments.claims import Claim, greater
from experiments.compression import BITS, DAMAGE, QUICK, REACHED, SECONDS
from experiments.tables import Panel, Row, Table

GROUPS = {"pattern": "block:16x1", "sparsity": 0.5}
# The paper's rates were not to be had; these train a model of this size.
TUNED = {"scope": "row", "block_epochs": 20, "weight_rate": 3e-3, "epochs": 4, "tune_rate": 1e-3}
ROWS = {
    "dense": {"method": "dense", "sparsity": None},
    "W4S50": {"method": "gqsa", "options": TUNED, **GROUPS},
    "W4S50, stage 1": {"method": "gqsa", "options": {**TUNED, "epochs": 0}, **GROUPS},
    "W4S50, untuned": {"method": "gqsa", "options": {**TUNED, "block_epochs": 0, "epochs": 0}, **GROUPS},
    "S50": {"method": "group_pruning", "options": {"scope": "row"}, **GROUPS},
    "2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "W2, tuned": {
        "method": "gqsa",
        "options": {**TUNED, "bits": 2},
        "pattern": "block:16x1",
        "sparsity": 0.0,
    },
    "W2": {"method": "rtn", "options": {"bits": 2}, "sparsity": 0.0},
    "W4": {"method": "rtn", "options": {"bits": 4}, "sparsity": 0.0},
}


def lower(first: str, second: str):
    """Whether the first has the lower loss."""
    return greater(second, first, BITS.name)


TABLE = Table(
    title="GQSA: group quantisation and sparsity",
    papers=(
        "C. Zeng et al.: GQSA: group quantization and sparsity for accelerating large language model inference, 2024",
    ),
    about=compression.ABOUT
    + "Groups are 16 inputs of one output. W4S50 drops half of the groups of every output and rounds the rest to four "
    "bits; stage 1 trains weights and scales block by block, stage 2 scales and zeros on the loss. 2:4 is SparseGPT with "
    "float32 weights, W2 and W4 round to the nearest of groups of 16.",
    base=compression.base(),
    panels=(
        Panel(
            "Four bits, half of the groups",
            tuple(
                Row(name, name, overrides.get("sparsity", 0.5) or 0.0, overrides, name in ("W4S50", "W2"))
                for name, overrides in ROWS.items()
            ),
            seeds=3,
        ),
    ),
    claims=(
        Claim("W4S50 has a lower loss than 2:4 with float32 weights", lower("W4S50", "2:4")),
        Claim("W4S50 has a lower loss than two bits, tuned alike", lower("W4S50", "W2, tuned")),
        Claim("W4S50 has a lower loss than two bits, rounded to the nearest", lower("W4S50", "W2")),
        Claim("Stage 1 lowers the loss", lower("W4S50, stage 1", "W4S50, untuned")),
        Claim("Stage 2 lowers it further", lower("W4S50", "W4S50, stage 1")),
    ),
    metrics=(BITS, DAMAGE, REACHED, SECONDS),
    quick=QUICK,
    function=compression.run,
)
