"""HESSO and CRIC, whole channels removed while training [Chen et al. 2024]; about 12 minutes on two cores."""

from experiments.claims import Claim, all_of, greater
from experiments.tables import (
    ACCURACY,
    FASHION_MNIST,
    NONZEROS,
    QUICK,
    TRAIN_FLOPS,
    Metric,
    Panel,
    Row,
    Share,
    Table,
)
from sparsejax.saliency import DEFAULT

MODEL = {"name": "cnn", "channels": (8, 16), "hidden": 64}
SPARSITIES = (0.5, 0.7)
PRETRAINED_SPARSITIES = (0.7, 0.8)
# Groups go between a tenth and the middle of training; one-shot pruning happens where HESSO has finished.
BEGIN, END = Share(0.1), Share(0.5)
RELEASED = ["cosine_released" if name == "cosine" else name for name in DEFAULT]
ONE_SHOT_GROUPS = {"name": "hesso", "criteria": ["magnitude"]}
METHODS = {
    "HESSO, 1 period": {"name": "hesso", "begin": BEGIN, "end": END, "periods": 1},
    "HESSO, 5 periods": {"name": "hesso", "begin": BEGIN, "end": END, "periods": 5},
    "HESSO, released sign": {"name": "hesso", "begin": BEGIN, "end": END, "periods": 5, "criteria": RELEASED},
    "one-shot filters": {
        "name": "one_shot", "at": END, "pattern": "channel", "allocation": "uniform", "exclude": ["head/*"],
    },
    "one-shot groups": {**ONE_SHOT_GROUPS, "begin": END, "end": Share(0.501)},
}  # fmt: skip
# CRIC takes at most 5 cycles, after 18 probes, and is through by the middle as well.
CRIC = {"name": "cric", "sampling_steps": Share(0.05), "hybrid_steps": Share(0.2), "max_cycles": 5}
AFTER_TRAINING = {
    "HESSO": {"name": "hesso", "begin": 0, "end": END, "periods": 5},
    "CRIC": CRIC,
    "CRIC without probes": {**CRIC, "loss_weight": 0.0},
    "one-shot groups": {**ONE_SHOT_GROUPS, "begin": 0, "end": 1},
}
QUICK_SERIES = ("HESSO, 5 periods", "CRIC")


def label(series: str, sparsity: float, where: str = "") -> str:
    """The name of a row."""
    return f"{where}{series} {100 * sparsity:g} %"


def rows(methods, sparsities, where: str = "") -> tuple[Row, ...]:
    """Every method at every sparsity."""
    return tuple(
        Row(
            label(series, sparsity, where), series, sparsity, {"method": {**method, "sparsity": sparsity}},
            quick=sparsity == 0.7 and series in QUICK_SERIES,
        )
        for series, method in methods.items() for sparsity in sparsities
    )  # fmt: skip


def beats(a: str, b: str, sparsities=SPARSITIES, where: str = "", **kwargs):
    """Whether a method is more accurate than another at every sparsity."""
    return all_of(*(greater(label(a, s, where), label(b, s, where), **kwargs) for s in sparsities))


PAPER = (
    "T. Chen, X. Qu, D. Aponte et al.: HESSO: towards automatic efficient and user friendly any neural network "
    "training and pruning, 2024"
)
FIVE, TRAINED = "HESSO, 5 periods", "pretrained, "
TABLE = Table(
    title="HESSO and CRIC: removing channels while training",
    papers=(PAPER,),
    about="Fashion-MNIST, SGD with momentum at batch size 128, a CNN of 8 and 16 channels and a dense layer of "
    "64: 88 groups, of which the sparsity is a fraction. From scratch: three epochs. Pretrained: a dense network "
    "of three epochs is trained for half as long again. HESSO with one step and plain magnitude is one-shot pruning "
    "of the same groups; one-shot filters prunes the same fraction in every layer and leaves biases. CRIC's probes add "
    "each layer's loss ratio, divided by its number of groups, to the scores of its groups: that spares the small layers, "
    "and here leaves a single neuron of the dense layer at 80 %. The paper's abstract has no figures; its networks and data are far larger.",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "From scratch",
            (Row("dense", "dense", 0.0, {"method": {"name": "dense"}}, quick=True), *rows(METHODS, SPARSITIES)),
            seeds=5, overrides={"model": MODEL}, x_title="fraction of groups removed",
        ),
        Panel(
            "From a trained network",
            rows(AFTER_TRAINING, PRETRAINED_SPARSITIES, TRAINED),
            seeds=5, x_title="fraction of groups removed",
            overrides={"model": MODEL, "pretrained": {"steps": Share(2.0)}, "steps": 704, "optimizer.learning_rate": 0.02},
        ),
    ),
    claims=(
        Claim("HESSO stays within a point of the dense network, without fine-tuning",
              all_of(*(greater(label(FIVE, s), "dense", by=-0.01) for s in SPARSITIES))),
        Claim("HESSO is more accurate than one-shot pruning of filters with as many steps",
              beats(FIVE, "one-shot filters")),
        Claim("HESSO is more accurate than one-shot magnitude pruning of the same groups",
              beats(FIVE, "one-shot groups")),
        Claim("Five periods are more accurate than one", beats(FIVE, "HESSO, 1 period")),
        Claim("The cosine's sign matters: ours is more accurate than the released one",
              beats(FIVE, "HESSO, released sign")),
        Claim("On a trained network CRIC is more accurate than HESSO",
              beats("CRIC", "HESSO", PRETRAINED_SPARSITIES, TRAINED)),
        Claim("So is CRIC without its probes of the loss",
              beats("CRIC without probes", "HESSO", PRETRAINED_SPARSITIES, TRAINED)),
    ),
    metrics=(ACCURACY, Metric("groups", "groups left", 1, 0), NONZEROS, TRAIN_FLOPS),
    quick=QUICK,
)  # fmt: skip
