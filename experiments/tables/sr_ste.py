"""SR-STE against STE and pruning once, in accuracy and in mask flips [Zhou et al. 2021]; about 6 minutes."""

import ml_collections

from experiments.claims import Claim, all_of, greater, within
from experiments.tables import (
    ACCURACY,
    TRAIN_FLOPS,
    Figures,
    Metric,
    Panel,
    Row,
    Share,
    Table,
)

PATTERNS = {"2:4": 1 / 2, "1:4": 3 / 4, "1:8": 7 / 8, "1:16": 15 / 16}
SITES = {"exclude": ("head/*",)}
# Adam divides the decay by the size of the gradients, so it is larger than the paper's 2e-4 under SGD.
WEAK, STRONG = "SR-STE 2e-3", "SR-STE 2e-2"
METHODS = {
    "one-shot": {"name": "one_shot", "at": Share(0.5)},
    "masked": {"name": "mdgf", "end": 0},
    "STE": {"name": "ste"},
    WEAK: {"name": "sr_ste", "decay": 2e-3},
    STRONG: {"name": "sr_ste", "decay": 2e-2},
}
SAD = Metric("sad", "mask entries flipped (SAD)", 1, 0)

DIGITS = ml_collections.ConfigDict(
    {
        "seed": 0,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "hidden": (64, 64)},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "method": {"name": "dense"},
        "batch_size": 64,
        "steps": 1000,
        "log_every": 500,
        "eval_every": 0,
        "checkpoint_every": 0,
        "curves": False,
    }
)


def label(series: str, pattern: str) -> str:
    """The name of a row."""
    return f"{series}, {pattern}"


def rows() -> tuple[Row, ...]:
    """Dense, and every method at every pattern."""
    return (Row("dense", "dense", 0.0, {}, quick=True),) + tuple(
        Row(
            label(series, pattern), series, sparsity,
            {"method": {**method, "pattern": pattern, **SITES}},
            quick=pattern == "1:16",
        )
        for series, method in METHODS.items() for pattern, sparsity in PATTERNS.items()
    )  # fmt: skip


def at_all(check, *patterns: str):
    """A check at each of the patterns."""
    return all_of(*(check(pattern) for pattern in patterns))


def beats(a: str, b: str, metric: str = ACCURACY.name, **kwargs):
    """By pattern, whether a method's metric exceeds another's."""
    return lambda pattern: greater(label(a, pattern), label(b, pattern), metric, **kwargs)


TABLE = Table(
    title="SR-STE against STE and one-shot pruning",
    papers=("A. Zhou, Y. Ma, J. Zhu et al.: Learning N:M fine-grained structured sparse neural networks from "
            "scratch (SR-STE), ICLR 2021",),
    about="Digits (60 % for training), an MLP 64-64-64-10 whose two hidden kernels are N:M; 1000 steps of "
    "Adam at 2e-3 with a cosine, batch size 64. All methods train for as many steps: one-shot (as ASP "
    "does) trains dense for half of them, prunes by magnitude and trains on with fixed masks; masked "
    "chooses its masks at every step, as STE does, but pruned weights get no gradient. The decay of "
    "SR-STE is part of the gradient; under Adam it needs to be larger than the paper's 2e-4 under "
    "SGD. SAD is the number of mask entries that flip, over all steps. In training FLOPs only the "
    "forward pass of a straight-through method is sparse.",
    base=DIGITS,
    panels=(
        Panel(
            "Digits", rows(), seeds=12,
            paper=(
                Figures("dense", "ResNet-50, ImageNet (not checked)", {0.0: 77.3}),
                Figures(WEAK, "ResNet-50, ImageNet, decay 2e-4 (not checked)", {0.5: 77.0}),
            ),
        ),
    ),
    claims=(
        Claim("SR-STE is more accurate than STE at 1:16", beats(WEAK, "STE")("1:16")),
        Claim("SR-STE is at least as accurate as STE, to within 0.3 points, at every pattern",
              at_all(beats(WEAK, "STE", by=-0.003), *PATTERNS)),
        Claim("STE is more accurate than one-shot pruning with fine-tuning at 1:8 and 1:16",
              at_all(beats("STE", "one-shot"), "1:8", "1:16")),
        Claim("SR-STE is more accurate than one-shot pruning with fine-tuning at 1:8 and 1:16",
              at_all(beats(WEAK, "one-shot"), "1:8", "1:16")),
        Claim("STE is more accurate than masked gradients at 1:16", beats("STE", "masked")("1:16")),
        Claim("SR-STE flips fewer masks than STE at every pattern",
              at_all(beats("STE", WEAK, SAD.name), *PATTERNS)),
        Claim("the larger decay flips fewer masks still at every pattern",
              at_all(beats(WEAK, STRONG, SAD.name), *PATTERNS)),
        Claim("SR-STE at 2:4 is within 0.5 points of dense", within(label(WEAK, "2:4"), "dense", 0.005)),
    ),
    metrics=(ACCURACY, SAD, TRAIN_FLOPS),
    quick={"steps": 60},
)  # fmt: skip
