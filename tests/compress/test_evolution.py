"""The evolutionary search against exhaustive search, on planted fitness functions."""

import itertools
import json

import numpy as np
import pytest

from sparsejax.compress.evolution import Space, Stage, mutate, search, shuffled


def space_of(groups, lower=-3, upper=3):
    units = len(groups)
    return Space(tuple(f"u{i}" for i in range(units)), (lower,) * units, (upper,) * units, tuple(groups))


def planted(target):
    """Separable: the squared distance to a genome, whatever the sequences."""
    return lambda genomes, sequences: ((genomes - np.array(target)) ** 2).sum(1)


def sums(genome, groups):
    return {label: sum(g for g, own in zip(genome, groups, strict=True) if own == label) for label in groups}


@pytest.mark.parametrize("groups", [(0,) * 6, (0, 1, 0, 1, 0, 2)])
def test_moves_keep_the_sum_of_every_group_and_the_bounds(groups):
    rng, space = np.random.default_rng(0), space_of(groups, -1, 2)
    genome, seen = (0,) * 6, set()
    for _ in range(400):
        genome = mutate(rng, genome, space)
        assert sums(genome, groups) == sums((0,) * 6, groups)
        assert all(-1 <= level <= 2 for level in genome)
        seen.update(enumerate(genome))
    allowed = [g for g in itertools.product(range(-1, 3), repeat=6) if not any(sums(g, groups).values())]
    assert seen == {unit for g in allowed for unit in enumerate(g)}
    assert sums(shuffled(rng, genome, space), groups) == sums(genome, groups)


def test_the_number_of_moves_is_the_smaller_of_two():
    """min of two uniform numbers of {1, 2, 3}: 5, 3 and 1 of 9 cases, in a space where moves hardly ever cancel."""
    rng, space = np.random.default_rng(1), space_of((0,) * 2000)
    sizes = [sum(map(abs, mutate(rng, (0,) * 2000, space))) // 2 for _ in range(1500)]
    shares = np.bincount(sizes, minlength=4)[1:4] / len(sizes)
    np.testing.assert_allclose(shares, [5 / 9, 3 / 9, 1 / 9], atol=0.04)


def test_a_planted_separable_fitness_is_recovered():
    target = (2, -1, 0, -3, 3, -1)
    found = search(
        space_of((0,) * 6),
        (0,) * 6,
        planted(target),
        [Stage(4, 2), Stage(1, 4)],
        pool=9,
        generations=30,
        offspring=16,
    )
    assert found.genome == target
    assert found.history[-1]["fitness"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_swaps_of_dropped_blocks_find_the_exhaustive_optimum(seed):
    """8 units of two types, 2 of 4 dropped in each, with pairwise interactions; 36 genomes in all."""
    rng = np.random.default_rng(seed)
    interaction = rng.normal(size=(8, 8))

    def fitness(genomes, sequences):
        return np.einsum("gi,ij,gj->g", genomes, interaction, genomes)

    space = space_of((0, 1) * 4, 0, 1)
    start = (1, 1, 1, 1, 0, 0, 0, 0)
    found = search(
        space,
        start,
        fitness,
        [Stage(2, 1), Stage(1, 2)],
        pool=4,
        generations=8,
        offspring=16,
        starts=8,
        seed=seed,
    )
    pairs = list(itertools.combinations(range(4), 2))
    every = np.zeros((36, 8), int)
    for row, (first, second) in zip(every, itertools.product(pairs, pairs), strict=True):
        row[[2 * i for i in first] + [2 * i + 1 for i in second]] = 1
    assert fitness(np.array([found.genome]), None)[0] == pytest.approx(fitness(every, None).min())


def noisy(genomes, sequences):
    """Depends on the minibatch: every sequence has its own target."""
    rng = np.random.default_rng(5)
    targets = rng.integers(-3, 4, size=(10, genomes.shape[1]))[sequences]
    return ((genomes[:, None] - targets) ** 2).mean((1, 2))


STAGES = [Stage(4, 2), Stage(2, 4), Stage(1, 6)]


def test_the_parent_never_gets_worse_on_the_minibatch_of_a_generation():
    found = search(space_of((0,) * 5), (0,) * 5, noisy, STAGES, pool=10, generations=20, offspring=12)
    assert all(record["fitness"] <= record["parent"] for record in found.history)
    start = (3, -3, 3, -3, 0)
    fixed = search(space_of((0,) * 5), start, noisy, [Stage(1, 10)], pool=10, generations=20, offspring=12)
    values = [record["fitness"] for record in fixed.history]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_every_stage_draws_one_fresh_minibatch_for_all():
    calls = []

    def record(genomes, sequences):
        calls.append((len(genomes), tuple(sequences)))
        assert len({tuple(genome) for genome in genomes}) == len(genomes)
        return noisy(genomes, sequences)

    search(space_of((0,) * 5), (0,) * 5, record, STAGES, pool=10, generations=3, offspring=12)
    assert [(count, len(ids)) for count, ids in calls] == [(12, 2), (4, 4), (3, 6)] * 3
    assert len({ids for _, ids in calls}) == 9
    assert all(len(set(ids)) == len(ids) for _, ids in calls)


def test_ties_keep_the_parent_and_nan_never_wins():
    space, start = space_of((0,) * 4), (1, 0, 0, -1)
    same = search(space, start, lambda g, s: np.zeros(len(g)), [Stage(1, 1)], pool=1, generations=3)
    assert same.genome == start
    broken = search(
        space,
        start,
        lambda g, s: np.where((g == start).all(1), 1.0, np.nan),
        [Stage(1, 1)],
        pool=1,
        generations=3,
    )
    assert broken.genome == start


def test_a_search_goes_on_from_its_file(tmp_path):
    def run(generations, path=None):
        return search(
            space_of((0,) * 5),
            (0,) * 5,
            noisy,
            STAGES,
            pool=10,
            generations=generations,
            offspring=8,
            starts=4,
            path=path,
        )

    path = tmp_path / "new" / "search.json"
    whole = run(9)
    run(4, path)
    assert json.loads(path.read_text())["history"] == whole.history[:4]
    assert run(9, path) == whole
    assert run(9, path) == whole  # nothing left to do
    assert run(4, path) == run(4)  # and what it was before
    assert [file.name for file in path.parent.iterdir()] == ["search.json"]


def test_bad_input(tmp_path):
    path = tmp_path / "search.json"
    arguments = (space_of((0,) * 5), (0,) * 5, noisy)
    with pytest.raises(ValueError, match="must keep 1 survivor"):
        search(*arguments, [Stage(2, 1)], pool=10, generations=1)
    search(*arguments, [Stage(1, 1)], pool=10, generations=1, path=path)
    with pytest.raises(ValueError, match=r"belongs to another search \(different: seed\)"):
        search(*arguments, [Stage(1, 1)], pool=10, generations=2, path=path, seed=1)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not the state of a search"):
        search(*arguments, [Stage(1, 1)], pool=10, generations=2, path=path)
