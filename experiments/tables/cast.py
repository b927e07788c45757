"""CAST and AST from a pretrained network at equal steps [Huang et al. 2025]; about 12 minutes on two cores."""

import itertools

import ml_collections

from experiments.claims import Claim, all_of, greater, within
from experiments.tables import ACCURACY, TRAIN_FLOPS, Figures, Metric, Panel, Row, Share, Table

PATTERNS = {"1:16": 15 / 16, "1:8": 7 / 8}
LOSS = Metric("test_loss", "test loss", 1, 4, "nats")
CUT = Metric("prune_error", "norm removed by the cut / norm of the weights", 1, 4)
SAD = Metric("sad", "mask entries flipped (SAD)", 1, 0)
CAST_KD = {"distill": 1 / 3, "temperature": 1.0}
AST_KD = {"distill": 2 / 3, "temperature": 2.0}

DIGITS = ml_collections.ConfigDict(
    {
        "seed": 0,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "hidden": (64, 64)},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "method": {"name": "dense"},
        "pretrained": {"steps": 500},
        "batch_size": 64,
        "steps": 500,
        "log_every": 500,
        "eval_every": 0,
        "checkpoint_every": 0,
        "curves": False,
    }
)
LANGUAGE = {
    "data": {"name": "stdlib", "length": 64, "size": 500_000},
    "model": {"name": "transformer", "width": 64, "depth": 2, "heads": 2, "max_length": 64},
    "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 20},
    "pretrained": {"steps": 700},
    "batch_size": 16,
    "eval_batch_size": 100,
    "steps": 300,
}


class Setting:
    """The rows of one network at one pattern; labels are `NAME SERIES, PATTERN`.

    Args:
      name: of the network.
      pattern: N:M of the sparsified kernels.
      leaves: which ones, as rules on the model's own paths.
      x: the pattern's sparsity.
    """

    def __init__(self, name: str, pattern: str, leaves: dict, x: float):
        self.name, self.pattern, self.leaves, self.x = name, pattern, leaves, x

    def label(self, series: str) -> str:
        """The name of a row."""
        return f"{self.name} {series}, {self.pattern}"

    def row(self, series: str, method: dict, *, scale=False, branch=False, distill=None, quick=False) -> Row:
        """A row; with `scale` its weights are scaled (CAST), with `branch` boosted (SLoRB)."""
        # a parameterization keeps the model's parameters under `params/`
        sites = {kind: tuple(f"*{rule}" for rule in rules) for kind, rules in self.leaves.items()}
        overrides = {"method": {**method, "pattern": self.pattern, **sites}}
        if scale:
            overrides["parameterization"] = {"name": "weight_scaling", "groups": 2, **self.leaves}
        if branch:
            overrides["parameterization"] = {"name": "slorb", "pattern": self.pattern, **self.leaves}
        if distill:
            overrides["objective"] = distill
        return Row(self.label(series), series, self.x, overrides, quick=quick)


def adams(strength: float, **options) -> dict:
    """AdamS of a strength; with `prune=False` it is judged before its cut."""
    return {"name": "adams", "strength": strength, **options}


def ast(strength: float) -> dict:
    """AST of a strength."""
    return {"name": "ast", "strength": strength}


ONE_SHOT = {"name": "one_shot", "at": 0}
# The last ones, and the decays, are the best of a search on other seeds, see `about`.
STRENGTHS, LM_STRENGTHS = (1e-3, 1e-2, 1e-1), (1e-3, 3e-3)
DECAYS = {"digits": {"SR-STE": 1e-3, "AST": 3e-3}, "LM": {"SR-STE": 1e-3, "AST": 1e-1}}


def main_rows(at: Setting, strength: float, quick: bool) -> list[Row]:
    """One-shot, SR-STE, AdamS, CAST and AST at one setting."""
    decay = DECAYS[at.name]
    return [
        at.row("one-shot", ONE_SHOT, quick=quick),
        at.row("one-shot, distilled", ONE_SHOT, distill=AST_KD),
        at.row("SR-STE", {"name": "sr_ste", "decay": decay["SR-STE"]}),
        at.row(f"AdamS {strength:g}", adams(strength), quick=quick),
        at.row("CAST", adams(strength), scale=True, distill=CAST_KD, quick=quick),
        at.row("AST", ast(decay["AST"]), distill=AST_KD, quick=quick),
        at.row("AST boosted", ast(decay["AST"]), distill=AST_KD, branch=True, quick=quick),
    ]


