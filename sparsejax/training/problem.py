"""What a configuration names, loaded: the data, the model, its initial variables and the transform."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

import sparsejax.data
import sparsejax.models
from sparsejax import nn, parameterizations, pruning, structure, transforms
from sparsejax.data.pipeline import batches
from sparsejax.masks import choose, dense_masks, densities
from sparsejax.parameterizations import Parameterized
from sparsejax.training.phases import Phase, expand, full_masks
from sparsejax.training.step import objective

# Importance scores of `sparsejax.pruning.at_init` that the method "fixed" can train with.
SCORES = ("random", "magnitude", "snip", "grasp", "synflow")
AT_INIT_KEYWORDS = ("samples", "rounds")
GRASP_TEMPERATURE = 200.0
MAX_SPARSITY = 1.0 - 1e-6


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data, the model and the phases of a resolved configuration.

    Attributes:
      config: the resolved configuration.
      dataset: see `sparsejax.data.load`.
      model: the linen module, or a `Parameterized` one.
      phases: at least one.
      augment: the augmentation of the training batches.
      mesh: the devices, or None for one device.
      pretrained: the network to start from (`training.pretrained`), or None.
    """

    config: Mapping
    dataset: sparsejax.data.Dataset
    model: Any
    phases: list[Phase]
    augment: str
    mesh: Mesh | None
    pretrained: Any = None

    @property
    def network(self):
        """The linen module itself."""
        return self.model.model if isinstance(self.model, Parameterized) else self.model

    @property
    def seed(self) -> int:
        """The seed of everything that is random in the run."""
        return self.config["seed"]

    @functools.cached_property
    def sample(self) -> np.ndarray:
        """One training input, of shape (1, ...): enough to initialise or trace the model."""
        return self.dataset.train[0][:1]

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        """The variables of the linen module itself, as shapes and dtypes."""
        return jax.eval_shape(lambda: self.network.init(jax.random.key(0), self.sample, train=False))

    @functools.cached_property
    def _init(self):
        return jax.jit(lambda key, x: self.model.init(key, x, train=False))

    def variables(self, draw: int = 0) -> dict[str, Any]:
        """`params` and other collections at the start; another `draw` gives independent weights.

        The first draw is the pretrained network, if there is one.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), draw)
        if self.pretrained is None or draw:
            return dict(self._init(key, self.sample))
        found = self.converted
        return jax.jit(self.model.convert)(key, found) if isinstance(self.model, Parameterized) else found

    @functools.cached_property
    def converted(self) -> dict[str, Any]:
        """The variables of the pretrained network, whose linear layers may be of another kind than this one's."""
        found, key = self.pretrained, jax.random.key(self.seed)
        return nn.convert(found.model, found.variables, self.network, key, self.sample, train=False)

    def batches(self, steps: int, start: int = 0):
        """The training batches of steps `start` to `steps`: a pure function of the seed and the step."""
        x, y = self.dataset.train
        size = self.config["batch_size"]
        return batches(x, y, batch_size=size, steps=steps, seed=self.seed, augment=self.augment, start=start)


def load_problem(config: Mapping, mesh: Mesh | None, pretrained=None) -> Problem:
    """Loads what `config` names, to start from the network `pretrained` if that is not None.

    Raises:
      ValueError: one sentence, for an unknown name or keyword.
      FileNotFoundError: one sentence, for a missing data set.
    """
    data = dict(config["data"])
    augment = data.pop("augment", "none")
    phases = expand(config)
    dataset = _load_data(json.dumps(data, sort_keys=True))
    model = sparsejax.models.build(**{"classes": dataset.outputs, **config["model"]})
    if "parameterization" in config:
        known = inspect.signature(
            choose(
                "parameterization", config["parameterization"]["name"], parameterizations.PARAMETERIZATIONS
            )
        ).parameters
        given = {"steps": config["steps"]} if "steps" in known else {}
        model = Parameterized(model, parameterizations.build(**{**given, **config["parameterization"]}))
    return Problem(config, dataset, model, phases, augment, mesh, pretrained)


@functools.lru_cache(maxsize=1)
def _load_data(keywords: str) -> sparsejax.data.Dataset:
    """The data set, kept for the next run in this process: tables train many networks on the same one."""
    return sparsejax.data.load(**json.loads(keywords))


# --- the transform -----------------------------------------------------------------------------------


