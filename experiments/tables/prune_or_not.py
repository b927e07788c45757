"""Large-sparse against small-dense at equal parameters [Zhu & Gupta 2017]; about 5 minutes on two cores."""

from experiments.claims import Claim, all_of, greater
from experiments.tables import ACCURACY, FASHION_MNIST, NONZEROS, QUICK, Figures, Panel, Row, Share, Table

INPUTS, HIDDEN, CLASSES = 784, (300, 100), 10
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
GRADUAL = {"name": "gradual", "begin": Share(0.125), "end": Share(0.75), "update_every": 20}


def parameters(hidden: tuple[int, int], sparsity: float = 0.0) -> int:
    """Non-zero parameters of an MLP whose kernels are sparse and whose biases are not."""
    widths = (INPUTS, *hidden, CLASSES)
    kernels = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    return round((1 - sparsity) * kernels) + sum(widths[1:])


def small(sparsity: float) -> tuple[int, int]:
    """Widths of the dense MLP whose parameters are nearest to those of the sparse large one.

    The proportions are those of the large one, except that no layer is narrower than the classes: it would
    be a bottleneck that no one would build.
    """
    target = parameters(HIDDEN, sparsity)
    candidates = [(first, max(CLASSES, round(first / 3))) for first in range(1, HIDDEN[0] + 1)]
    return min(candidates, key=lambda hidden: abs(parameters(hidden) - target))


def rows() -> tuple[Row, ...]:
    """The large dense network, its pruned versions, and the small dense ones of equal size."""
    found = [Row("dense", "dense", 0.0, {}, quick=True)]
    for series, allocation in (("large sparse, uniform", "uniform"), ("large sparse, ERK", "erk")):
        for sparsity in SPARSITIES:
            method = {**GRADUAL, "sparsity": sparsity, "allocation": allocation}
            row = Row(label(series, sparsity), series, sparsity, {"method": method}, quick=sparsity == 0.95)
            found.append(row)
    for sparsity in SPARSITIES:
        model = {"name": "mlp", "hidden": small(sparsity)}
        where = label("small dense", sparsity)
        found.append(Row(where, "small dense", sparsity, {"model": model}, quick=sparsity == 0.95))
    return tuple(found)


def label(series: str, sparsity: float) -> str:
    """The name of a row; a small dense network is named by the sparsity it is to match."""
    return f"{series} {100 * sparsity:g} %"


def beats(series: str):
    """Whether a large sparse network is more accurate than the small dense one at every size."""
    return all_of(*(greater(label(series, s), label("small dense", s)) for s in SPARSITIES))


WIDTHS = ", ".join(f"{a}-{b} for {100 * s:g} %" for s in SPARSITIES for a, b in [small(s)])
MOBILENET = "MobileNet, ImageNet"
TABLE = Table(
    title="To prune, or not to prune: large-sparse against small-dense",
    papers=("M. Zhu, S. Gupta: To prune, or not to prune, 2017",),
    about="Fashion-MNIST, three epochs of SGD with momentum at batch size 128. LeNet-300-100 is pruned "
    "gradually with the cubic schedule, with the same sparsity in every layer as in the paper, and with that "
    f"of ERK; the small dense networks have hidden widths that match its non-zero parameters ({WIDTHS}).",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "Equal non-zero parameters", rows(), seeds=5,
            x_title="sparsity of the large network",
            paper=(
                Figures("dense", MOBILENET, {0.0: 70.6}),
                Figures("large sparse, uniform", MOBILENET, {0.8: "67.7 at 75 %", 0.9: 61.8}),
                Figures("small dense", MOBILENET, {0.8: "63.7, half width", 0.9: "50.6, quarter width"}),
            ),
        ),
    ),
    claims=(
        Claim("A large sparse network is more accurate than a small dense one of equal size",
              beats("large sparse, uniform")),
        Claim("The same with the layer-wise sparsities of ERK", beats("large sparse, ERK")),
        Claim("A tenth of the weights suffices for the dense accuracy, to within 0.5 points",
              greater(label("large sparse, uniform", 0.9), "dense", by=-0.005)),
    ),
    metrics=(ACCURACY, NONZEROS),
    quick=QUICK,
)  # fmt: skip
