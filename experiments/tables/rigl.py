"""RigL against its rivals at equal parameters [Evci et al. 2020]; about 20 minutes on two cores."""

from experiments.claims import Claim, all_of, gap, greater
from experiments.tables import (
    ACCURACY,
    FASHION_MNIST,
    NONZEROS,
    QUICK,
    TRAIN_FLOPS,
    Figures,
    Metric,
    Panel,
    Row,
    Share,
    Table,
)

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
# As the papers: topology changes stop at three quarters of training, and pruning leaves time to recover. The
# interval is shorter than their 100 steps because training is: it gives about 50 changes.
DYNAMIC = {"allocation": "erk", "update_every": 20, "drop_fraction": 0.3, "update_end": Share(0.75)}
PRUNING = {"begin": Share(0.125), "end": Share(0.75)}
METHODS = {
    "static": {"name": "fixed", "allocation": "erk"},
    "SET": {"name": "set_", **DYNAMIC},
    "SNFS": {"name": "snfs", **DYNAMIC},
    "RigL": {"name": "rigl", **DYNAMIC},
    "gradual": {"name": "gradual", "allocation": "erk", "update_every": 20, **PRUNING},
}
CNN = {"name": "cnn", "channels": (8, 16)}
QUICK_SPARSITY = 0.95


def rows(model: str, sparsities) -> tuple[Row, ...]:
    """Dense, and every method at every sparsity, of one model."""
    dense = Row(f"{model} dense", "dense", 0.0, {"method": {"name": "dense"}}, quick=model == "MLP")
    return (dense,) + tuple(
        Row(
            label(model, series, sparsity), series, sparsity,
            {"method": {**method, "sparsity": sparsity}},
            quick=model == "MLP" and sparsity == QUICK_SPARSITY,
        )
        for series, method in METHODS.items() for sparsity in sparsities
    )  # fmt: skip


def label(model: str, series: str, sparsity: float) -> str:
    """The name of a row."""
    return f"{model} {series} {100 * sparsity:g} %"


def beats(a: str, b: str, model: str, sparsities=SPARSITIES, **kwargs):
    """Whether a method is more accurate than another at every sparsity."""
    return all_of(*(greater(label(model, a, s), label(model, b, s), **kwargs) for s in sparsities))


def claims(model: str, sparsities) -> tuple[Claim, ...]:
    """What the paper says of these methods, for one model: at every sparsity, and where it matters most."""
    low, high = sparsities[0], sparsities[-1]
    gain = [gap(label(model, "RigL", s), label(model, "static", s)) for s in (low, high)]
    everywhere, highest = "at every sparsity", f"at {100 * high:g} %"
    checks = {}
    for where, chosen in ((everywhere, sparsities), (highest, (high,))):
        checks |= {
            f"SET is more accurate than a static network {where}": beats("SET", "static", model, chosen),
            f"RigL is more accurate than SET {where}": beats("RigL", "SET", model, chosen),
        }
    checks |= {
        f"RigL is more accurate than SNFS {everywhere}": beats("RigL", "SNFS", model, sparsities),
        f"RigL reaches gradual pruning, to within 0.5 points, {everywhere}":
            beats("RigL", "gradual", model, sparsities, by=-0.005),
        f"RigL gains more over static {highest} than at {100 * low:g} %": greater(gain[1], gain[0]),
        f"dense is more accurate than RigL {everywhere}":
            all_of(*(greater(f"{model} dense", label(model, "RigL", s)) for s in sparsities)),
    }  # fmt: skip
    return tuple(Claim(f"{model}: {text}", check) for text, check in checks.items())


WRN = "WRN-22-2, CIFAR-10"
TABLE = Table(
    title="RigL against static, dynamic and gradual sparsity",
    papers=(
        "U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen: Rigging the Lottery, ICML 2020",
        "D. C. Mocanu et al.: Scalable training of artificial neural networks with adaptive sparse "
        "connectivity (SET), Nature Communications 2018",
        "T. Dettmers, L. Zettlemoyer: Sparse networks from scratch (SNFS), 2019",
        "M. Zhu, S. Gupta: To prune, or not to prune (gradual), 2017",
    ),
    about="Fashion-MNIST, three epochs of SGD with momentum at batch size 128; LeNet-300-100, and a CNN of "
    "two convolutions and two dense layers. Layer-wise sparsities are those of ERK for all methods (SNFS "
    "moves them). Training is far shorter than in the papers, whose networks see a hundred epochs and more.",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "LeNet-300-100", rows("MLP", SPARSITIES), seeds=5,
            paper=(
                Figures("dense", "ResNet-50, ImageNet", {0.0: 76.8}),
                Figures("static", WRN, {0.8: 92.9, 0.9: 91.5, 0.95: 89.0}),
                Figures("RigL", WRN, {0.8: 93.6, 0.9: 92.9, 0.95: 91.8}),
                Figures("RigL", "ResNet-50, ImageNet", {0.8: 75.12, 0.9: 73.07}),
                Figures("gradual", WRN, {0.8: 93.6, 0.9: 93.3, 0.95: 92.3}),
            ),
        ),
        Panel("Small CNN", rows("CNN", SPARSITIES[:-1]), seeds=3, overrides={"model": CNN}),
    ),
    claims=claims("MLP", SPARSITIES) + claims("CNN", SPARSITIES[:-1]),
    metrics=(ACCURACY, TRAIN_FLOPS, Metric("exploration_rate", "weights ever active (ITOP)"), NONZEROS),
    quick=QUICK,
)  # fmt: skip
