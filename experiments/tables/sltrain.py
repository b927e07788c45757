"""SLTrain against full-rank and low-rank training of a byte-level language model [Han et al. 2024]; about 20 minutes."""

import math

import ml_collections

from experiments.claims import Claim, all_of, greater
from experiments.tables import ACCURACY, Figures, Metric, Panel, Row, Table

WIDTH, DEPTH, RATIO, LENGTH = 64, 2, 4, 64
DENSITY = 0.03
RANKS = (4, 8)
SHAPES = 4 * [(WIDTH, WIDTH)] + 2 * [(WIDTH, RATIO * WIDTH)]  # attention, and the two feed-forward matrices
ALPHA = 32  # of the paper's 60M model; of 2, 8 and 32 the best in a shorter run
LOSS = Metric("test_loss", "test loss", 1, 3, "nats per byte")

LANGUAGE = ml_collections.ConfigDict(
    {
        "seed": 0,
        "data": {"name": "stdlib", "length": LENGTH},
        "model": {"name": "transformer", "depth": DEPTH, "width": WIDTH, "heads": 4, "max_length": LENGTH},
        "optimizer": {
            "name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.0, "clip_norm": 1.0,
            "schedule": "cosine", "warmup_steps": 100,
        },
        "method": {"name": "dense"},
        "batch_size": 32,
        "eval_batch_size": 500,
        "steps": 1000,
        "log_every": 400,
        "eval_every": 0,
        "checkpoint_every": 0,
        "curves": False,
    }
)  # fmt: skip


def low_rank_weights(rank: int) -> int:
    """Parameters of the factors of one block."""
    return rank * sum(inputs + outputs for inputs, outputs in SHAPES)


def sparse_weights() -> int:
    """Parameters of the sparse parts of one block."""
    return sum(math.floor(DENSITY * inputs * outputs) for inputs, outputs in SHAPES)


def equal_rank(rank: int) -> int:
    """The least rank at which low-rank layers hold as many parameters as SLTrain of that rank, or more."""
    return math.ceil((low_rank_weights(rank) + sparse_weights()) / low_rank_weights(1))


def share(weights: int) -> float:
    """Weights of one block as a percentage of its full-rank ones."""
    return round(100 * weights / sum(inputs * outputs for inputs, outputs in SHAPES), 1)


def rows() -> tuple[Row, ...]:
    """Full rank; at every rank low rank and SLTrain, and the low rank of as many parameters."""

    def row(label: str, series: str, x: float, quick: bool = False, **linear) -> Row:
        return Row(label, series, x, {"model.linear": linear}, quick)

    found = [row("full rank", "full rank", 100.0, quick=True, name="dense")]
    for rank in RANKS:
        quick, equal = rank == RANKS[-1], equal_rank(rank)
        alone, both = share(low_rank_weights(rank)), share(low_rank_weights(rank) + sparse_weights())
        sltrain = {"name": "sparse_low_rank", "rank": rank, "density": DENSITY, "alpha": ALPHA}
        found.append(row(f"low rank {rank}", "low rank", alone, quick, name="low_rank", rank=rank))
        found.append(row(f"SLTrain {rank}", "SLTrain", both, quick, **sltrain))
        found.append(row(f"low rank {equal}", "low rank", both, name="low_rank", rank=equal))
    return tuple(found)


def lower(a: str, b: str, **kwargs):
    """Whether the test loss of one row is below that of another."""
    return greater(b, a, metric=LOSS.name, **kwargs)


def at_each_rank(other):
    """SLTrain below the low-rank row that `other` names, at every rank."""
    return all_of(*(lower(f"SLTrain {rank}", f"low rank {other(rank)}") for rank in RANKS))


C4 = "LLaMA 60M, C4, perplexity, not checked"
TABLE = Table(
    title="SLTrain: sparse plus low-rank weights against low rank and full rank",
    papers=("A. Han, J. Li, W. Huang, M. Hong, A. Takeda, P. Jawanpuria, B. Mishra: SLTrain, NeurIPS 2024",),
    about=f"A decoder of {DEPTH} blocks of width {WIDTH} predicts the bytes of Python's standard library: windows of "
    f"{LENGTH} bytes, {LANGUAGE.batch_size} a step, {LANGUAGE.steps} steps of AdamW with warm-up and a cosine, without "
    f"weight decay. All attention and feed-forward matrices are factorised; SLTrain's supports are {100 * DENSITY:g} % "
    f"of them, and alpha is {ALPHA}. The x axis is the share of the matrices' parameters that is kept; the low-rank "
    "rows at the same share as SLTrain have the least rank that gives them as many parameters or more "
    f"({', '.join(str(equal_rank(rank)) for rank in RANKS)}). The peak learning rate is the best of 3e-3, 1e-2 and "
    "2e-2 in shorter runs, which is the same for every kind of layer. SLTrain multiplies by the dense weight that it "
    "builds, so it saves memory (`python -m sparsejax.bench memory`) and no multiplications. The papers train larger "
    "models for longer.",
    base=LANGUAGE,
    panels=(
        Panel(
            "Loss against parameters", rows(), seeds=3,
            x_title="parameters of the matrices (% of full rank)", x_scale="log", reference="full rank",
            paper=(
                Figures("full rank", C4, {100.0: 34.06}, LOSS.name),
                Figures("low rank", C4, {share(low_rank_weights(RANKS[-1])): 78.18}, LOSS.name),
                Figures("SLTrain", C4, {share(low_rank_weights(RANKS[-1]) + sparse_weights()): 34.15}, LOSS.name),
            ),
        ),
    ),
    claims=(
        Claim("SLTrain reaches a lower loss than low-rank layers of its rank", at_each_rank(lambda rank: rank)),
        Claim("SLTrain reaches a lower loss than low-rank layers of as many parameters", at_each_rank(equal_rank)),
        Claim("Full rank reaches a lower loss than SLTrain, at every rank",
              all_of(*(lower("full rank", f"SLTrain {rank}") for rank in RANKS))),
        Claim(f"SLTrain with rank {RANKS[-1]} is within 0.02 nats per byte of full rank",
              lower(f"SLTrain {RANKS[-1]}", "full rank", by=-0.02)),
    ),
    metrics=(LOSS, ACCURACY, Metric("nonzeros", "parameters", 1, 0)),
    quick={"steps": 40, "optimizer.warmup_steps": 10, "data.size": 100_000},
    quick_seeds=1,
)  # fmt: skip