def other_rows(at: Setting, strengths: tuple[float, ...]) -> list[Row]:
    """AdamS before the cut at each strength, and CAST and AST without one of their parts."""
    strength = strengths[-1]
    return [
        *(at.row(f"AdamS {value:g}", adams(value)) for value in strengths[:-1]),
        *(at.row(f"AdamS {value:g}, before the cut", adams(value, prune=False)) for value in strengths),
        at.row("CAST without ramp", adams(strength, ramp=0.0), scale=True, distill=CAST_KD),
        at.row("CAST without scaling", adams(strength), distill=CAST_KD),
        at.row("CAST without distillation", adams(strength), scale=True),
        at.row("AST without decay", ast(0.0), distill=AST_KD),
        at.row("AST without distillation", ast(DECAYS[at.name]["AST"])),
    ]


DIGITS_AT = {
    pattern: Setting("digits", pattern, {"exclude": ("head/*",)}, x) for pattern, x in PATTERNS.items()
}
LM_AT = Setting("LM", "2:4", {"include": ("block_*kernel",)}, 0.5)
HIGH = DIGITS_AT["1:16"]


def digits_rows() -> tuple[Row, ...]:
    """The main rows of digits."""
    rows = [Row("digits dense", "dense", 0.0, {}, quick=True)]
    for at in DIGITS_AT.values():
        rows += main_rows(at, STRENGTHS[-1], quick=at is HIGH)
    return tuple(rows)


def language_rows() -> tuple[Row, ...]:
    """All rows of the language model."""
    gradual = {"name": "gradual", "begin": 0, "end": Share(0.5), "update_every": 10}
    rows = [Row("LM dense", "dense", 0.0, {}), *main_rows(LM_AT, LM_STRENGTHS[-1], quick=False)]
    return (
        *rows,
        LM_AT.row("gradual, distilled", gradual, distill=AST_KD),
        *other_rows(LM_AT, LM_STRENGTHS),
    )


def better(at: Setting, a: str, b: str, **kwargs):
    """Whether a row is more accurate than another at a setting; of the language model, has the lower loss."""
    a, b = at.label(a), at.label(b)
    return greater(b, a, LOSS.name, **kwargs) if at is LM_AT else greater(a, b, **kwargs)


def gap(strength: float) -> tuple[str, str]:
    """The labels of AdamS before and after its cut on digits at 1:16."""
    return HIGH.label(f"AdamS {strength:g}, before the cut"), HIGH.label(f"AdamS {strength:g}")


def method_claims(at: Setting, strength: float) -> tuple[Claim, ...]:
    """What the papers claim of the methods, at one setting."""
    where = f"{at.name}, {at.pattern}"
    series = f"AdamS {strength:g}"
    checks = {
        "AdamS beats one-shot pruning with fine-tuning": better(at, series, "one-shot"),
        "CAST beats one-shot pruning with fine-tuning": better(at, "CAST", "one-shot"),
        "CAST beats SR-STE": better(at, "CAST", "SR-STE"),
        "AST beats one-shot pruning with the same distillation": better(at, "AST", "one-shot, distilled"),
        "SLoRB improves AST": better(at, "AST boosted", "AST"),
    }
    return tuple(Claim(f"{where}: {text}", check) for text, check in checks.items())


def ablation_claims(at: Setting) -> tuple[Claim, ...]:
    """That every part of CAST and AST helps."""
    where = f"{at.name}, {at.pattern}"
    parts = [("CAST", part) for part in ("ramp", "scaling", "distillation")]
    parts += [("AST", part) for part in ("decay", "distillation")]
    claims = tuple(
        Claim(f"{where}: the {part} improves {method}", better(at, method, f"{method} without {part}"))
        for method, part in parts
    )
    fewer = greater(at.label("AST without decay"), at.label("AST"), SAD.name)
    return (*claims, Claim(f"{where}: the decay of AST flips fewer masks", fewer))


