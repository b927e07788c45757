"""The evolutionary search of EvoPress (Sieberling et al. 2024): levels move between units, their sum stays.

A genome g gives every unit (a layer, a sub-block) an integer level between its bounds. A (1 + lambda) strategy with
elitism keeps one parent. In each generation `offspring` distinct genomes are made, each from the parent by

    k = min(k1, k2) moves, k1 and k2 uniform in {1, ..., moves};   a move: g_i -= 1, g_j += 1, i != j of one group,

so that sum g over a group never changes. Stages with ever more sequences thin them out: every stage draws a fresh
minibatch, on which all that are left are compared, and keeps the `survivors` of lowest fitness. The parent joins the
last stage and wins ties; the best of it is the next parent. Fitness values of different minibatches are never
compared.

Random numbers come from (seed, generation), so that a search that goes on from its file equals one in one piece.

Departures: units i and j of a move always differ (the released code may draw the same one, a move that does
nothing), and no offspring equals the parent.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

_VERSION = 1
_TRIES = 50  # draws per wanted offspring, before a small neighbourhood counts as exhausted


class Space(NamedTuple):
    """The genomes that are allowed.

    Attributes:
      names: of the units.
      lower, upper: smallest and largest level of each unit.
      groups: a label (0, 1, ...) per unit; only units of one group exchange levels.
    """

    names: tuple[str, ...]
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    groups: tuple[int, ...]


class Stage(NamedTuple):
    """A round of selection: how many survive a comparison on how many sequences."""

    survivors: int
    sequences: int


class Found(NamedTuple):
    """What a search gives: the last parent (one int per unit), and per generation a record {"fitness": of the
    parent that came out, "parent": of the one that went in, on the same minibatch, "genome": what came out}."""

    genome: tuple[int, ...]
    history: list[dict]


def mutate(rng: np.random.Generator, parent: Sequence[int], space: Space, moves: int = 3) -> tuple[int, ...]:
    """One offspring; the parent itself where no move is possible or moves cancel."""
    genome, lower, upper, groups = (np.array(x) for x in (parent, space.lower, space.upper, space.groups))
    for _ in range(rng.integers(1, moves + 1, 2).min()):
        takes = genome < upper
        others = (
            np.bincount(groups, takes)[groups] - takes
        )  # units of the group that could take from this one
        givers = np.flatnonzero((genome > lower) & (others > 0))
        if not givers.size:
            break
        giver = rng.choice(givers)
        takers = np.flatnonzero(takes & (groups == groups[giver]))
        genome[giver] -= 1
        genome[rng.choice(takers[takers != giver])] += 1
    return tuple(int(level) for level in genome)


def shuffled(rng: np.random.Generator, genome: Sequence[int], space: Space) -> tuple[int, ...]:
    """The genome with the levels of every group permuted at random (of groups whose units have equal bounds)."""
    levels, groups = np.array(genome), np.array(space.groups)
    for label in dict.fromkeys(space.groups):
        units = np.flatnonzero(groups == label)
        levels[units] = levels[rng.permutation(units)]
    return tuple(int(level) for level in levels)


def search(
    space: Space,
    start: Sequence[int],
    fitness: Callable,
    stages: Sequence[Stage],
    *,
    pool: int,
    generations: int,
    offspring: int = 64,
    moves: int = 3,
    starts: int = 0,
    seed: int = 0,
    path: Path | None = None,
    settings: dict | None = None,
    progress: bool | None = None,
) -> Found:
    """Searches for the genome of lowest fitness.

    Args:
      space: the allowed genomes.
      start: the first parent.
      fitness: `(genomes (n, units) int, sequences (b,) int) -> n floats`, lower is better; NaN counts as infinite.
      stages: their last one keeps a single survivor.
      pool: number of sequences that minibatches are drawn from, without replacement; a stage that asks for more
        takes them all.
      generations: how many.
      offspring: distinct genomes per generation; fewer where the parent has not so many neighbours.
      moves: largest number of moves in an offspring.
      starts: if positive, the first parent is the best of so many shuffled ones, on the first stage's sequences.
      seed: of all random numbers.
      path: a JSON file that holds the state after every generation, written atomically; a search whose file
        exists goes on from there, or gives what it was after `generations`. None keeps nothing.
      settings: what else the file must agree with (JSON-able).
      progress: whether to show a bar; None: if stderr is a terminal.

    Raises:
      ValueError: for stages that keep other than one at last, or a file of another search.
    """
    if not stages or stages[-1].survivors != 1:
        raise ValueError(f"the last stage of a search must keep 1 survivor, got stages {list(stages)}")
    settings = {
        **(settings or {}),
        "space": [list(part) for part in space],
        "start": list(start),
        "stages": [list(stage) for stage in stages],
        "pool": pool,
        "offspring": offspring,
        "moves": moves,
        "starts": starts,
        "seed": seed,
    }
    history = _load(path, settings)[:generations]
    if history:
        parent = tuple(history[-1]["genome"])
    else:
        parent = _first(space, start, fitness, stages[0].sequences, pool, starts, seed)
    options = {"desc": "search", "unit": "generation", "disable": None if progress is None else not progress}
    with tqdm(total=generations, initial=len(history), **options) as bar:
        while len(history) < generations:
            rng = np.random.default_rng([seed, 1 + len(history)])
            parent, record = _generation(rng, space, parent, fitness, stages, pool, offspring, moves)
            history.append(record)
            _save(path, settings, history)
            bar.set_postfix(fitness=f"{record['fitness']:.4g}", refresh=False)
            bar.update()
    return Found(parent, history)


def _first(space, start, fitness, sequences, pool, starts, seed):
    """The start, or the best of some shuffled ones."""
    if not starts:
        return tuple(int(level) for level in start)
    rng = np.random.default_rng([seed, 0])
    genomes = list(dict.fromkeys(shuffled(rng, start, space) for _ in range(starts)))
    return genomes[_order(fitness, genomes, _draw(rng, pool, sequences))[0][0]]


def _generation(rng, space, parent, fitness, stages, pool, offspring, moves):
    genomes = _offspring(rng, parent, space, offspring, moves)
    for stage in stages[:-1]:
        order, _ = _order(fitness, genomes, _draw(rng, pool, stage.sequences))
        genomes = [genomes[i] for i in order[: stage.survivors]]
    genomes = [parent, *genomes]
    order, values = _order(fitness, genomes, _draw(rng, pool, stages[-1].sequences))
    best = genomes[order[0]]
    return best, {"fitness": values[order[0]], "parent": values[0], "genome": list(best)}


def _offspring(rng, parent, space, wanted, moves):
    found = {}
    for _ in range(_TRIES * wanted):
        genome = mutate(rng, parent, space, moves)
        if genome != tuple(parent):
            found[genome] = None
        if len(found) == wanted:
            break
    return list(found)


def _draw(rng, pool, sequences):
    return np.sort(rng.choice(pool, min(sequences, pool), replace=False))


def _order(fitness, genomes, sequences):
    """Positions by ascending fitness, the earlier first in ties, and the values."""
    if not genomes:
        return [], []
    values = np.asarray(fitness(np.array(genomes), sequences), np.float64)
    values = np.where(np.isnan(values), np.inf, values)
    return [int(i) for i in np.argsort(values, kind="stable")], [float(value) for value in values]


def _load(path, settings) -> list[dict]:
    """The history in a file; empty if there is no file."""
    if path is None or not path.exists():
        return []
    try:
        state = json.loads(path.read_text())
        found, history = state["settings"], list(state["history"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not the state of a search ({error}); remove it to start anew"
        ) from None
    changed = [key for key in {**found, **settings} if found.get(key) != _plain(settings.get(key))]
    if state.get("version") != _VERSION or changed:
        raise ValueError(
            f"{str(path)!r} belongs to another search (different: {', '.join(changed) or 'version'}); remove it or "
            "choose another folder"
        )
    return history


def _plain(value):
    return json.loads(json.dumps(value))


def _save(path, settings, history):
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"version": _VERSION, "settings": settings, "history": history}
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(state))
    replacement.replace(path)  # atomic: a crash must not leave half a state
