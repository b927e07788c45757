"""Winning tickets against their controls [Frankle & Carbin 2019]; about 5 minutes on two cores."""

import ml_collections

from experiments.claims import Claim, all_of, greater, within
from experiments.tables import ACCURACY, SPARSITY, Metric, Panel, Row, Table

STEPS = 320  # 20 epochs of digits
PRUNE_FRACTION = 0.3868  # 8 rounds keep 2 % of the weights
ROUNDS = (2, 4, 6, 8)
CONTROLS = {"ticket": "ticket", "new weights": "reinit", "shuffled masks": "random"}
IMP = {
    "name": "imp",
    "prune_fraction": PRUNE_FRACTION,
    "rewind_step": 0,
    "scope": "global",
    "final_steps": 3 * STEPS,
}


def sparsity(rounds: int) -> float:
    """The sparsity after so many rounds."""
    return round(1 - (1 - PRUNE_FRACTION) ** rounds, 3)


def label(series: str, rounds: int) -> str:
    """The name of a row."""
    return f"{series}, {rounds} rounds"


def rows() -> tuple[Row, ...]:
    """The dense network, and every control after every number of rounds."""
    return (Row("dense", "dense", 0.0, {"steps": 3 * STEPS}),) + tuple(
        Row(
            label(series, rounds), series, sparsity(rounds),
            {"procedure": {**IMP, "rounds": rounds, "control": control}}, quick=rounds == 8,
        )
        for series, control in CONTROLS.items() for rounds in ROUNDS
    )  # fmt: skip


def beats(series: str, rounds=ROUNDS):
    """Whether the ticket is more accurate than a control after each of these numbers of rounds."""
    return all_of(*(greater(label("ticket", n), label(series, n)) for n in rounds))


TABLE = Table(
    title="Winning tickets against their controls",
    papers=("J. Frankle, M. Carbin: The Lottery Ticket Hypothesis, ICLR 2019",),
    about="scikit-learn's digits, LeNet-300-100, iterative magnitude pruning: every round trains 20 epochs, removes "
    f"{100 * PRUNE_FRACTION:g} % of the remaining weights over all layers and rewinds to initialisation (SGD with momentum, no "
    "later rewind point); then 60 epochs from the original weights (ticket), from new weights under the same "
    "masks, or under masks shuffled inside each layer.",
    base=ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {"name": "digits"},
            "model": {"name": "mlp", "hidden": (300, 100)},
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "schedule": "cosine"},
            "method": {"name": "dense"},
            "batch_size": 64,
            "steps": STEPS,
            "log_every": STEPS,
            "eval_every": 0,
            "checkpoint_every": 0,
            "curves": False,
        }
    ),
    panels=(Panel("LeNet-300-100 on digits", rows(), seeds=5),),
    claims=(
        Claim("A ticket with 98 % of the weights removed is within 3 points of the dense network",
              within("dense", label("ticket", 8), 0.03)),
        Claim("A ticket is more accurate than its masks with new weights", beats("new weights")),
        Claim("At 98 % a ticket is more accurate than its masks with new weights", beats("new weights", (8,))),
        Claim("A ticket is more accurate than its weights under shuffled masks", beats("shuffled masks")),
        Claim("At 98 % a ticket is more accurate than its weights under shuffled masks", beats("shuffled masks", (8,))),
    ),
    metrics=(ACCURACY, SPARSITY, Metric("train_flops_ratio", "training FLOPs of all rounds / dense", 1, 2)),
    quick={"steps": 32, "procedure.final_steps": 96},
)  # fmt: skip
