"""Layer-wise pruning of a trained decoder: magnitude, Wanda and SparseGPT, each with and without DSnoT;
three minutes on two cores once the decoders are trained, which the tables on compression share."""

from experiments import compression
from experiments.claims import Claim, all_of, gap, greater
from experiments.compression import BITS, DAMAGE, QUICK, REACHED, SECONDS
from experiments.tables import Figures, Panel, Row, Table

SPARSITIES = (0.5, 0.6, 0.7)
METHODS = ("magnitude", "wanda", "sparsegpt")
TITLES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
REFINED = {method: f"{title} + DSnoT" for method, title in TITLES.items()}
NM = "2:4"


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
        "L. Yin et al.: Outlier weighed layerwise sparsity (OWL), ICML 2024 (the figures of the first three)",
    ),
    about=compression.ABOUT
    + "The 28 kernels of its blocks are pruned block by block. Magnitude compares the weights of a "
    "layer, Wanda those of an output, SparseGPT those of 128 inputs. DSnoT swaps at most 1.25 % of the inputs of an "
    "output, as in the paper at its width.",
    base=compression.base(),
    panels=(
        Panel(
            "Unstructured",
            (
                Row("dense", "dense", 0.5, {"method": "dense", "sparsity": None}, quick=True),
                *rows(SPARSITIES),
            ),
            seeds=3,
            paper=(
                Figures("magnitude", "LLaMA-7B, WikiText-2, perplexity; OWL's table", {0.7: 48419}, BITS.name),
                Figures("Wanda", "the same", {0.7: 85.77}, BITS.name),
                Figures("SparseGPT", "the same", {0.7: 26.30}, BITS.name),
                Figures("Wanda + DSnoT", "LLaMA-7B, WikiText-2, perplexity; DSnoT's table, where Wanda has 88.84", {0.7: 62.05}, BITS.name),
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
    metrics=(BITS, DAMAGE, REACHED, SECONDS),
    quick=QUICK,
    function=compression.run,
)
