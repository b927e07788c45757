"""BDWP and its ablations: which of the three products of a training step may be N:M [Fang et al. 2023]."""

from experiments.claims import Claim, all_of, greater
from experiments.tables import (
    ACCURACY,
    FASHION_MNIST,
    QUICK,
    TRAIN_FLOPS,
    Figures,
    Metric,
    Panel,
    Row,
    Table,
)

PATTERNS = {"2:8": 3 / 4, "1:16": 15 / 16}
METHODS = {
    "SR-STE": {"name": "sr_ste", "decay": 2e-4},
    "BDWP": {"name": "bdwp", "variant": "bdwp"},
    "SDWP": {"name": "bdwp", "variant": "sdwp"},
    "SDGP": {"name": "bdwp", "variant": "sdgp"},
}
INFERENCE_FLOPS = Metric("inference_flops_ratio", "inference FLOPs / dense", 1, 3)


def label(series: str, pattern: str) -> str:
    """The name of a row."""
    return f"{series}, {pattern}"


def rows() -> tuple[Row, ...]:
    """Dense, and every method at every pattern; the head stays dense, its ten outputs make no groups."""
    return (Row("dense", "dense", 0.0, {"method": {"name": "dense"}}, quick=True),) + tuple(
        Row(
            label(series, pattern), series, sparsity,
            {"method": {**method, "pattern": pattern, "exclude": ("head/*",)}},
            quick=pattern == "2:8",
        )
        for series, method in METHODS.items() for pattern, sparsity in PATTERNS.items()
    )  # fmt: skip


def beats(a: str, b: str, *patterns: str, **kwargs):
    """Whether a method's metric exceeds another's at all these patterns."""
    return all_of(*(greater(label(a, pattern), label(b, pattern), **kwargs) for pattern in patterns))


COST = TRAIN_FLOPS.name
TABLE = Table(
    title="BDWP: N:M weights in the forward and the backward pass",
    papers=(
        "C. Fang, W. Sun, A. Zhou, Z. Wang: Efficient N:M sparse DNN training using algorithm, architecture, "
        "and dataflow co-design (BDWP), IEEE TCAD 2023",
        "B. McDanel, H. Dinh, J. Magallanes: Accelerating DNN training with structured data gradient pruning "
        "(SDGP), ICPR 2022",
    ),
    about="Fashion-MNIST, an MLP 784-256-256-10 whose two hidden kernels are N:M (the head is dense), three "
    "epochs of SGD with momentum at batch size 128. SR-STE is sparse in the forward pass only, SDWP "
    "and SDGP in the gradient of the inputs only (so that their inference is dense), BDWP in both. "
    "FLOPs are those of N:M products whose groups lie along the reduction axis: (2 N/M + 1) / 3 for "
    "BDWP, (N/M + 2) / 3 for the others, on the hidden layers. The paper keeps the first layer of its "
    "convolutional networks dense; here it is most of the network, and sparse.",
    base=FASHION_MNIST,
    panels=(
        Panel(
            "MLP 784-256-256-10", rows(), seeds=5,
            overrides={"model.hidden": (256, 256)},
            paper=(
                Figures("BDWP", "mean over five networks: points below dense", {0.75: "-0.56"}),
                Figures("BDWP", "formula of the paper", {0.75: 0.5, 0.9375: 0.375}, metric=COST),
                Figures("SR-STE", "formula of the paper", {0.75: 0.75, 0.9375: 0.6875}, metric=COST),
            ),
        ),
    ),
    claims=(
        Claim("BDWP falls behind SR-STE by less than 1 point at 2:8",
              beats("BDWP", "SR-STE", "2:8", by=-0.01)),
        Claim("BDWP falls behind dense by less than 1.5 points at 2:8",
              greater(label("BDWP", "2:8"), "dense", by=-0.015)),
        Claim("BDWP falls behind SR-STE by less than 1 point at 1:16",
              beats("BDWP", "SR-STE", "1:16", by=-0.01)),
        Claim("BDWP trains with at least 24 points fewer of the dense FLOPs than SR-STE at 2:8",
              beats("SR-STE", "BDWP", "2:8", metric=COST, by=0.24)),
        Claim("BDWP is more accurate than SDGP at both patterns", beats("BDWP", "SDGP", *PATTERNS)),
        Claim("SDWP is more accurate than SDGP at both patterns", beats("SDWP", "SDGP", *PATTERNS)),
    ),
    metrics=(ACCURACY, TRAIN_FLOPS, INFERENCE_FLOPS),
    quick=QUICK,
)  # fmt: skip
