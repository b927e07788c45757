"""EvoPress against uniform and OWL allocations of the sparsity; 8 minutes on two cores once the decoders are trained."""

from experiments import compression
from experiments.claims import Claim, all_of, greater
from experiments.compression import BITS, DAMAGE, QUICK, REACHED, SECONDS
from experiments.tables import Figures, Panel, Row, Table

SPARSITIES = (0.6, 0.7)
SEARCH = {"generations": 40, "offspring": 16, "stages": ((4, 2048), (1, 8192))}
SPARSEGPT = {"method": "sparsegpt"}


def label(series: str, sparsity: float) -> str:
    """The name of a row."""
    return f"{series}, {100 * sparsity:g} %"


def rows() -> tuple[Row, ...]:
    """SparseGPT with three ways to divide the sparsity among layers."""
    found = []
    for x in SPARSITIES:
        ways = {
            "uniform": {**SPARSEGPT, "options": {}},
            "OWL": {**SPARSEGPT, "options": {}, "allocation": "owl"},
            "EvoPress": {"method": "evopress", "options": {"method": "sparsegpt", **SEARCH}},
        }
        found += [
            Row(label(series, x), series, x, {**way, "sparsity": x}, quick=x == 0.7 and series != "OWL")
            for series, way in ways.items()
        ]
    return (Row("dense", "dense", SPARSITIES[0], {"sparsity": None}), *found)


def lower(first: str, second: str):
    """Whether the first has the lower loss at every sparsity."""
    return all_of(*(greater(label(second, x), label(first, x), BITS.name) for x in SPARSITIES))


TABLE = Table(
    title="EvoPress: a search for the sparsity of every layer",
    papers=(
        "O. Sieberling et al.: EvoPress: accurate dynamic model compression via evolutionary search, ICML 2025",
        "L. Yin et al.: Outlier weighed layerwise sparsity (OWL), ICML 2024",
    ),
    about=compression.ABOUT + "All three prune with SparseGPT; the search has 40 generations of 16 offspring on at most 8192 "
    "of the calibration tokens (the paper: 400 of 64 on 65536).",
    base=compression.base(),
    panels=(
        Panel(
            "SparseGPT", rows(), seeds=3,
            paper=(
                Figures("uniform", "LLaMA-7B, WikiText-2, perplexity", {0.7: 26.30}, BITS.name),
                Figures("OWL", "the same", {0.7: 19.49}, BITS.name),
            ),
        ),
    ),
    claims=(
        Claim("EvoPress has a lower loss than the uniform sparsity", lower("EvoPress", "uniform")),
        Claim("EvoPress has a lower loss than OWL", lower("EvoPress", "OWL")),
        Claim("OWL has a lower loss than the uniform sparsity", lower("OWL", "uniform")),
    ),
    metrics=(BITS, DAMAGE, REACHED, SECONDS),
    quick=QUICK,
    quick_seeds=1,
    function=compression.run,
)  # fmt: skip
