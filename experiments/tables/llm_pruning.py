"""Layer-wise pruning of a trained decoder: magnitude, Wanda and SparseGPT, each with and without DSnoT; MINUTES."""

import ml_collections

from configs import stdlib_decoder
from experiments import compression
from experiments.claims import Claim, all_of, gap, greater
from experiments.tables import SPARSITY, Figures, Metric, Panel, Row, Table

BITS = Metric("bits_per_byte", "held-out loss", 1, 3, "bits per byte")
DAMAGE = Metric("damage", "loss above the dense model's", 1, 3, "bits per byte")
SECONDS = Metric("seconds", "compression", 1, 1, "s")
SPARSITIES = (0.5, 0.6, 0.7)
METHODS = ("magnitude", "wanda", "sparsegpt")
TITLES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
REFINED = {method: f"{title} + DSnoT" for method, title in TITLES.items()}
NM = "2:4"


def base() -> ml_collections.ConfigDict:
    """The decoder of `configs/stdlib_decoder.py` at half its width, and 128 calibration windows of its training text."""
    decoder = stdlib_decoder.get_config()
    decoder.model.width, decoder.model.hidden = 128, 352
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "decoder": decoder.to_dict(),
            "method": "dense",
            "options": {},
            "sparsity": ml_collections.config_dict.placeholder(float),
            "pattern": "unstructured",
            "allocation": "uniform",
            "calibration": {"corpus": "stdlib", "samples": 128, "length": 128},
            "evaluation": {"corpus": "stdlib", "windows": 256},
            "repeats": 0,
        }
    )


QUICK = {
    "decoder.steps": 30,
    "decoder.model.depth": 1,
    "decoder.model.width": 32,
    "decoder.model.hidden": 64,
    "decoder.data.size": 100_000,
    "calibration.samples": 8,
    "evaluation.windows": 8,
}


def label(series: str, pattern: str | float) -> str:
    """The name of a row: a sparsity, or N:M."""
    return f"{series}, {pattern if isinstance(pattern, str) else f'{100 * pattern:g} %'}"


def rows(patterns) -> tuple[Row, ...]:
    """Every method with and without refinement."""
    found = []
    for pattern in patterns:
        budget = {"pattern": pattern} if isinstance(pattern, str) else {"sparsity": pattern}
        x = 0.5 if isinstance(pattern, str) else pattern
        for method in METHODS:
            plain = {"method": method, **budget}
            refined = {"method": "dsnot", "options": {"initial": method}, **budget}
            quick = pattern == 0.5
            found.append(Row(label(TITLES[method], pattern), TITLES[method], x, plain, quick))
            found.append(Row(label(REFINED[method], pattern), REFINED[method], x, refined, quick))
    return tuple(found)


def better(first: str, second: str, pattern):
    """Whether the first method has the lower loss."""
    return greater(label(second, pattern), label(first, pattern), BITS.name)


EVERY = (*SPARSITIES, NM)
TABLE = Table(
    title="Layer-wise pruning of a trained language model",
    papers=(
        "M. Sun et al.: A simple and effective pruning approach for large language models (Wanda), ICLR 2024",
        "E. Frantar, D. Alistarh: SparseGPT, ICML 2023",
        "Y. Zhang et al.: Dynamic sparse no training (DSnoT), ICLR 2024",
    ),
    about="A byte-level decoder of the Llama family (four blocks of width 128) is trained for 600 steps on the sources of "
    "Python's standard library; the 28 kernels of its blocks are pruned block by block with 128 windows of 128 bytes of "
    "training text, embeddings and head stay dense. Seeds are trainings. The loss is that of 256 windows of files that "
    "were not trained on. Magnitude compares the weights of a layer, Wanda those of an output, SparseGPT those of 128 "
    "inputs. DSnoT swaps at most 1.25 % of the inputs of an output, as in the paper at its width.",
    base=base(),
    panels=(
        Panel(
            "Unstructured",
            (
                Row("dense", "dense", 0.5, {"method": "dense", "sparsity": None}, quick=True),
                *rows(SPARSITIES),
            ),
            seeds=3,
            paper=(
                Figures("magnitude", "LLaMA-7B, WikiText-2, perplexity", {0.7: 48419}, BITS.name),
                Figures("Wanda", "the same", {0.7: 85.77}, BITS.name),
                Figures("SparseGPT", "the same", {0.7: 26.30}, BITS.name),
                Figures("Wanda + DSnoT", "the same", {0.7: 62.05}, BITS.name),
            ),
        ),
        Panel(NM, rows((NM,)), seeds=3, reference=""),
    ),
    claims=(
        Claim(
            "Wanda has a lower loss than magnitude at every sparsity and 2:4",
            all_of(*(better("Wanda", "magnitude", pattern) for pattern in EVERY)),
        ),
        Claim(
            "SparseGPT has a lower loss than Wanda at every sparsity and 2:4",
            all_of(*(better("SparseGPT", "Wanda", pattern) for pattern in EVERY)),
        ),
        Claim(
            "SparseGPT's lead over Wanda is larger at 70 % than at 50 %",
            greater(
                gap(label("Wanda", 0.7), label("SparseGPT", 0.7)),
                gap(label("Wanda", 0.5), label("SparseGPT", 0.5)),
                BITS.name,
            ),
        ),
        Claim("DSnoT lowers Wanda's loss at 70 %", better("Wanda + DSnoT", "Wanda", 0.7)),
    ),
    metrics=(BITS, DAMAGE, SPARSITY, SECONDS),
    quick=QUICK,
    function=compression.run,
)
