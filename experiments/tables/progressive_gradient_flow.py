"""Mask and structure decay against STE and SR-STE, the more the sparser? [Bambhaniya et al. 2024];
about 12 minutes on two cores."""

from experiments.claims import Claim, all_of, gap, greater
from experiments.tables import (
    ACCURACY,
    TRAIN_FLOPS,
    Figures,
    Metric,
    Panel,
    Row,
    Share,
    Table,
)
from experiments.tables.sr_ste import DIGITS

SPARSITIES = {"2:4": 1 / 2, "1:4": 3 / 4, "1:8": 7 / 8, "1:16": 15 / 16}
# A tenth of training dense, the last quarter strictly N:M. In between masks fade to 0.7 % (exponential) or
# to 0 (linear); the paper's rates, 1e-4 and 8e-4 a step, are for a hundred times as many steps.
DECAY = {"begin": Share(0.1), "end": Share(0.75)}
LOSS = "test_loss"
LM_STEPS = 500


def methods(steps: int) -> dict[str, dict]:
    """By series, the method for a training of so many steps."""
    decaying = 0.65 * steps
    exponential = {"name": "mdgf", "decay": "exponential", "beta": round(5 / decaying, 6), **DECAY}
    return {
        "STE": {"name": "ste"},
        "SR-STE": {"name": "sr_ste", "decay": 2e-3},
        "MdGF exp.": exponential,
        "MdGF exp., STE gradient": {**exponential, "grad": "ste"},
        "MdGF linear": {"name": "mdgf", "decay": "linear", "beta": round(1 / decaying, 6), **DECAY},
        "SdGF stepwise": {"name": "sdgf", "decay": "stepwise", **DECAY},
        "SdGF geometric": {"name": "sdgf", "decay": "geometric", **DECAY},
    }


def rows(prefix: str, steps: int, sites: dict, patterns: dict[str, tuple[str, ...]]) -> tuple[Row, ...]:
    """Dense, and by series its patterns."""
    return (Row(f"{prefix}dense", "dense", 0.0, {}),) + tuple(
        Row(
            f"{prefix}{series}, {pattern}", series, SPARSITIES[pattern],
            {"method": {**methods(steps)[series], "pattern": pattern, **sites}},
            quick=pattern == "1:8" and not prefix,
        )
        for series, chosen in patterns.items() for pattern in chosen
    )  # fmt: skip


DIGITS_PATTERNS = ("2:4", "1:4", "1:8", "1:16")
DIGITS_ROWS = rows(
    "", 1000, {"exclude": ("head/*",)},
    {
        "STE": DIGITS_PATTERNS, "SR-STE": DIGITS_PATTERNS, "MdGF exp.": DIGITS_PATTERNS,
        "MdGF exp., STE gradient": ("1:8", "1:16"), "MdGF linear": DIGITS_PATTERNS,
        "SdGF stepwise": DIGITS_PATTERNS, "SdGF geometric": ("2:4", "1:4", "1:8"),
    },
)  # fmt: skip
LM_PATTERNS = ("2:4", "1:8", "1:16")
LM_ROWS = rows(
    "LM ", LM_STEPS, {"include": ("*mlp/*kernel",)},
    {
        "STE": LM_PATTERNS, "SR-STE": LM_PATTERNS, "MdGF exp.": LM_PATTERNS,
        "MdGF linear": ("1:16",), "SdGF stepwise": ("1:8", "1:16"), "SdGF geometric": ("1:8",),
    },
)  # fmt: skip
LM = {
    "data": {"name": "stdlib", "length": 64, "size": 1_000_000},
    "model": {"name": "transformer", "depth": 2, "width": 64, "heads": 4},
    "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 20},
    "batch_size": 16,
    "steps": LM_STEPS,
}


def better(a: str, b: str, pattern: str, prefix: str = "", **kwargs):
    """Whether a method has the higher accuracy (digits) or the lower loss (LM) than another."""
    first, second = f"{prefix}{a}, {pattern}", f"{prefix}{b}, {pattern}"
    return greater(second, first, LOSS, **kwargs) if prefix else greater(first, second, **kwargs)


def gain(pattern: str, prefix: str = ""):
    """What exponential mask decay gains over SR-STE."""
    decay, srste = (f"{prefix}{series}, {pattern}" for series in ("MdGF exp.", "SR-STE"))
    return gap(srste, decay) if prefix else gap(decay, srste)


CLAIMS = (
    Claim("digits: exponential mask decay is more accurate than SR-STE at 1:16",
          better("MdGF exp.", "SR-STE", "1:16")),
    Claim("digits: exponential mask decay falls behind SR-STE by less than 0.5 points at 2:4",
          better("MdGF exp.", "SR-STE", "2:4", by=-0.005)),
    Claim("digits: mask decay gains more over SR-STE at 1:16 than at 2:4",
          greater(gain("1:16"), gain("2:4"))),
    Claim("digits: exponential is more accurate than linear mask decay at 1:8 and 1:16",
          all_of(*(better("MdGF exp.", "MdGF linear", pattern) for pattern in ("1:8", "1:16")))),
    Claim("digits: stepwise is more accurate than geometric structure decay at 1:8",
          better("SdGF stepwise", "SdGF geometric", "1:8")),
    Claim("LM: exponential mask decay has a lower loss than SR-STE at 1:8 and 1:16",
          all_of(*(better("MdGF exp.", "SR-STE", pattern, "LM ") for pattern in ("1:8", "1:16")))),
    Claim("LM: exponential mask decay is at most 0.02 nats above SR-STE at 2:4",
          better("MdGF exp.", "SR-STE", "2:4", "LM ", by=-0.02)),
    Claim("LM: mask decay gains more over SR-STE at 1:16 than at 2:4",
          greater(gain("1:16", "LM "), gain("2:4", "LM "), LOSS)),
    Claim("LM: exponential mask decay has a lower loss than stepwise structure decay at 1:16",
          better("MdGF exp.", "SdGF stepwise", "1:16", "LM ")),
)  # fmt: skip
TABLE = Table(
    title="Progressive gradient flow: mask and structure decay",
    papers=(
        "A. R. Bambhaniya, A. Yazdanbakhsh, S. Subramanian et al.: Progressive gradient flow for robust N:M "
        "sparsity training in transformers, 2024",
    ),
    about="Digits: an MLP 64-64-64-10 whose hidden kernels are N:M, 1000 steps of Adam. LM: bytes of "
    "Python's standard library, a transformer of two blocks of width 64 whose feed-forward kernels "
    "are N:M, 500 steps of Adam on 16 windows of 64 bytes; its loss is in nats per byte. Training is "
    "dense for a tenth and strictly N:M in the last quarter. Mask decay computes with all weights "
    "before that, so at equal steps it costs more training FLOPs than STE and SR-STE; the paper "
    "compares at equal FLOPs, too. SR-STE has decay 2e-3. Geometric structure decay starts from "
    "groups of 8 M, which does not fit 64 inputs at 1:16.",
    base=DIGITS,
    panels=(
        Panel("Digits, MLP", DIGITS_ROWS, seeds=10),
        Panel(
            "Bytes of the standard library, transformer", LM_ROWS, seeds=3, overrides=LM,
            paper=(
                Figures(
                    "MdGF exp.", "points over SR-STE above 80 % sparsity, vision and language",
                    {7 / 8: "up to +2, +5"},
                ),
            ),
        ),
    ),
    claims=CLAIMS,
    metrics=(ACCURACY, Metric(LOSS, "test loss", 1, 3), TRAIN_FLOPS),
    quick={"steps": 60},
)  # fmt: skip
