"""Monarch layers against low-rank and narrow ones, and reverse sparsification [Dao et al. 2022]; 6 minutes."""

from experiments.claims import Claim, all_of, greater, within
from experiments.tables import (
    ACCURACY,
    FASHION_MNIST,
    NONZEROS,
    QUICK,
    Figures,
    Metric,
    Panel,
    Row,
    Share,
    Table,
)

INPUTS, WIDTH, CLASSES, STEPS = 784, 512, 10, 1408
BLOCKS = (4, 8, 16)
# Peak learning rates: of 1e-3, 2e-3, 4e-3 and 8e-3 the most accurate on held-out training images.
RATE = 2e-3  # where nothing else is said
RATES = {
    ("Monarch", 8): 4e-3,
    ("Monarch", 16): 8e-3,
    ("low rank", 8): 4e-3,
    ("low rank", 16): 4e-3,
    ("narrow dense", 8): 4e-3,
}
FIRST = 0.75  # of the steps of the two-stage rows
LOSS = Metric("test_loss", "test loss", 1, 4)


def optimizer(rate: float = RATE, start: float = 1.0, end: float = 0.0) -> dict:
    """Adam with a linear schedule between two fractions of the peak rate."""
    return {"name": "adam", "schedule": "linear", "learning_rate": start * rate, "final_factor": end / start}


def rank(blocks: int) -> int:
    """Rank of the slices of a Monarch layer that holds 1 / blocks of the weights of a square one, twice."""
    return WIDTH // blocks**2


def factored(inner: int) -> int:
    """Parameters of the network whose hidden layers are `inputs x inner` times `inner x WIDTH` in size."""
    return inner * (INPUTS + WIDTH) + inner * 2 * WIDTH + 2 * WIDTH + (WIDTH + 1) * CLASSES


def dense(width: int) -> int:
    """Parameters of the network with dense hidden layers of that width."""
    return (INPUTS + 1) * width + (width + 1) * width + (width + 1) * CLASSES


def narrow(parameters: int) -> int:
    """The width at which a dense network has so many parameters, as nearly as can be."""
    return min(range(CLASSES, WIDTH), key=lambda width: abs(dense(width) - parameters))


def thousands(parameters: int) -> float:
    """How the x axis shows a number of parameters."""
    return round(parameters / 1000, 1)


def rows() -> tuple[Row, ...]:
    """Dense, and at every size a Monarch, a low-rank and a narrow dense network; then the two-stage ones."""
    full = thousands(dense(WIDTH))
    found = [Row("dense", "dense", full, {"optimizer": optimizer()}, quick=True)]
    for blocks in BLOCKS:
        inner = blocks * rank(blocks)
        x = thousands(factored(inner))
        width = narrow(factored(inner))
        kinds = {
            "Monarch": {"model.linear": {"name": "monarch", "blocks": blocks}},
            "low rank": {"model.linear": {"name": "low_rank", "rank": inner}},
            "narrow dense": {"model.hidden": (width, width)},
        }
        for series, model in kinds.items():
            overrides = {**model, "optimizer": optimizer(RATES.get((series, blocks), RATE))}
            found.append(Row(label(series, blocks), series, x, overrides, quick=blocks == BLOCKS[-1]))
    monarch = {"name": "monarch", "blocks": BLOCKS[0]}
    stages = (
        ("Monarch, then dense", full, monarch, {"name": "dense"}),
        ("dense, then Monarch", thousands(factored(WIDTH // BLOCKS[0])), {"name": "dense"}, monarch),
    )  # fmt: skip
    for series, x, first, second in stages:
        found.append(Row(series, series, x, two_stages(first, second)))
    return tuple(found)


def two_stages(first: dict, second: dict) -> dict:
    """Overrides: one kind of layer for three quarters of the steps, the other from its weights for the rest.

    One schedule goes through both stages.
    """
    rest = 1 - FIRST
    model = {"name": "mlp", "hidden": (WIDTH, WIDTH)}
    return {
        "steps": round(rest * STEPS),
        "model": {**model, "linear": second},
        "optimizer": optimizer(start=rest),
        "pretrained": {
            "steps": Share(FIRST / rest),
            "model": {**model, "linear": first},
            "optimizer": optimizer(end=rest),
        },
    }


def label(series: str, blocks: int) -> str:
    """The name of a row: the size is that of the Monarch network with so many blocks."""
    return f"{series}, {thousands(factored(blocks * rank(blocks))):g}k"


def beats(a: str, b: str, sizes=BLOCKS):
    """Whether one kind of layer is more accurate than another at all these sizes."""
    return all_of(*(greater(label(a, size), label(b, size)) for size in sizes))


WIDTHS = ", ".join(str(narrow(factored(blocks * rank(blocks)))) for blocks in BLOCKS)
RANKS = ", ".join(str(blocks * rank(blocks)) for blocks in BLOCKS)
TABLE = Table(
    title="Monarch layers: structured matrices at equal parameters, and reverse sparsification",
    papers=(
        "T. Dao et al.: Monarch: expressive structured matrices for efficient and accurate training, ICML 2022",
    ),
    about=f"Fashion-MNIST, an MLP with two hidden layers of {WIDTH}, {STEPS} steps (three epochs) of Adam at batch "
    f"size 128 with a linear schedule, whose peak is the best of four for each kind and size on held-out images. "
    f"Monarch layers have {', '.join(map(str, BLOCKS))} blocks, low-rank layers of equal parameters rank {RANKS}, "
    f"narrow dense networks width {WIDTHS}; the head is dense. Each weight is used once per example, so that the "
    "cost of a network relative to the dense one is that of its parameters. The two-stage rows train one kind of "
    f"layer for {100 * FIRST:g} % of the steps and then the other, from the same function (multiplied out) or from "
    "the nearest one (projected). The papers train transformers and mixers, where the layers are square.",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "Accuracy against parameters", rows(), seeds=5,
            overrides={"model": {"name": "mlp", "hidden": (WIDTH, WIDTH)}, "steps": STEPS},
            x_title="parameters (thousands)", x_scale="log",
            paper=(
                Figures("Monarch", "ViT on ImageNet, GPT-2 on WikiText-103",
                        {thousands(factored(WIDTH // BLOCKS[0])): "that of dense, trained 2x faster"}),
                Figures("Monarch, then dense", "GPT-2 pretraining",
                        {thousands(dense(WIDTH)): "that of dense, trained 2x faster"}),
            ),
        ),
    ),
    claims=(
        Claim("With 4 blocks Monarch layers lose less than 1 point against dense ones",
              greater(label("Monarch", BLOCKS[0]), "dense", by=-0.01)),
        Claim("Monarch layers are more accurate than low-rank layers of equal parameters, at every size",
              beats("Monarch", "low rank")),
        Claim("The same at the smallest size", beats("Monarch", "low rank", BLOCKS[-1:])),
        Claim("Monarch layers are more accurate than a narrow dense network of equal parameters, at every size",
              beats("Monarch", "narrow dense")),
        Claim("Monarch for three quarters of training, then dense, is as accurate as dense, to within 0.5 points",
              within("Monarch, then dense", "dense", 0.005)),
        Claim("Projecting a dense network is as accurate as Monarch from scratch, to within 0.5 points",
              within("dense, then Monarch", label("Monarch", BLOCKS[0]), 0.005)),
    ),
    metrics=(ACCURACY, LOSS, NONZEROS),
    quick=QUICK,
)  # fmt: skip