def build_transform(problem: Problem, phase: Phase, inner, schedule, variables: Mapping):
    """The sparsejax transform of a phase around the optimizer `inner`, whose learning rate is `schedule`.

    Factories that take `learning_rate`, `steps`, `train_size` or `groups` get the schedule, the length of the
    phase, the number of training examples and the removable channels of the model, unless the configuration
    sets them; those with a `metric` get the `b2` of the configured optimizer.

    For the method "fixed", `score` chooses how the masks are found at initialisation: "random" (the default),
    "pretrained" (those that the pretrained network was trained with), or by `sparsejax.pruning.at_init` on
    the first training batches. With random masks, an `allocation` that
    is the name of such a score takes only its layer densities (Random Pruning, Liu et al. 2022).
    """
    if phase.method is None:
        masks = full_masks(variables["params"], phase.include, phase.exclude)
        return transforms.build("fixed", inner, masks=masks)
    keywords = dict(phase.method)
    name = keywords.pop("name")
    factory = choose("method", name, transforms.METHODS)
    known = inspect.signature(factory).parameters
    if "seed" not in known:
        keywords.pop("seed")
    known_here = {
        "learning_rate": schedule,
        "steps": phase.steps,
        "train_size": len(problem.dataset.train[0]),
    }
    for keyword, value in known_here.items():
        if keyword in known:
            keywords.setdefault(keyword, value)
    if "metric" in known and "b2" in problem.config["optimizer"]:
        keywords.setdefault("b2", problem.config["optimizer"]["b2"])  # of the moments that are the metric
    if "groups" in known and "groups" not in keywords:
        keywords["groups"] = structure.channels(problem.model, variables, problem.sample, train=False)
    for keyword in ("at", "end"):
        # hesso's `end` is the step after its last
        if (keywords.get(keyword) or 0) >= phase.steps + (name == "hesso"):
            raise ValueError(
                f"config.method.{keyword}={keywords[keyword]} is never reached: steps count from 0, and there are "
                f"{phase.steps} of them"
            )
    if keywords.get("update_every", 0) >= min(phase.steps, keywords.get("update_end") or phase.steps):
        logging.warning(
            "config.method.update_every=%d: the masks never change, because updates end before",
            keywords["update_every"],
        )
    if name == "fixed" and keywords.get("score") == "pretrained":
        keywords = {"masks": _pretrained_masks(problem, variables["params"])}
    elif name == "fixed":
        keywords = _fixed_keywords(problem, keywords, variables)
    return transforms.build(name, inner, **keywords)


def _pretrained_masks(problem: Problem, params):
    if problem.pretrained is None:
        raise ValueError(
            "config.method.score='pretrained' needs config.pretrained, the run that has the masks"
        )
    if not isinstance(problem.model, Parameterized):
        return problem.pretrained.masks
    return {**dense_masks(params), "params": problem.pretrained.masks}


def _fixed_keywords(problem: Problem, keywords: dict, variables: Mapping) -> dict:
    for keyword in keywords:
        choose(
            "keyword of method 'fixed'", keyword, ("score", *AT_INIT_KEYWORDS, *transforms.keywords("fixed"))
        )
    score = choose("score", keywords.pop("score", "random"), (*SCORES, "pretrained"))
    allocation = keywords.get("allocation")
    if score != "random":
        return {"masks": masks_at_init(problem, score, keywords, variables)}
    if isinstance(allocation, str) and allocation in SCORES[2:]:
        found = {key: value for key, value in keywords.items() if key != "allocation"}
        masks = masks_at_init(problem, allocation, found, variables)
        keywords = {key: value for key, value in keywords.items() if key not in AT_INIT_KEYWORDS}
        # An emptied layer would break the network; the mapping's sparsities stay below one.
        found = {path: min(1.0 - density, MAX_SPARSITY) for path, density in densities(masks).items()}
        keywords["allocation"] = found
    return keywords


def masks_at_init(problem: Problem, score: str, keywords: Mapping, variables: Mapping):
    """Masks from a score of the initial weights.

    SNIP and GraSP see the first training batches as training does, with batch norm by batch statistics
    (GraSP's authors draw ten samples of every class instead). SynFlow sees no data, and norm layers in
    inference mode.

    Args:
      score: a name of `sparsejax.pruning.at_init`.
      keywords: `sparsity`, and optionally `samples` (at least this many examples; default 10 per class and
        at least 100), `rounds`, `pattern`, `allocation`, `include`, `exclude`.
    """
    keywords = dict(keywords)
    seed = keywords.pop("seed", problem.seed)
    classes = problem.dataset.classes
    batch = _first_samples(problem, keywords.pop("samples", max(100, 10 * (classes or 1))))
    temperature = GRASP_TEMPERATURE if score == "grasp" else 1.0

    noise = {"dropout": jax.random.key(seed)}

    def forward(params, x):
        return problem.model.apply({**variables, "params": params}, x, train=False)

    def loss(params):
        given = {**variables, "params": params}
        outputs, _ = problem.model.apply(given, batch["x"], train=True, mutable=["batch_stats"], rngs=noise)
        return jnp.mean(objective(outputs / temperature, batch["y"], classes)[0])

    return pruning.at_init(
        score,
        variables["params"],
        keywords.pop("sparsity", None),
        loss=loss,
        forward=forward,
        input_shape=problem.sample.shape,
        key=jax.random.key(seed),
        **keywords,
    )


def _first_samples(problem: Problem, count: int) -> dict[str, jax.Array]:
    needed = -(-count // problem.config["batch_size"])
    parts = list(problem.batches(needed))
    return {name: jnp.asarray(np.concatenate([part[name] for part in parts])) for name in ("x", "y")}
