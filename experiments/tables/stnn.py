"""Structured Hankel networks on two dynamical systems [Aluvihare et al. 2025]; about 3 minutes."""

import ml_collections

from experiments.claims import Claim, all_of, gap, greater
from experiments.tables import Figures, Metric, Panel, Row, Table

ERROR = Metric("test_loss", "test error x 10^4", 1e4, 2)
PARAMETERS = Metric("params", "parameters", 1, 0)

BASE = ml_collections.ConfigDict(
    {
        "seed": 0,
        "data": {"name": "lotka_volterra", "window": 16},
        "model": {"name": "mlp", "hidden": (128, 128)},
        "optimizer": {"name": "adam", "learning_rate": 3e-3, "schedule": "cosine"},
        "method": {"name": "dense"},
        "batch_size": 128,
        "steps": 2000,
        "log_every": 1000,
        "eval_every": 0,
        "checkpoint_every": 0,
        "curves": False,
    }
)
# Widths at which each kind of network stays below a quarter of the dense one's parameters, per system.
SYSTEMS = {
    "Lotka-Volterra": {"data": "lotka_volterra", "narrow": 51, "rank": 9},
    "Lorenz": {"data": "lorenz", "narrow": 48, "rank": 10},
}


def networks(system: str) -> dict[str, dict]:
    """The networks by series: overrides of the model."""
    sizes = SYSTEMS[system]
    found = {
        "dense": {},
        "narrow dense": {"model.hidden": (sizes["narrow"],) * 2},
        "low rank": {"model.linear": {"name": "low_rank", "rank": sizes["rank"]}},
        "circulant blocks": {"model.hidden": (224, 224), "model.linear": {"name": "circulant", "block": 16}},
        "Hankel blocks": {"model.hidden": (160, 160), "model.linear": {"name": "hankel", "block": 16}},
        "Hankel": {"model.hidden": (256, 256), "model.linear": {"name": "hankel"}},
        "StNN": {"model.hidden": (256, 256), "model.linear": {"name": "stnn"}},
    }
    if system == "Lotka-Volterra":  # whose 32 inputs are a power of two
        found["butterfly"] = {"model.linear": {"name": "butterfly"}}
    return found


def label(system: str, series: str) -> str:
    """The name of a row."""
    return f"{series}, {system}"


def panel(system: str) -> Panel:
    """All networks on one system."""
    data = {"data": {"name": SYSTEMS[system]["data"], "window": 16}}
    rows = tuple(
        Row(
            label(system, series), series, 1.0 if series == "dense" else 0.25, overrides,
            quick=system == "Lorenz" and series in ("dense", "Hankel blocks", "StNN"),
        )
        for series, overrides in networks(system).items()
    )  # fmt: skip
    paper = (
        Figures("StNN", "both systems", {0.25: "fewer parameters and operations, no figure in the abstract"}),
    )
    return Panel(system, rows, seeds=5, overrides=data, x_title="parameters allowed / dense", paper=paper)


def on_both(check):
    """A check on either system."""
    return all_of(*(check(system) for system in SYSTEMS))


def twice(series: str):
    """Whether the error of a kind of network is below twice that of the dense one, on both systems."""

    def check(system):
        dense, other = label(system, "dense"), label(system, series)
        return greater(dense, gap(other, dense), ERROR.name)

    return on_both(check)


def better(a: str, b: str):
    """Whether the error of `a` is below that of `b`, on both systems."""
    return on_both(lambda system: greater(label(system, b), label(system, a), ERROR.name))


TABLE = Table(
    title="Structured networks for dynamical systems: Hankel layers with a quarter of the parameters",
    papers=(
        "H. Aluvihare, L. Lingsch, X. Li, S. M. Perera: A Low-complexity Structured Neural Network to Realize States "
        "of Dynamical Systems, 2025",
    ),
    about="The next state of Lotka-Volterra (time step 0.1) and Lorenz (0.05) from 16 delayed ones: 30 trajectories for "
    "training, 10 others for testing, mean squared error in units of the target's variance. MLPs with two hidden "
    "layers: 128 wide if dense, low-rank or of butterflies, 224 for circulant and 160 for Hankel blocks of side 16, "
    "256 for whole Hankel matrices (StNN trains them as diagonals between Fourier transforms). All but the dense one "
    "have less than a quarter of its parameters, narrow and low-rank ones as many as those of blocks. 2000 steps of "
    "Adam at batch size 128. For comparison, least squares on all cubic polynomials of the newest state (the kind "
    "of library SINDy selects from) has errors of 0.019 x 10^-4 and 0.32 x 10^-4: these systems are polynomial.",
    base=BASE,
    panels=tuple(panel(system) for system in SYSTEMS),
    claims=(
        Claim("Networks of Hankel blocks have less than twice the error of the dense one", twice("Hankel blocks")),
        Claim("Networks of whole Hankel matrices (StNN) have less than twice the error of the dense one", twice("StNN")),
        Claim("Hankel blocks have a smaller error than low-rank layers of as many parameters",
              better("Hankel blocks", "low rank")),
        Claim("Hankel blocks have a smaller error than a narrow dense network of as many parameters",
              better("Hankel blocks", "narrow dense")),
    ),
    metrics=(ERROR, PARAMETERS),
    quick={"steps": 60},
)  # fmt: skip
