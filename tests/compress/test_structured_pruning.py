"""What every structured method must do, and the baselines' scores and uniform shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax.compress.cfsp import cfsp
from sparsejax.compress.flap import flap
from sparsejax.compress.groups import pooled, share_of, uniform, units_of
from sparsejax.compress.shrink import linear_weights, shrink, sizes_of
from sparsejax.compress.slicegpt import slicegpt
from sparsejax.compress.structured import magnitude_sp, random_sp, wanda_sp
from sparsejax.compress.ziplm import ziplm
from sparsejax.models import Encoder, Transformer

TOKENS = np.random.default_rng(9).integers(0, 31, (6, 12))
GPT = Transformer(classes=31, depth=2, width=16, heads=4, max_length=12)
LLAMA = Transformer(
    classes=31,
    depth=2,
    width=16,
    heads=4,
    max_length=12,
    norm="rms",
    positions="rotary",
    activation="silu",
    gated=True,
    bias=(),
    kv_heads=2,
    hidden=24,
    tied=True,
)
METHODS = {
    "magnitude_sp": magnitude_sp(),
    "wanda_sp": wanda_sp(),
    "random_sp": random_sp(),
    "flap": flap(),
    "flap uniform": flap(allocation="UL-UM", metric="IFV"),
    "flap separate": flap(allocation="AL-MM", metric="WIFN"),
    "cfsp": cfsp(),
    "cfsp rows": cfsp(normalise="row", coarse="mse"),
    "ziplm": ziplm(evaluations=3, sequences=2, ratio=0.5),
}


def noisy(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


PARAMS = {GPT: noisy(GPT), LLAMA: noisy(LLAMA)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "model", [pytest.param(GPT, id="gpt", marks=pytest.mark.slow), pytest.param(LLAMA, id="llama")]
)
def test_contract(name, model):
    params = PARAMS[model]
    same = METHODS[name].run(model, params, TOKENS, 0, progress=False)
    assert same.model == model and same.report["sparsity"] == 0 and same.masks is None
    jax.tree.map(np.testing.assert_array_equal, same.params, params)
    found = METHODS[name].run(model, params, TOKENS, 0.37, progress=False)
    before, after = linear_weights(params, 2), linear_weights(found.params, 2)
    unit = max(units.weight for units in units_of(model, ("heads", "channels")).values())
    assert abs(0.37 * before - (before - after)) <= unit / 2
    assert found.report["sparsity"] == 1 - after / before and found.report["asked"] == 0.37
    layers = found.report["layers"]
    assert sum(entry["size"] for entry in layers.values()) == before
    assert sum(entry["size"] * entry["density"] for entry in layers.values()) == pytest.approx(after)
    for key, entry in layers.items():
        assert (entry["error"] > 0) == (entry["kept"] < entry["units"]) and entry["error"] <= 1.001, key
    shapes = jax.eval_shape(found.model.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, shapes)
    again = METHODS[name].run(model, params, TOKENS, 0.37, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@jax.jit
def consumer_inputs(params):
    """What `out` and `down` of the second block of LLAMA read."""
    seen = {}

    def tap(call, args, kwargs, about):
        seen.setdefault("/".join(about.module.path), args[0])
        return call(*args, **kwargs)

    states, context = LLAMA.apply({"params": params}, TOKENS, method="start"), LLAMA.context(12)
    states = LLAMA.block(0).apply({"params": params["block_0"]}, states, **context)
    with linen.intercept_methods(tap):
        LLAMA.block(1).apply({"params": params["block_1"]}, states, **context)
    return {name: seen[name] for name in ("attention/out", "mlp/down")}


@pytest.mark.parametrize("name", ["magnitude_sp", "wanda_sp"])
def test_what_is_left_are_the_largest_scores_unchanged(name):
    params = PARAMS[LLAMA]
    found = METHODS[name].run(LLAMA, params, TOKENS, 0.3, progress=False)
    seen = consumer_inputs(params)
    heads = []
    for sub, layer, units in (("attention", "out", 2), ("mlp", "down", 24)):
        kernel = params["block_1"][sub][layer]["kernel"]
        scores = np.linalg.norm(kernel, axis=1)
        if name == "wanda_sp":
            x = np.asarray(seen[f"{sub}/{layer}"]).reshape(-1, len(kernel))
            scores = np.abs(kernel * np.sqrt((x**2).mean(0))[:, None]).mean(1)
        scores = scores.reshape(units, -1).sum(1)
        count = found.report["layers"][f"block_1/{sub}"]["kept"]
        heads.append(np.sort(np.argsort(scores)[units - count :]))
    kept = np.ravel([2 * heads[0][:, None] + np.arange(2)])
    _, expected = shrink(LLAMA, params, heads={1: kept}, channels={1: heads[1]})
    jax.tree.map(np.testing.assert_array_equal, found.params["block_1"], expected["block_1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [wanda_sp(), flap(), cfsp(), ziplm(evaluations=2, sequences=2, ratio=0.5), slicegpt(multiple=2)]
)
def test_bfloat16(method):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS[LLAMA])
    found = method.run(LLAMA, params, TOKENS, 0.25, "unstructured", progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.bfloat16.dtype}
    assert found.report["kept"] == linear_weights(found.params, 2)
    if method.name == "slicegpt":
        assert found.model.width == 12 and found.report["sparsity"] == 0.25
    else:
        unit = max(units.weight for units in units_of(LLAMA, ("heads", "channels")).values())
        assert abs(0.75 * found.report["weights"] - found.report["kept"]) <= unit / 2
    assert bool(jnp.isfinite(jax.jit(found.model.apply)({"params": found.params}, TOKENS)).all())


def test_another_seed_gives_another_choice():
    runs = [
        random_sp(seed=seed).run(LLAMA, PARAMS[LLAMA], TOKENS, 0.4, progress=False).params["block_0"]["mlp"]
        for seed in (0, 0, 1)
    ]
    same, other = (
        [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(run), strict=True)]
        for run in runs[1:]
    )
    assert all(same) and not any(other)


def test_inputs_that_are_not_finite():
    params = {**PARAMS[LLAMA], "block_1": jax.tree.map(np.copy, PARAMS[LLAMA]["block_1"])}
    params["block_1"]["mlp"]["up"]["kernel"][:] = 3e38
    with pytest.raises(
        ValueError, match=r"the inputs of block_1/mlp/down/kernel are not finite \(their square\)"
    ):
        wanda_sp().run(LLAMA, params, TOKENS, 0.4, progress=False)


def test_units_and_their_weights():
    assert {key: units[:2] for key, units in units_of(GPT, ("heads", "channels")).items()} == {
        (i, sub): units for i in (0, 1) for sub, units in (("attention", (4, 4 * 64)), ("mlp", (64, 32)))
    }
    units = units_of(LLAMA, ("heads", "channels"))
    assert units[1, "attention"] == (2, 4 * 16 * (2 + 2 + 2), 8) and units[0, "mlp"] == (24, 48, 1)
    assert sum(entry.count * entry.weight for entry in units.values()) == linear_weights(PARAMS[LLAMA], 2)
    gated = GPT.clone(gated=True)  # as in FLAP: a head costs 4 / 3 of its width in channels
    head, channel = (
        units_of(gated, (name,))[0, sub].weight for name, sub in (("heads", "attention"), ("channels", "mlp"))
    )
    assert head / channel == 4 * 4 / 3
    gone, _ = shrink(LLAMA, PARAMS[LLAMA], heads={0: ()})
    assert (0, "attention") not in units_of(gone, ("heads",)) and sizes_of(gone, 0)["kv_heads"] == 0


def test_a_pool_keeps_the_prefix_that_is_nearest_to_the_budget():
    random = np.random.default_rng(0)
    units = units_of(LLAMA, ("heads", "channels"))
    scores = {key: random.normal(size=entry.count) for key, entry in units.items()}
    flat = sorted(
        (-score, position, units[key].weight)
        for position, (key, score) in enumerate((key, score) for key in units for score in scores[key])
    )
    for budget in (0, 100, 1234, 2000, 10**6):
        totals = np.cumsum([0] + [weight for *_, weight in flat])
        expected = np.zeros(len(flat), bool)
        expected[[position for _, position, _ in flat[: np.argmin(abs(totals - budget))]]] = True
        found = pooled(scores, units, budget)
        np.testing.assert_array_equal(np.concatenate([found[key] for key in units]), expected)


def test_uniform_takes_the_same_share_of_every_block():
    units = units_of(GPT.clone(depth=5), ("heads", "channels"))
    scores = {key: np.arange(entry.count) for key, entry in units.items()}
    total = sum(entry.count * entry.weight for entry in units.values())
    for sparsity in (0.0, 0.11, 0.4, 0.75, 0.99):
        kept = uniform("some", scores, units, sparsity, total)
        lost = [
            sum(int((~kept[i, sub]).sum()) * units[i, sub].weight for sub in ("attention", "mlp"))
            for i in range(5)
        ]
        assert abs(sum(lost) - sparsity * total) <= 16 and max(lost) - min(lost) <= 32
        assert all(sorted(mask) == list(mask) for mask in kept.values())  # the lowest scores go
    assert share_of("some", units, 0.5, total) == 0.5


def test_only_heads_or_only_channels():
    found = wanda_sp(structures=("channels",)).run(GPT, PARAMS[GPT], TOKENS, 0.3, progress=False)
    assert {entry["kept"] for key, entry in found.report["layers"].items() if "attention" in key} == {4}
    found = magnitude_sp(structures=("heads",)).run(GPT, PARAMS[GPT], TOKENS, 0.1, progress=False)
    kept = [found.report["layers"][f"block_{i}/attention"]["kept"] for i in (0, 1)]
    assert sum(kept) == 6 and found.report["layers"]["block_0/mlp"]["kept"] == 64


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (GPT, (TOKENS, 1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (GPT, (TOKENS, 0.5, "2:4"), "wanda_sp removes whole structures and takes no pattern, got '2:4'"),
        (Encoder(classes=31), (TOKENS, 0.5), "wanda_sp can compress a Transformer, got a Encoder"),
        (GPT.clone(linear={"name": "low_rank"}), (TOKENS, 0.5), "wanda_sp can compress dense layers, got"),
        (GPT.clone(experts=2), (TOKENS, 0.5), "wanda_sp cannot compress experts, which block 0 has"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        wanda_sp().run(model, {}, *arguments)


def test_bad_structures_and_too_much_of_one():
    with pytest.raises(ValueError, match="unknown structure 'head'; did you mean 'heads'"):
        wanda_sp(structures=("head",)).run(GPT, PARAMS[GPT], TOKENS, 0.5)
    with pytest.raises(ValueError, match="no structure may be removed"):
        wanda_sp(structures=()).run(GPT, PARAMS[GPT], TOKENS, 0.5)
    with pytest.raises(
        ValueError, match="wanda_sp can remove a share of 0.333 of the blocks' weights, got 0.5"
    ):
        wanda_sp(structures=("heads",)).run(GPT, PARAMS[GPT], TOKENS, 0.5, progress=False)
