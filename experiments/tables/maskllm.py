"""Learned 2:4 masks on a frozen language model [Fang et al. 2024]; about 12 minutes on two cores."""

import ml_collections

from configs import stdlib_maskllm
from experiments.claims import Claim, gap, greater
from experiments.tables import ACCURACY, SPARSITY, Figures, Metric, Panel, Row, Table

LOSS = Metric("test_loss", "test loss", 1, 4, "nats per byte")
STEPS = (150, 300, 600)
# The network as it is, or under masks: a step that changes no weight.
STILL = {"steps": 1, "parameterization": {}, "optimizer": {"name": "sgd", "learning_rate": 0.0}}
BLOCKS = {"include": ("block_*kernel",)}
ONE_SHOT = {"name": "fixed", "score": "magnitude", "pattern": "2:4", "samples": 32, **BLOCKS}
PRIOR, RANDOM = "MaskLLM", "MaskLLM, random start"
LEARNED = stdlib_maskllm.get_config().parameterization.to_dict()


def label(series: str, steps: int) -> str:
    """The name of a row."""
    return f"{series}, {steps} steps"


def rows() -> tuple[Row, ...]:
    """The dense network and the one-shot mask at x = 1, and learned masks by steps of learning."""
    still = (
        Row("dense", "dense", 1, {**STILL, "method": {"name": "dense"}}, quick=True),
        Row("magnitude", "magnitude, one shot", 1, {**STILL, "method": ONE_SHOT}, quick=True),
    )
    return still + tuple(
        Row(
            label(series, steps), series, steps,
            {"steps": steps, "parameterization": {**LEARNED, "prior": prior}},
            quick=series == PRIOR and steps == STEPS[-1],
        )
        for series, prior in ((PRIOR, "magnitude"), (RANDOM, None)) for steps in STEPS
    )  # fmt: skip


BASE = stdlib_maskllm.get_config()
BASE.update({"log_every": 500, "eval_every": 0, "checkpoint_every": 0, "curves": False})
BEST = label(PRIOR, STEPS[-1])
TABLE = Table(
    title="MaskLLM: learned 2:4 masks on a frozen language model",
    papers=("G. Fang et al.: MaskLLM: Learnable semi-structured sparsity for LLMs, NeurIPS 2024",),
    about="A byte-level decoder (two blocks of width 64), pretrained for 1500 steps on the sources of "
    "Python's standard library and then frozen; the 12 kernels of its blocks become 2:4, embeddings and "
    "head stay dense. The one-shot mask is by magnitude, without training; learned masks start from it "
    "or from random logits and see the training data for as many steps as x says, at batch size 32 and "
    "four times the learning rate of the paper. The paper trains 2000 steps of 1M tokens and starts "
    "from SparseGPT's mask.",
    base=ml_collections.ConfigDict(BASE),
    panels=(
        Panel(
            "Byte-level language model", rows(), seeds=3, x_title="steps of mask learning", x_scale="log",
            paper=(
                Figures("dense", "LLaMA-2 7B, Wikitext-2, perplexity", {1: 5.12}, LOSS.name),
                Figures("magnitude, one shot", "the same, SparseGPT", {1: 10.42}, LOSS.name),
                Figures(PRIOR, "the same, after 2000 steps", {STEPS[-1]: 6.72}, LOSS.name),
            ),
        ),
    ),
    claims=(
        Claim("learned masks have a lower loss than the one-shot mask they start from",
              greater("magnitude", BEST, LOSS.name)),
        Claim("they close more than half of the gap between the one-shot mask and the dense network",
              greater(gap("magnitude", BEST), gap(BEST, "dense"), LOSS.name)),
        Claim(f"after {STEPS[-1]} steps a start from the one-shot mask beats a random one",
              greater(label(RANDOM, STEPS[-1]), BEST, LOSS.name)),
        Claim(f"and after {STEPS[0]} steps its lead is larger",
              greater(gap(label(RANDOM, STEPS[0]), label(PRIOR, STEPS[0])),
                      gap(label(RANDOM, STEPS[-1]), BEST), LOSS.name)),
    ),
    metrics=(LOSS, ACCURACY, SPARSITY),
    quick={"pretrained.steps": 60, "steps": 30, "data.size": 100_000, "model.depth": 1, "model.width": 32},
    quick_seeds=1,
)  # fmt: skip
