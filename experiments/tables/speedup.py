"""What sparsity pays on a CPU: packed products against dense ones, by format; three minutes on two otherwise idle cores
(`--jobs=1`)."""

import ml_collections

from experiments import speedup
from experiments.claims import Claim, all_of, greater
from experiments.tables import Metric, Panel, Row, Table

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)
FORMATS = {
    "unstructured": {"pattern": "unstructured", "format": "csr"},
    "blocks of 32x32": {"pattern": "block:32x32", "format": "block:32x32"},
    "blocks of 128x128": {"pattern": "block:128x128", "format": "block:128x128"},
}
# N:M has the sparsities that N and M give.
NM = {0.5: "2:4", 0.75: "1:4", 0.96875: "1:32"}
PEERS = {"unstructured, scipy": "scipy", "unstructured, BCOO": "BCOO"}
BATCHES = (256, 1)
SPEEDUP, MEMORY, ERROR = "speedup", "memory", "max_error"


def label(series: str, sparsity: float, batch: int = BATCHES[0]) -> str:
    """The name of a row."""
    return f"{series}, {100 * sparsity:g} %, batch {batch}"


def rows(batch: int) -> tuple[Row, ...]:
    """Our formats over sparsity, and the peers where they have a chance."""
    found = []
    for series, overrides in FORMATS.items():
        found += [(series, sparsity, {**overrides, "sparsity": sparsity}) for sparsity in SPARSITIES]
    found += [("N:M", s, {"pattern": nm, "format": nm, "sparsity": None}) for s, nm in NM.items()]
    for series, engine in PEERS.items():
        peer = {**FORMATS["unstructured"], "engine": engine, "repeats": 5 if engine == "BCOO" else 15}
        found += [(series, sparsity, {**peer, "sparsity": sparsity}) for sparsity in (0.9, 0.95)]
    return tuple(
        Row(label(series, x, batch), series, x, {**overrides, "batch": batch}, quick=x in (0.5, 0.9))
        for series, x, overrides in found
    )


def faster(series: str, sparsity: float, than: float):
    """Whether a format is more than so many times faster than dense."""
    return greater(label(series, sparsity), than, SPEEDUP)


TABLE = Table(
    title="What sparsity pays on two CPU cores",
    papers=(
        "E. Elsen, M. Dukhan, T. Gale, K. Simonyan: Fast Sparse ConvNets, 2020",
        "H. Shen et al.: An Efficient Sparse Inference Software Accelerator for Transformer-based Language "
        "Models on CPUs, 2023",
    ),
    about="The product of a float32 input with a 2048x2048 weight, `sparsejax.matmul` against the dense product "
    "in XLA, measured alternately in one process, medians. The speed-up is dense time over packed time. Masks "
    "are by magnitude of normal weights; seeds are processes' own weights. Unstructured weights are in CSR, "
    "one row for each output, and multiplied by jaxlib's kernel; scipy multiplies with one thread and has the weight in the order it likes best; BCOO is "
    "`jax.experimental.sparse`. The papers' own figures are for int8 and other machines, and not comparable.",
    base=ml_collections.ConfigDict(
        {
            "seed": 0,
            "size": 2048,
            "batch": 256,
            "pattern": "unstructured",
            "sparsity": ml_collections.config_dict.placeholder(float),
            "format": "csr",
            "engine": "sparsejax",
            "repeats": 15,
        }
    ),
    panels=tuple(Panel(f"Batch of {batch}", rows(batch), seeds=3, reference="") for batch in BATCHES),
    claims=(
        Claim(
            "Blocks of 128x128 at 90 % are at least 5 times faster than dense",
            faster("blocks of 128x128", 0.9, 5),
        ),
        Claim(
            "Blocks of 32x32 at 90 % are at least 2 times faster than dense",
            faster("blocks of 32x32", 0.9, 2),
        ),
        Claim("Unstructured weights at 95 % are faster than dense", faster("unstructured", 0.95, 1)),
        Claim(
            "2:4 is no slower than 1.3 times dense, in about half of the memory",
            all_of(faster("N:M", 0.5, 1 / 1.3), greater(0.57, label("N:M", 0.5), MEMORY)),
        ),
        Claim(
            "Outputs are those of the dense product, to float32 rounding",
            all_of(*(greater(1e-5, label(series, 0.9), ERROR) for series in FORMATS)),
        ),
    ),
    metrics=(
        Metric(SPEEDUP, "times faster than dense", 1, 2),
        Metric("milliseconds", "milliseconds", 1, 2),
        Metric(MEMORY, "memory, of dense", 100, 1, "%"),
        Metric(ERROR, "largest error", 1, 8),
    ),
    quick={"size": 256, "repeats": 2},
    function=speedup.run,
)
