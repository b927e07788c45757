"""2:4 pruning and quantisation of a vision transformer, distilled [Yu et al. 2023]; about 8 minutes."""

import ml_collections

from configs import digits_gpusq_vit as recipe
from experiments.claims import Claim, all_of, greater
from experiments.tables import ACCURACY, NONZEROS, SPARSITY, Metric, Panel, Row, Table

LOSS = Metric("test_loss", "test loss", 1, 4)
ALONE, TAUGHT = "labels alone", "distilled"
OBJECTIVES = {ALONE: {}, TAUGHT: recipe.DISTILL}
BITS = (8, 4, 2)
# Under the masks of the first stage and quantised, but not trained any more.
STILL = {"steps": 1, "optimizer": {"name": "sgd", "learning_rate": 0.0}, "objective": {}}
DENSE_BITS, SPARSE_BITS = 32, 16  # where the rows stand on the x axis, in bits of a weight


def label(series: str, bits: int) -> str:
    """The name of a row."""
    return f"{series}, INT{bits}" if bits < SPARSE_BITS else f"{series}, 2:4"


def rows() -> tuple[Row, ...]:
    """Dense, and by objective both stages; quantised without training after the distilled first stage."""
    found = [Row("dense", "dense", DENSE_BITS, {**STILL, "pretrained": recipe.DENSE}, quick=True)]
    for series, objective in OBJECTIVES.items():
        found.append(Row(label(series, SPARSE_BITS), series, SPARSE_BITS, recipe.pruned(objective)))
        for bits in BITS:
            quick = series == TAUGHT and bits == 4
            found.append(Row(label(series, bits), series, bits, recipe.quantised(bits, objective), quick))
    for bits in (4, 2):
        overrides = {**recipe.quantised(bits, recipe.DISTILL), **STILL}
        found.append(Row(label("not trained", bits), "not trained", bits, overrides))
    return tuple(found)


def better(bits, margin: float = 0.0):
    """Whether distillation is the more accurate at each number of bits."""
    return all_of(*(greater(label(TAUGHT, b), label(ALONE, b), by=margin) for b in bits))


BASE = recipe.get_config()
BASE.update({"log_every": 500, "eval_every": 0, "checkpoint_every": 0, "curves": False})
TABLE = Table(
    title="GPUSQ-ViT: 2:4 sparsity, then quantisation, with distillation",
    papers=(
        "C. Yu, T. Chen, Z. Gan, J. Fan: Boost vision transformer with GPU-friendly sparsity, CVPR 2023",
    ),
    about="Digits (60 % for training), a vision transformer of two blocks of width 64 on 4 patches, trained "
    "dense for 1000 steps of Adam. Its 12 kernels are pruned to 2:4 by magnitude and trained on for 300 "
    "steps under fixed masks, then quantised (symmetric, one scale per output channel) and trained for "
    "300 steps under the same masks. Distilled rows add the Kullback-Leibler divergence from the "
    "network that their stage starts from, at temperature 2, and the mean squared distance between "
    "the outputs of the blocks (the paper weights blocks by sensitivity). As in the paper patches, norms and head "
    "are not pruned; activations are not quantised here. \"not trained\" rounds the distilled 2:4 "
    "network.",
    base=ml_collections.ConfigDict(BASE),
    panels=(
        Panel(
            "Digits", rows(), seeds=6,
            x_title="bits of a weight (16: 2:4 alone, 32: dense)", x_scale="log",
        ),
    ),
    claims=(
        Claim("distilled, 2:4 with INT8 is as accurate as dense to within 0.5 points",
              greater(label(TAUGHT, 8), "dense", by=-0.005)),
        Claim("distilled, 2:4 with INT4 is as accurate as dense to within 0.5 points",
              greater(label(TAUGHT, 4), "dense", by=-0.005)),
        Claim("without distillation 2:4 and 2:4 with INT8 are less accurate", better((SPARSE_BITS, 8))),
        Claim("without distillation 2:4 with INT4 is less accurate", better((4,))),
        Claim("training under quantisation is more accurate than rounding at INT4",
              greater(label(TAUGHT, 4), label("not trained", 4))),
        Claim("training under quantisation is more accurate than rounding at INT2",
              greater(label(TAUGHT, 2), label("not trained", 2))),
    ),
    metrics=(ACCURACY, LOSS, SPARSITY, NONZEROS),
    quick={"steps": 60, "pretrained.steps": 60},
    quick_seeds=1,
)  # fmt: skip