GPT2 = "perplexity of GPT-2 124M, Wikitext (29.95 dense)"
TABLE = Table(
    title="CAST and AST: retraining a pretrained network to N:M",
    papers=(
        "W. Huang, Y. Hu, J. Zhu, J. Chen: CAST: semi-structured sparsity-aware training for LLMs, 2025",
        "W. Huang, Y. Hu, G. Jian, J. Zhu, J. Chen: Semi-structural adaptive sparse training (AST), AAAI 2025",
    ),
    about="All rows start from the same dense network of their seed and train for as many steps again. Digits (60 % "
    "for training): an MLP 64-64-64-10 whose hidden kernels are N:M, 500 + 500 steps of Adam at 2e-3 with a cosine. "
    "LM: a transformer of two blocks of width 64 on the bytes of Python's standard library, whose blocks' "
    "kernels are 2:4, 700 + 300 steps. One-shot prunes by magnitude and fine-tunes under fixed masks. AdamS "
    "trains dense and is pruned by its last step; 'before the cut' is the same run without it. CAST is AdamS "
    "with scaled weights and distillation from the pretrained network (weight 1/3, T = 1); AST distils "
    "with weight 2/3 at T = 2, and boosted adds the block-mean branch (1/16 of the weights more). "
    "Numbers after AdamS are its lambda, and CAST's is the largest; the decays of SR-STE and AST are 1e-3 and 3e-3 on "
    "digits, 1e-3 and 0.1 on the LM. All are the best of a search on four other seeds (LM: two): AdamS and CAST over "
    "1e-3 to 0.1 (LM: 3e-4 to 3e-3), the decays over 1e-4 to 0.1 (LM: 1e-3 to 0.1, where they hardly matter). The "
    "papers' are 4e-7 (CAST, LLaMA2-7B) and 1e-4 (AST, GPT-2).",
    base=DIGITS,
    panels=(
        Panel("Digits", digits_rows(), seeds=10),
        Panel("Digits, 1:16: strengths and parts", tuple(other_rows(HIGH, STRENGTHS)), seeds=10),
        Panel(
            "Language model, 2:4", language_rows(), seeds=3, overrides=LANGUAGE,
            paper=(
                Figures("AST", GPT2, {0.5: 32.23}, LOSS.name),
                Figures("AST boosted", GPT2, {0.5: 31.13}, LOSS.name),
                Figures("CAST", "perplexity of LLaMA2-7B, Wikitext", {0.5: "5.58 (+0.09 on dense)"}, LOSS.name),
            ),
        ),
    ),
    claims=(
        *(claim for at in DIGITS_AT.values() for claim in method_claims(at, STRENGTHS[-1])),
        *method_claims(LM_AT, LM_STRENGTHS[-1]),
        Claim("LM, 2:4: AST beats gradual pruning with the same distillation",
              better(LM_AT, "AST", "gradual, distilled")),
        Claim("LM, 2:4: CAST reaches the dense network trained as long, to within 0.02 nats",
              greater("LM dense", LM_AT.label("CAST"), LOSS.name, by=-0.02)),
        Claim("digits, 1:16: the cut costs AdamS less than 0.5 points if lambda is large (0.1)",
              within(*gap(1e-1), 0.005)),
        Claim("digits, 1:16: it costs more than 20 points if lambda is small (1e-3)",
              greater(*gap(1e-3), by=0.2)),
        Claim("digits, 1:16: before the cut the smaller lambda is the more accurate",
              all_of(*(greater(gap(a)[0], gap(b)[0]) for a, b in itertools.pairwise(STRENGTHS)))),
        *ablation_claims(HIGH),
        *ablation_claims(LM_AT),
    ),
    metrics=(ACCURACY, LOSS, CUT, SAD, TRAIN_FLOPS),
    quick={"steps": 40, "pretrained.steps": 40},
)  # fmt: skip
