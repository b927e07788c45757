"""Interruptions of a compression at every step of its writing, and folders of other calls."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sparsejax import compress
from sparsejax.compress import prune_layers
from sparsejax.models.transformer import Transformer

MODEL = Transformer(classes=16, depth=2, width=8, heads=2, hidden=8, max_length=8, dtype="bfloat16")
TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (2, 8), 0, 16))
PARAMS = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), jax.jit(MODEL.init)(jax.random.key(1), TOKENS)["params"]
)


def run(method=None, params=PARAMS, **more):
    return prune_layers(method or compress.magnitude(), MODEL, params, TOKENS, 0.5, progress=False, **more)


@pytest.fixture(scope="module")
def whole():
    return run()


STEPS = [(os, "fsync"), (os, "replace"), (Path, "unlink"), (safetensors.numpy, "save_file")]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_an_interruption_at_any_step_of_writing_changes_no_bit(
    whole, tmp_path, monkeypatch, owner, name, when
):
    """Goes on until no call is left to interrupt: the first, the second of the next run, and so on."""
    function, count = getattr(owner, name), 0

    def interrupted(*args, **more):
        nonlocal count
        count += 1
        if count != stop:
            return function(*args, **more)
        if when == "after":
            function(*args, **more)
        raise KeyboardInterrupt

    for stop in range(1, 20):
        folder, count = tmp_path / f"{stop}", 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            try:
                run(resume=folder)
            except KeyboardInterrupt:
                pass
            else:
                break
        result = run(resume=folder)
        jax.tree.map(
            np.testing.assert_array_equal, (result.params, result.masks), (whole.params, whole.masks)
        )
        assert {x.dtype for x in jax.tree.leaves(result.params)} == {jnp.dtype("bfloat16")}
        assert result.report == whole.report
        assert [path.name for path in folder.glob("hidden*")] == ["hidden.2.safetensors"]
    assert stop > 1


def test_settings_of_the_method_belong_to_the_call(tmp_path):
    run(compress.sparsegpt(), resume=tmp_path)
    message = (
        r"holds a compression with another damping of the method \(0.01 there, 0.1 here\); choose another"
    )
    with pytest.raises(ValueError, match=message):
        run(compress.sparsegpt(damping=0.1), resume=tmp_path)
    run(compress.sparsegpt(), resume=tmp_path)


def test_settings_are_json_and_name_the_wrapped_method():
    method = compress.least_squares(compress.dsnot(compress.wanda(scope="layer"), skip="mlp/*"), damping=0.2)
    found = json.loads(json.dumps(dict(method.settings)))
    assert found["damping"] == 0.2 and found["initial"]["skip"] == ["mlp/*"]
    assert found["initial"]["initial"] == {"scope": "layer"}
    rounding = compress.quantise.rounding(bits=3, group=8)
    assert compress.sparsegpt(quantise=rounding).settings["quantise"] == "rounding(bits=3, group=8)"


def test_other_weights_behind_the_same_embedding_are_refused(tmp_path):
    run(resume=tmp_path)
    block = jax.tree.map(lambda x: x, PARAMS["block_1"])
    block["mlp"]["up"]["bias"] += 1
    with pytest.raises(
        ValueError, match="a compression of another block_1; choose another folder or empty it"
    ):
        run(params={**PARAMS, "block_1": block}, resume=tmp_path)


def test_hidden_states_of_other_moments_are_removed(tmp_path):
    run(resume=tmp_path)
    for name in ("hidden.0.safetensors", "hidden.7.part"):
        (tmp_path / name).write_bytes(b"old")
    run(resume=tmp_path)
    assert [path.name for path in tmp_path.glob("hidden*")] == ["hidden.2.safetensors"]
