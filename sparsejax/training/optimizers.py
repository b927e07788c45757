"""Optimizers and learning-rate schedules by name: any Optax factory that takes a learning rate."""

import inspect
from collections.abc import Callable, Mapping

import optax

from sparsejax.masks import choose


def constant(peak: float, steps: int) -> optax.Schedule:
    """The same learning rate at every step."""
    del steps
    return optax.constant_schedule(peak)


def cosine(peak: float, steps: int, final_factor: float = 0.0) -> optax.Schedule:
    """Half a cosine from `peak` to `peak * final_factor` over `steps`."""
    return optax.cosine_decay_schedule(peak, max(1, steps), alpha=final_factor)


def linear(peak: float, steps: int, final_factor: float = 0.0) -> optax.Schedule:
    """A straight line from `peak` to `peak * final_factor` over `steps`."""
    return optax.linear_schedule(peak, peak * final_factor, max(1, steps))


def piecewise(peak: float, steps: int, boundaries=(0.5, 0.75), factor: float = 0.1) -> optax.Schedule:
    """Multiplied by `factor` at each of `boundaries`, given as fractions of `steps`."""
    return optax.piecewise_constant_schedule(peak, {int(part * steps): factor for part in boundaries})


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear, "piecewise": piecewise}


# Their update evaluates the loss again, at other parameters or in its exact value.
UNFIT = ("lbfgs", "polyak_sgd")


def factories() -> dict[str, Callable]:
    """Every public Optax factory that takes a `learning_rate` and only needs gradients, by name."""
    found = {}
    for name, candidate in vars(optax).items():
        if inspect.isfunction(candidate) and not name.startswith("_") and name not in UNFIT:
            if "learning_rate" in inspect.signature(candidate).parameters:
                found[name] = candidate
    return found


def keywords(function: Callable) -> list[str]:
    """The names of the parameters that can be given to `function` by keyword."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def build_schedule(config: Mapping, steps: int) -> tuple[optax.Schedule, list[str]]:
    """The learning rate over a run of `steps`, and the names of the configuration fields it used."""
    name = config["schedule"]
    factory = choose("learning-rate schedule", name, SCHEDULES)
    own = [key for key in keywords(factory) if key not in ("peak", "steps")]
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if not 0 <= warmup < steps:
        raise ValueError(f"config.optimizer.warmup_steps={warmup} must lie in [0, steps={steps})")
    schedule = factory(peak, steps - warmup, **{key: config[key] for key in own if key in config})
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])
    return schedule, own


def build_optimizer(
    config: Mapping, steps: int, rate: float | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The Optax optimizer that `config.optimizer` describes, and its learning-rate schedule.

    `weight_decay` goes to the factory where it takes one; otherwise (SGD) it is added to the gradient, the
    L2 penalty of the papers. `clip_norm` clips the gradient that the optimizer receives by its global norm.

    Args:
      config: `name`, `learning_rate`, `schedule`, `warmup_steps`, keywords of schedule and factory.
      steps: the length over which the schedule decays.
      rate: a constant learning rate instead of the configured schedule.

    Raises:
      ValueError: one sentence that lists the known optimizers, schedules or keywords.
    """
    factory = choose("optimizer", config["name"], factories())
    schedule, used = build_schedule(config, steps)
    schedule = schedule if rate is None else optax.constant_schedule(rate)
    accepted = keywords(factory)
    before = []
    arguments = {"learning_rate": schedule}
    for key, value in config.items():
        if key in ("name", "learning_rate", "schedule", "warmup_steps", *used):
            continue
        if key == "clip_norm":
            before.append(optax.clip_by_global_norm(value))
        elif key == "weight_decay" and key not in accepted:
            before.append(optax.add_decayed_weights(value))
        else:
            known = sorted({*accepted, *used, "clip_norm", "schedule", "warmup_steps", "weight_decay"})
            arguments[choose(f"keyword of optimizer {config['name']!r}", key, known)] = value
    inner = factory(**arguments)
    return (optax.chain(*before, inner) if before else inner), schedule
