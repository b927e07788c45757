"""Random pruning: width and layer-wise ratios decide [Liu et al. 2022]; about 10 minutes on two cores."""

from experiments.claims import Claim, all_of, gap, greater, within
from experiments.tables import ACCURACY, FASHION_MNIST, QUICK, SPARSITY, Panel, Row, Table

WIDTHS = (16, 32, 64, 128, 256, 512)
SPARSITIES = (0.9, 0.95, 0.98)
RATIOS = {
    "uniform": "uniform",
    "uniform+": "uniform_plus",
    "ER": "erdos_renyi",
    "ERK": "erk",
    "SNIP ratio": "snip",
}
RANDOM = {"name": "fixed", "sparsity": 0.8, "allocation": "erk"}


def wide_rows() -> tuple[Row, ...]:
    """Dense and randomly pruned MLPs with two hidden layers of every width."""
    return tuple(
        Row(
            f"{series}, width {width}", series, width,
            {"model": {"name": "mlp", "hidden": (width, width)}, "method": method},
            quick=width in (16, 512),
        )
        for series, method in (("dense", {"name": "dense"}), ("random 80 %", RANDOM)) for width in WIDTHS
    )  # fmt: skip


def ratio_rows() -> tuple[Row, ...]:
    """LeNet-300-100 with random masks of every layer-wise ratio and sparsity."""
    return (Row("dense", "dense", 0.0, {}),) + tuple(
        Row(
            label(series, sparsity), series, sparsity,
            {"method": {"name": "fixed", "sparsity": sparsity, "allocation": allocation}},
            quick=sparsity == 0.9 and series in ("uniform", "ERK", "SNIP ratio"),
        )
        for series, allocation in RATIOS.items() for sparsity in SPARSITIES
    )  # fmt: skip


def label(series: str, sparsity: float) -> str:
    """The name of a row of the second panel."""
    return f"{series} {100 * sparsity:g} %"


def loss(width: int):
    """What random pruning costs at a width."""
    return gap(f"dense, width {width}", f"random 80 %, width {width}")


def beats(a: str, b: str):
    """Whether a ratio is more accurate than another at every sparsity."""
    return all_of(*(greater(label(a, s), label(b, s)) for s in SPARSITIES))


TABLE = Table(
    title="The unreasonable effectiveness of random pruning",
    papers=(
        "S. Liu, T. Chen, X. Chen, L. Shen, D. C. Mocanu, Z. Wang, M. Pechenizkiy: The Unreasonable "
        "Effectiveness of Random Pruning, ICLR 2022 (its headline: a randomly pruned Wide ResNet-50 "
        "outperforms the dense one on ImageNet)",
    ),
    about="Fashion-MNIST, three epochs of SGD with momentum at batch size 128; masks are random with exact "
    "counts and stay fixed. First MLPs with two hidden layers of equal width, dense and 80 % sparse with the "
    "ratios of ERK; then LeNet-300-100 with different ratios. SNIP ratio keeps only the layer densities of "
    "SNIP's masks.",
    base=FASHION_MNIST,
    panels=(
        Panel("Width", wide_rows(), seeds=5, x_title="hidden width", x_scale="log", reference=""),
        Panel("Layer-wise ratios, LeNet-300-100", ratio_rows(), seeds=5),
    ),
    claims=(
        Claim("The cost of random pruning at 80 % falls from width 16 to 64 to 512",
              all_of(greater(loss(16), loss(64)), greater(loss(64), loss(512)))),
        Claim("At width 512 random pruning at 80 % is within 0.5 points of dense",
              within("random 80 %, width 512", "dense, width 512", 0.005)),
        Claim("At width 512 random pruning at 80 % outperforms dense",
              greater("random 80 %, width 512", "dense, width 512")),
        Claim("ERK is more accurate than uniform ratios", beats("ERK", "uniform")),
        Claim("SNIP's ratios are more accurate than uniform ones", beats("SNIP ratio", "uniform")),
        Claim("ERK is more accurate than SNIP's ratios", beats("ERK", "SNIP ratio")),
    ),
    metrics=(ACCURACY, SPARSITY),
    quick=QUICK,
)  # fmt: skip
