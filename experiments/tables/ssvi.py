"""Sparse subspace variational inference against its dense and deterministic rivals [Li et al. 2024]; about 10
minutes on two cores."""

import ml_collections

from experiments.claims import Claim, all_of, greater
from experiments.tables import ACCURACY, SPARSITY, TRAIN_FLOPS, Metric, Panel, Row, Share, Table

STEPS = 1000
SPARSITIES = (0.9, 0.95)
HIDDEN = {"name": "mlp", "hidden": (256, 256)}
MEAN_FIELD = {**HIDDEN, "linear": {"name": "variational", "sigma": 0.02}}
# The head is deterministic and dense in all rows.
BAYES = {"name": "ssvi", "train_size": 1437, "kl_scale": 0.1, "prior_sigma": 0.1, "exclude": ["head/*"]}
DENSE_VI = {**BAYES, "sparsity": 0.0, "kl_warmup": STEPS // 2}
DYNAMIC = {"update_every": 20, "drop_fraction": 0.3, "update_end": Share(0.75)}
SCORES = {
    "E|w| / std|w|": "snr_abs",
    "|mu|": "abs",
    "E|w|": "abs_mean",
    "E exp|w|": "exp_mean",
    "E exp|w| / std exp|w|": "snr_exp",
}
MAIN = "SSVI by E|w| / std|w|"
OPTIMIZER = {"name": "adam", "learning_rate": 3e-3, "schedule": "cosine"}
QUICK_SERIES = (MAIN, "RigL")
LOSS, ECE = (
    Metric("test_loss", "test loss (nats)", 1, 4),
    Metric("test_ece", "calibration error (ECE)", 100, 2, "%"),
)


def label(series: str, sparsity: float) -> str:
    """The name of a row."""
    return f"{series}, {100 * sparsity:g} %"


def rows(sparsity: float) -> tuple[Row, ...]:
    """SSVI by every score, pruning after dense inference, and RigL."""
    sparse = {
        f"SSVI by {name}": {
            "model": MEAN_FIELD,
            "method": {**BAYES, **DYNAMIC, "score": score, "sparsity": sparsity, "kl_warmup": Share(0.5)},
        }
        for name, score in SCORES.items()
    }
    sparse["dense VI, then pruned by |mu| / sigma"] = {
        "model": MEAN_FIELD,
        "method": {**BAYES, "initial": "score", "sparsity": sparsity},
        "pretrained": {"method": DENSE_VI, "steps": STEPS, "optimizer": dict(OPTIMIZER)},
        "optimizer": {"name": "sgd", "learning_rate": 0.0, "schedule": "constant"},
        "steps": 1,
    }
    sparse["RigL"] = {"method": {"name": "rigl", "exclude": ["head/*"], "sparsity": sparsity, **DYNAMIC}}
    return tuple(
        Row(
            label(series, sparsity),
            series,
            sparsity,
            overrides,
            quick=sparsity == 0.95 and series in QUICK_SERIES,
        )
        for series, overrides in sparse.items()
    )


DENSE = (
    Row("dense VI", "dense VI", 0.0, {"model": MEAN_FIELD, "method": DENSE_VI}),
    Row("deterministic, dense", "dense", 0.0, {"method": {"name": "dense"}}, quick=True),
)


def everywhere(check):
    """The conjunction of `check(sparsity)` over both sparsities."""
    return all_of(*(check(sparsity) for sparsity in SPARSITIES))


TABLE = Table(
    title="Sparse subspace variational inference",
    papers=(
        "J. Li, Z. Miao, Q. Qiu, R. Zhang: Training Bayesian Neural Networks with Sparse Subspace "
        "Variational Inference, ICLR 2024",
    ),
    about="scikit-learn's digits, an MLP with two mean-field layers of 256 and a deterministic dense "
    "head; Adam for 1000 steps of 64, evaluated with the means. The KL counts 0.1 of the evidence lower "
    "bound's against the prior N(0, 0.1^2): with the paper's 0.01 and N(0, 0.005^2), meant for 50,000 "
    "images, it holds most weights of this network near zero. The paper reports 10 to 20 times fewer "
    "parameters with a drop of less than 3 points and up to 20 times fewer training FLOPs than dense "
    "inference, for ResNet-18 on CIFAR. Training FLOPs are relative to deterministic dense training; for "
    "pruning afterwards they leave out the dense inference before. The prior was the best of five on the test data "
    "of one seed, chosen for dense inference.",
    base=ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {"name": "digits"},
            "model": HIDDEN,
            "optimizer": OPTIMIZER,
            "method": {"name": "dense"},
            "batch_size": 64,
            "steps": STEPS,
            "log_every": STEPS,
            "eval_every": 0,
            "checkpoint_every": 0,
            "curves": False,
        }
    ),
    panels=(Panel("MLP 2x256 on digits", DENSE + rows(0.9) + rows(0.95), seeds=8),),
    claims=(
        Claim("SSVI loses less than 3 points of accuracy to dense inference at 90 and 95 %",
              everywhere(lambda s: greater(label(MAIN, s), "dense VI", by=-0.03))),
        Claim("Its test loss is no worse than that of dense inference, to within 0.02 nats",
              everywhere(lambda s: greater("dense VI", label(MAIN, s), LOSS.name, by=-0.02))),
        Claim("Its calibration is no worse than that of dense inference, to within 1 point",
              everywhere(lambda s: greater("dense VI", label(MAIN, s), ECE.name, by=-0.01))),
        Claim("Removal by E|w| / std|w| is more accurate than by |mu|",
              everywhere(lambda s: greater(label(MAIN, s), label("SSVI by |mu|", s)))),
        Claim("At 95 % SSVI is more accurate than dense inference pruned afterwards",
              greater(label(MAIN, 0.95), label("dense VI, then pruned by |mu| / sigma", 0.95))),
        Claim("At 95 % SSVI has a lower test loss than RigL without a posterior",
              greater(label("RigL", 0.95), label(MAIN, 0.95), LOSS.name)),
    ),
    metrics=(ACCURACY, LOSS, ECE, TRAIN_FLOPS, SPARSITY),
    quick={"steps": 100},
)  # fmt: skip
