"""Turbo-VBI on linear regression with clustered weights [Xia et al. 2023]; half a minute on two cores."""

import ml_collections

from experiments import clustered_regression
from experiments.claims import Claim, all_of, gap, greater
from experiments.tables import Metric, Panel, Row, Table

SAMPLES = (70, 100, 150)
DATA = {"size": 200, "bursts": 5, "length": 8, "noise": 0.5}
# The priors know how many weights are active, 40 of 200; the chain also knows how long bursts are.
PRIOR = {"name": "turbo_vbi", "p01": 5 / 160, "p10": 1 / 8, "slab": (1.0, 1.0), "spike": (1.0, 1e-3)}
METHODS = {
    "chain prior": {**PRIOR, "structure": "chain"},
    "independent prior": {**PRIOR, "structure": "independent"},
    "ARD, coefficients that are not 0": {"name": "ard"},
    "ARD, best threshold in hindsight": {"name": "ard_best"},
}
F1 = "f1"


def label(series: str, samples: int) -> str:
    """The name of a row."""
    return f"{series}, {samples} samples"


def beats(rival: str, samples=SAMPLES):
    """Whether the chain prior has a higher F1 score than a rival with each of these numbers of samples."""
    return all_of(*(greater(label("chain prior", n), label(rival, n), F1) for n in samples))


ROWS = tuple(
    Row(label(series, n), series, n, {"method": method, "data": {**DATA, "samples": n}}, quick=n == 100)
    for series, method in METHODS.items() for n in SAMPLES
)  # fmt: skip
GAINS = [gap(label("chain prior", n), label("independent prior", n)) for n in (70, 150)]

TABLE = Table(
    title="Turbo-VBI: clustered weights of a linear regression",
    papers=(
        "C. Xia, D. H. K. Tsang, V. K. N. Lau: Structured Bayesian Compression for Deep Neural Networks "
        "Based on the Turbo-VBI Approach, 2023",
        "M. E. Tipping: Sparse Bayesian Learning and the Relevance Vector Machine, 2001 (ARD)",
    ),
    about="y = X w + noise with 200 weights of which 5 bursts of 8 neighbours are active (standard "
    "normal; noise of standard deviation 0.5). Scored is which weights a method calls active. Both priors "
    "know the share of active weights, the chain also the length of bursts; the noise is estimated. "
    "Inference starts with 20 rounds of ARD; this start, the spike and the noise were chosen by looking at F1.",
    base=ml_collections.ConfigDict({"seed": 0, "data": {}, "method": {}}),
    panels=(
        Panel("Recovery of the support", ROWS, seeds=10, x_title="samples", x_scale="log", reference=""),
    ),
    claims=(
        Claim("The chain prior finds the support better than the independent prior with 100 samples",
              beats("independent prior", (100,))),
        Claim("The same with 70, 100 and 150 samples", beats("independent prior")),
        Claim("The chain prior finds the support better than ARD with 70, 100 and 150 samples",
              beats("ARD, coefficients that are not 0")),
        Claim("The same if ARD had the best threshold in hindsight",
              beats("ARD, best threshold in hindsight")),
        Claim("The chain gains more with fewer samples (70 against 150)", greater(*GAINS, F1)),
    ),
    metrics=(
        Metric(F1, "F1 score of the support", 1, 3),
        Metric("relative_error", "relative error of the weights", 1, 3),
        Metric("active", "weights called active (of 40)", 1, 1),
        Metric("run_length", "mean length of a run of active weights", 1, 1),
    ),
    quick={"data.size": 120},
    function=clustered_regression.run,
)  # fmt: skip
