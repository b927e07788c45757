"""DSFormer against truncated SVD at equal storage, before and after fine-tuning [Chand et al. 2023]; 8 minutes."""

from experiments.claims import Claim, all_of, greater
from experiments.tables import ACCURACY, FASHION_MNIST, QUICK, Figures, Metric, Panel, Row, Table, override

MODEL = {"name": "mlp", "hidden": (256, 256)}
HEAD = ("head/*",)
TRAINED = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "schedule": "cosine"}
SETTING = {
    "model": MODEL,
    "optimizer": {**TRAINED, "learning_rate": 0.01},
    "pretrained": {"model": MODEL, "optimizer": TRAINED, "steps": FASHION_MNIST.steps},
}
# The budgets are what 3:16 and 6:16 codes over dictionaries of 16 rows store: 27.3 % and 46.9 %, positions
# included. The ranks of the others are the largest that fit.
BUDGETS = {0.28: "3:16", 0.47: "6:16"}
SVD, ONE, BLOCKS = "truncated SVD", "one dictionary, 2:4", "dictionaries of 16 rows"
LOSS = Metric("test_loss", "test loss", 1, 4)


def factors(series: str, budget: float) -> dict:
    """What the factorisation of a series is, at a budget."""
    pattern, block = {SVD: ("1:1", None), ONE: ("2:4", None), BLOCKS: (BUDGETS[budget], 16)}[series]
    return {"budget": budget, "pattern": pattern, "block": block}


def factorised(series: str, budget: float) -> dict:
    """Overrides: the trained network with its hidden layers factorised, and D and the nonzeros of S trained."""
    spec = factors(series, budget)
    codes = {
        "name": "fixed",
        "score": "magnitude",
        "pattern": spec["pattern"],
        "include": ("*sparse_kernel",),
    }
    method = {"name": "dense"} if series == SVD else codes
    return {"model.linear": {"name": "dense_sparse", **spec}, "method": method}


def straight_through(series: str, budget: float) -> dict:
    """Overrides: the trained weights are trained on, through their factorisation."""
    return {"parameterization": {"name": "dsformer", "exclude": HEAD, **factors(series, budget)}}


def label(series: str, budget: float, how: str) -> str:
    """The name of a row."""
    return f"{series}, {how}, {100 * budget:g} %"


BEFORE, AFTER, STF = "as factorised", "fine-tuned", "STF"


def before() -> tuple[Row, ...]:
    """Every factorisation as it is: one step of no size."""
    untouched = {"steps": 1, "optimizer.learning_rate": 0.0}
    return tuple(
        Row(label(series, budget, BEFORE), series, budget, {**factorised(series, budget), **untouched}, quick=budget < 0.3)
        for series in (SVD, ONE, BLOCKS) for budget in BUDGETS
    )  # fmt: skip


def after() -> tuple[Row, ...]:
    """The dense network trained on, and every factorisation fine-tuned or trained through."""
    found = [Row("dense", "dense", 1.0, {})]
    for budget in BUDGETS:
        for series in (SVD, ONE, BLOCKS):
            found.append(
                Row(label(series, budget, AFTER), f"{series}, {AFTER}", budget, factorised(series, budget))
            )
        for series in (ONE, BLOCKS):
            row = label(series, budget, STF), f"{series}, {STF}", budget, straight_through(series, budget)
            found.append(Row(*row, quick=budget < 0.3 and series == BLOCKS))
    return tuple(found)


def beats(a, b, **kwargs):
    """Whether one kind of row is more accurate than another at both budgets; a kind is (series, how)."""
    return all_of(*(greater(label(a[0], x, a[1]), label(b[0], x, b[1]), **kwargs) for x in BUDGETS))


def claims() -> tuple[Claim, ...]:
    """What the paper says, with one dictionary per weight and with one per 16 rows."""
    found = []
    for series in (ONE, BLOCKS):
        found += [
            Claim(f"As factorised, {series}: more accurate than truncated SVD", beats((series, BEFORE), (SVD, BEFORE))),
            Claim(f"After fine-tuning, {series}: more accurate than truncated SVD", beats((series, AFTER), (SVD, AFTER))),
            Claim(f"{series}: STF is more accurate than factorising first and fine-tuning",
                  beats((series, STF), (series, AFTER))),
        ]  # fmt: skip
    smallest, largest = min(BUDGETS), max(BUDGETS)
    found.append(
        Claim(f"{BLOCKS} with STF at {100 * smallest:g} % is more accurate than a fine-tuned SVD at {100 * largest:g} %",
              greater(label(BLOCKS, smallest, STF), label(SVD, largest, AFTER)))
    )  # fmt: skip
    return tuple(found)


AXIS = {"x_title": "stored / dense"}
TABLE = Table(
    title="DSFormer: dictionaries and N:M codes against low rank, and the straight-through factoriser",
    papers=(
        "R. Chand, Y. Prabhu, P. Kumar: DSFormer: Effective Compression of Text-Transformers by Dense-Sparse "
        "Weight Factorization, 2023",
    ),
    about="Fashion-MNIST, an MLP with two hidden layers of 256, trained for three epochs of SGD with momentum. Then its "
    "hidden weights (the head stays dense) are factorised so as to store at most the given fraction of the dense "
    "values of 32 bits, positions of nonzeros included: by truncated SVD, by one dictionary for a weight with 2:4 "
    "codes, or by dictionaries for 16 rows each with 3:16 and 6:16 codes. Fine-tuning trains the factors, and STF the "
    "dense weights through their factorisation, for three more epochs at a fifth of the learning rate; so does the "
    "dense row. The paper compresses BERT models.",
    base=override(FASHION_MNIST, SETTING),
    panels=(
        Panel("As factorised, without fine-tuning", before(), seeds=3, **AXIS),
        Panel(
            "Fine-tuned", after(), seeds=3, **AXIS,
            paper=(Figures(f"{BLOCKS}, {STF}", "BERT, GLUE and SQuAD",
                           {min(BUDGETS): "up to 40 % smaller than low rank at equal accuracy"}),),
        ),
    ),
    claims=claims(),
    metrics=(ACCURACY, LOSS),
    quick={**QUICK, "pretrained.steps": QUICK["steps"]},
    quick_seeds=1,
)  # fmt: skip
