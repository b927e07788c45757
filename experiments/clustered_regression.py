"""Linear regression whose weights are active in bursts: which of them does a method find?

y = X w + noise, with X of independent standard normal entries and w zero outside `bursts` runs of `length`
neighbours, where it is standard normal. `run` is the function of the table `turbo_vbi_regression`: one data
set, one method, a summary of the support that it found.
"""

import json
import pathlib
import time
import warnings
from collections.abc import Mapping

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ARDRegression

from sparsejax import bayes
from sparsejax.bayes import Gamma, Hierarchy
from sparsejax.masks import choose

ROUNDS = 50
WARM_ROUNDS = 20


def clustered_data(seed: int, *, size: int, bursts: int, length: int, samples: int, noise: float):
    """(X, y, w) of shapes (samples, size), (samples,), (size,) in float64; bursts never touch.

    Args:
      seed: of everything random.
      size: number of weights.
      bursts, length: how many runs of active weights, and how long each.
      samples: number of observations.
      noise: standard deviation of the noise.

    Raises:
      ValueError: if the bursts do not fit.
    """
    gaps = size - bursts * length + 1
    if bursts > gaps:
        raise ValueError(f"{bursts} bursts of {length} do not fit into {size} weights")
    rng = np.random.default_rng(seed)
    before = np.sort(rng.choice(gaps, bursts, replace=False))
    starts = before + length * np.arange(bursts)
    weights = np.zeros(size)
    for start in starts:
        weights[start : start + length] = rng.normal(size=length)
    inputs = rng.normal(size=(samples, size))
    return inputs, inputs @ weights + noise * rng.normal(size=samples), weights


def turbo_vbi(inputs, targets, *, structure: str, p01: float, p10: float, slab, spike):
    """Turbo-VBI with the exact Gaussian posterior of the weights given E rho: (active, mean).

    The noise precision is re-estimated in every round. The first `WARM_ROUNDS` are those of automatic
    relevance determination, E rho = 1 / E w^2: from any constant E rho the support stays where it was first.
    """
    samples, size = inputs.shape
    chain = choose("structure", structure, ("chain", "independent")) == "chain"
    hierarchy = Hierarchy(Gamma(*slab), Gamma(*spike), p01, p10, chain)
    prior, precision = np.full((size, 1), hierarchy.rest, np.float32), np.ones(size)
    gram, noise_precision = inputs.T @ inputs, 10 / np.var(targets)
    for step in range(ROUNDS):
        covariance = np.linalg.inv(noise_precision * gram + np.diag(precision))
        mean = noise_precision * covariance @ (inputs.T @ targets)
        residual = np.sum((targets - inputs @ mean) ** 2) + np.sum(gram * covariance)
        noise_precision = samples / residual
        square = mean**2 + np.diag(covariance)
        if step < WARM_ROUNDS:
            precision = 1 / square
            continue
        beliefs = bayes.turbo_round(square[:, None].astype(np.float32), prior, hierarchy)
        precision, prior = np.asarray(beliefs.precision, np.float64)[:, 0], beliefs.prior
    return np.asarray(beliefs.log_odds)[:, 0] >= 0, mean


def ard(inputs, targets):
    """scikit-learn's ARDRegression: (active, mean); active are the coefficients that are not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mean = ARDRegression(fit_intercept=False).fit(inputs, targets).coef_
    return mean != 0, mean


def f1(found, truth) -> float:
    """The F1 score of two bool arrays: the harmonic mean of precision and recall."""
    return float(2 * np.sum(found & truth) / max(1, np.sum(found) + np.sum(truth)))


def run(config, workdir: pathlib.Path) -> dict:
    """Executes one row of the table; see `sparsejax.training.run` for the face of such a function.

    Args:
      config: `seed`; `data`, the keywords of `clustered_data`; `method`, a name and its keywords: "turbo_vbi",
        "ard", or "ard_best", which takes the threshold with the best F1 in hindsight.
      workdir: where `summary.json` is left.
    """
    begun = time.perf_counter()
    inputs, targets, weights = clustered_data(config["seed"], **config["data"])
    truth = weights != 0
    method = dict(config["method"])
    name = choose("method", method.pop("name"), ("turbo_vbi", "ard", "ard_best"))
    if name == "turbo_vbi":
        active, mean = turbo_vbi(inputs, targets, **method)
    else:
        active, mean = ard(inputs, targets, **method)
        if name == "ard_best":
            active = max((np.abs(mean) >= size for size in np.abs(mean)), key=lambda found: f1(found, truth))
    kept, runs = map(int, bayes.count_runs(active[:, None]))
    summary: Mapping = {
        "f1": f1(active, truth),
        "active": kept,
        "run_length": kept / max(1, runs),
        "relative_error": float(
            np.linalg.norm(np.where(active, mean, 0) - weights) / np.linalg.norm(weights)
        ),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
