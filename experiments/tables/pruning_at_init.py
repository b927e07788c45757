"""Pruning at initialisation: SNIP, GraSP, SynFlow and two baselines; about 12 minutes on two cores."""

from experiments.claims import Claim, all_of, greater, within
from experiments.tables import ACCURACY, FASHION_MNIST, QUICK, SPARSITY, Figures, Panel, Row, Table

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
METHODS = {
    "random": {"name": "fixed", "score": "random", "allocation": "erk"},
    "magnitude": {"name": "fixed", "score": "magnitude", "allocation": "global"},
    "SNIP": {"name": "fixed", "score": "snip", "allocation": "global"},
    "GraSP": {"name": "fixed", "score": "grasp", "allocation": "global"},
    "SynFlow": {"name": "fixed", "score": "synflow", "allocation": "global"},
}
DEEP = {"model": {"name": "mlp", "hidden": (100,) * 5}}
COMPRESSIONS = {"10": 10.0, "10^1.5": 10**1.5, "100": 100.0, "10^2.5": 10**2.5}
CHANCE = 0.1


def rows() -> tuple[Row, ...]:
    """LeNet-300-100, dense and with every method at every sparsity."""
    return (Row("dense", "dense", 0.0, {}),) + tuple(
        Row(
            label(series, sparsity), series, sparsity,
            {"method": {**method, "sparsity": sparsity}}, quick=sparsity == 0.98,
        )
        for series, method in METHODS.items() for sparsity in SPARSITIES
    )  # fmt: skip


def deep_rows() -> tuple[Row, ...]:
    """Six layers of width 100 at every compression, the setting of layer collapse."""
    return tuple(
        Row(
            f"deep {series} {name}", series, compression,
            {**DEEP, "method": {**METHODS[series], "sparsity": round(1 - 1 / compression, 6)}},
            quick=name == "10^2.5" and series in ("SNIP", "SynFlow"),
        )
        for series in ("magnitude", "SNIP", "GraSP", "SynFlow") for name, compression in COMPRESSIONS.items()
    )  # fmt: skip


def label(series: str, sparsity: float) -> str:
    """The name of a row of the first panel."""
    return f"{series} {100 * sparsity:g} %"


def beats(a: str, b: str, sparsities):
    """Whether a method is more accurate than another at these sparsities."""
    return all_of(*(greater(label(a, s), label(b, s)) for s in sparsities))


TABLE = Table(
    title="Pruning at initialisation",
    papers=(
        "N. Lee, T. Ajanthan, P. Torr: SNIP: Single-shot Network Pruning based on Connection Sensitivity, "
        "ICLR 2019",
        "C. Wang, G. Zhang, R. Grosse: Picking Winning Tickets Before Training by Preserving Gradient Flow "
        "(GraSP), ICLR 2020",
        "H. Tanaka, D. Kunin, D. Yamins, S. Ganguli: Pruning neural networks without any data by iteratively "
        "conserving synaptic flow (SynFlow), NeurIPS 2020 (figures only)",
    ),
    about="Fashion-MNIST, three epochs of SGD with momentum at batch size 128, masks fixed from the start. "
    "First LeNet-300-100; then a network of six layers of width 100 without normalisation, pruned so far "
    "that methods may empty whole layers and leave a network at chance. Random masks have the layer-wise "
    "sparsities of ERK; all other methods rank the weights of all layers together.",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "LeNet-300-100", rows(), seeds=5,
            paper=(Figures("GraSP", "VGG-16, ImageNet", {0.8: "dense - 1.6"}),),
        ),
        Panel(
            "Six layers of width 100", deep_rows(), seeds=5, x_scale="log", reference="",
            x_title="compression (weights / non-zero weights)",
        ),
    ),
    claims=(
        Claim("SNIP is more accurate than random pruning", beats("SNIP", "random", SPARSITIES)),
        Claim("SNIP is more accurate than magnitude pruning at initialisation",
              beats("SNIP", "magnitude", SPARSITIES)),
        Claim("GraSP is more accurate than SNIP at extreme sparsity (98 and 99 %)",
              beats("GraSP", "SNIP", (0.98, 0.99))),
        Claim("SynFlow is more accurate than SNIP and GraSP at 99 %",
              all_of(beats("SynFlow", "SNIP", (0.99,)), beats("SynFlow", "GraSP", (0.99,)))),
        Claim("Deep network: SynFlow stays 5 points above chance up to a compression of 10^2.5",
              all_of(*(greater(f"deep SynFlow {c}", CHANCE, by=0.05) for c in COMPRESSIONS))),
        Claim("Deep network: SNIP collapses to chance at a compression of 10^2.5 (within 1 point)",
              within("deep SNIP 10^2.5", CHANCE, 0.01)),
        Claim("Deep network: SynFlow is more accurate than SNIP at compressions of 100 and 10^2.5",
              all_of(*(greater(f"deep SynFlow {c}", f"deep SNIP {c}") for c in ("100", "10^2.5")))),
    ),
    metrics=(ACCURACY, SPARSITY),
    quick=QUICK,
    quick_seeds=1,
)  # fmt: skip
