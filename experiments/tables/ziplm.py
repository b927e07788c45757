"""ZipLM: which speed-up is asked for and which one is reached, on two otherwise idle cores (`--jobs=1`); four
minutes once the decoders are trained."""

from experiments import compression
from experiments.claims import Claim, all_of, within
from experiments.compression import BITS, DAMAGE, QUICK, SECONDS, STORED
from experiments.tables import Metric, Panel, Row, Table

ASKED = (1.25, 1.5, 2.0)
PREDICTED = Metric("report_predicted", "speed-up predicted from the table of latencies", 1, 2)
OPTIONS = {"evaluations": 200, "starts": 20, "patience": 20, "shape": (8, 128)}


def label(asked: float) -> str:
    """The name of a row."""
    return f"{asked:g}x"


TABLE = Table(
    title="ZipLM: asked and reached speed-up",
    papers=("E. Kurtic, E. Frantar, D. Alistarh: ZipLM: inference-aware structured pruning, NeurIPS 2023",),
    about=compression.ABOUT + "Heads and channels are removed so that a forward pass of eight windows takes the asked share of "
    "the dense model's time, by a table of latencies measured here; then both are timed in turns. Nothing is fine-tuned.",
    base=compression.base(),
    panels=(
        Panel(
            "Eight windows",
            tuple(
                Row(label(x), "ZipLM", x, {"method": "ziplm", "options": {"speedup": x, **OPTIONS}}, x == 1.5)
                for x in ASKED
            ),
            seeds=3, x_title="speed-up asked", x_scale="log", reference="",
        ),
    ),
    claims=(
        Claim("The speed-up predicted is within 5 % of the one asked",
              all_of(*(within(label(x), x, 0.05 * x, PREDICTED.name) for x in ASKED))),
        Claim("The speed-up reached is within 15 % of the one asked",
              all_of(*(within(label(x), x, 0.15 * x, "report_speedup") for x in ASKED))),
    ),
    metrics=(Metric("report_speedup", "speed-up reached", 1, 2), PREDICTED, BITS, DAMAGE, STORED, SECONDS),
    quick=QUICK,
    quick_seeds=1,
    function=compression.run,
)  # fmt: skip
