"""STUN: experts first, then weights, against weights alone, on a mixture of experts; about 14 minutes on two
cores, most of them for training its decoders."""

from experiments import compression
from experiments.claims import Claim, all_of, greater
from experiments.compression import BITS, DAMAGE, QUICK, REACHED, SECONDS, STORED
from experiments.tables import Panel, Row, Table

TOTAL = (0.4, 0.5, 0.6)
EXPERTS = {"decoder.model.width": 64, "decoder.model.hidden": 96, "decoder.model.experts": 8}
WAYS = {
    "Wanda": {"method": "wanda", "options": {"scope": "layer"}},
    "STUN": {"method": "stun", "options": {"experts": 0.25}},
    "STUN, routers only": {
        "method": "stun",
        "options": {"experts": 0.25, "coactivation": 0.0, "router": 1.0},
    },
}


def label(series: str, sparsity: float) -> str:
    """The name of a row."""
    return f"{series}, {100 * sparsity:g} %"


def rows() -> tuple[Row, ...]:
    """Weights alone, and a quarter of the experts before."""
    return (Row("dense", "dense", TOTAL[0], {"method": "dense", "sparsity": None}, quick=True),) + tuple(
        Row(label(series, x), series, x, {**way, "sparsity": x}, quick=x == 0.5)
        for x in TOTAL
        for series, way in WAYS.items()
    )


TABLE = Table(
    title="STUN: structured, then unstructured pruning of a mixture of experts",
    papers=("J. Lee et al.: STUN: structured-then-unstructured pruning for scalable MoE pruning, ACL 2025",),
    about=compression.ABOUT + "Here its blocks have width 64 and eight experts of 96 channels, of which a token goes through two. "
    "Sparsity is the share of the blocks' weights that is gone or zero; STUN first removes a quarter of the experts.",
    base=compression.base(),
    panels=(Panel("Eight experts", rows(), seeds=3, overrides=EXPERTS),),
    claims=(
        Claim("STUN has a lower loss than Wanda alone at 50 %",
              greater(label("Wanda", 0.5), label("STUN", 0.5), BITS.name)),
        Claim("the same at 60 %", greater(label("Wanda", 0.6), label("STUN", 0.6), BITS.name)),
        Claim("STUN with clusters of similar routers has a lower loss than Wanda alone at 50 and 60 %",
              all_of(*(greater(label("Wanda", x), label("STUN, routers only", x), BITS.name) for x in (0.5, 0.6)))),
        Claim("Co-activation finds better experts than routers alone, at 50 %",
              greater(label("STUN, routers only", 0.5), label("STUN", 0.5), BITS.name)),
    ),
    metrics=(BITS, DAMAGE, REACHED, STORED, SECONDS),
    quick={**QUICK, "decoder.model.experts": 4, "decoder.model.hidden": 32},
    quick_seeds=1,
    function=compression.run,
)  # fmt: skip
