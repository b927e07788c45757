"""Heads and channels removed from a trained decoder by FLAP, CFSP, SliceGPT and baselines; six minutes
on two cores once the decoders are trained."""

from experiments import compression
from experiments.claims import Claim, all_of, greater
from experiments.compression import BITS, DAMAGE, QUICK, REACHED, SECONDS, SPEEDUP, STORED
from experiments.tables import Panel, Row, Table

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
TITLES = {
    "magnitude_sp": "magnitude",
    "wanda_sp": "Wanda-sp",
    "flap": "FLAP",
    "cfsp": "CFSP",
    "slicegpt": "SliceGPT",
    "ziplm": "ZipLM",
}
# Every method removes the same share of the blocks' weights.
OPTIONS = {"slicegpt": {"count": "weights", "multiple": 1}, "ziplm": {"evaluations": 200, "starts": 20, "patience": 20}}
PLAIN = "FLAP, no biases"


def label(series: str, sparsity: float) -> str:
    """The name of a row."""
    return f"{series}, {100 * sparsity:g} %"


def rows() -> tuple[Row, ...]:
    """All methods over sparsity, and FLAP without its biases."""
    found = [("dense", 0.1, {"method": "dense", "sparsity": None})]
    for sparsity in SPARSITIES:
        for method, title in TITLES.items():
            options = OPTIONS.get(method, {})
            found.append((title, sparsity, {"method": method, "options": options, "sparsity": sparsity}))
        off = {"method": "flap", "options": {"compensate": False}, "sparsity": sparsity}
        found.append((PLAIN, sparsity, off))
    return tuple(
        Row(series if series == "dense" else label(series, x), series, x, overrides, quick=x == 0.5 or series == "dense")
        for series, x, overrides in found
    )


def better(first: str, second: str, sparsities=SPARSITIES):
    """Whether the first method has the lower loss at each of these sparsities."""
    return all_of(*(greater(label(second, x), label(first, x), BITS.name) for x in sparsities))


TABLE = Table(
    title="Structured pruning of a trained language model",
    papers=(
        "Y. An et al.: Fluctuation-based adaptive structured pruning for large language models (FLAP), AAAI 2024",
        "Y. Wang et al.: CFSP: structured pruning with coarse-to-fine activation information, COLING 2025",
        "S. Ashkboos et al.: SliceGPT, ICLR 2024",
        "E. Kurtic, E. Frantar, D. Alistarh: ZipLM, NeurIPS 2023",
    ),
    about=compression.ABOUT + "Sparsity is the share of the blocks' weights that is removed; arrays really shrink, and the "
    "forward pass of one window is timed against the dense model's in one process. Nothing is fine-tuned. CFSP removes "
    "feed-forward channels only, SliceGPT directions of the residual stream (its shortcuts count as weights).",
    base=compression.base(),
    panels=(
        Panel(
            "Loss over sparsity", rows(), seeds=3, overrides={"repeats": 100},
        ),
    ),
    claims=(
        Claim("FLAP has a lower loss than Wanda-sp from 30 %", better("FLAP", "Wanda-sp", (0.3, 0.4, 0.5))),
        Claim("FLAP's biases lower its loss from 30 %", better("FLAP", PLAIN, (0.3, 0.4, 0.5))),
        Claim("CFSP has a lower loss than FLAP at 50 %", better("CFSP", "FLAP", (0.5,))),
        Claim("ZipLM has a lower loss than FLAP and Wanda-sp at every sparsity",
              all_of(better("ZipLM", "FLAP"), better("ZipLM", "Wanda-sp"))),
        Claim("SliceGPT has a lower loss than magnitude at every sparsity", better("SliceGPT", "magnitude")),
        Claim("ZipLM at 50 % is at least 1.2 times faster than dense",
              greater(label("ZipLM", 0.5), 1.2, SPEEDUP.name)),
    ),
    metrics=(BITS, DAMAGE, SPEEDUP, STORED, REACHED, SECONDS),
    quick=QUICK,
    quick_seeds=1,
    function=compression.run,
)  # fmt: skip
