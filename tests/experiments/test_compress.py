"""The command that compresses a folder: what it writes, that it can be read back and resumed, and its mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compress as command
from experiments import compression, compression_session, tables
from sparsejax import compress, formats, models
from sparsejax.interop import huggingface, native
from sparsejax.interop.tokenization import byte_tokenizer

SETTINGS = {
    "seed": 0,
    "method": "wanda",
    "options": {},
    "sparsity": 0.5,
    "pattern": None,
    "allocation": "uniform",
    "calibration": {"corpus": "stdlib", "samples": 4, "length": 16},
    "evaluation": {"corpus": "stdlib", "windows": 4},
    "format": None,
    "dtype": None,
}
ATTRIBUTES = {
    **{"depth": 2, "width": 16, "heads": 2, "hidden": 24, "max_length": 32, "positions": "rotary"},
    **{"norm": "rms", "activation": "silu", "gated": True, "bias": ()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random decoder of bytes."""
    model = models.build("transformer", 256, **ATTRIBUTES)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("models") / "dense"
    huggingface.save(path, model, params, {"model_type": "llama"})
    return path


def run(folder, out, **changes):
    return compression_session.compress_folder(folder, out, {**SETTINGS, **changes}, progress=False)


def test_the_new_folder_holds_the_compressed_model_and_says_so(folder, tmp_path):
    summary = run(folder, tmp_path / "out", format="csr")
    dense, found = huggingface.load(folder), huggingface.load(tmp_path / "out")
    tokens = compression.read_text(SETTINGS)
    expected = compress.prune_layers(
        compress.wanda(), dense.model, dense.params, tokens.calibration, 0.5, progress=False
    )
    jax.tree.map(np.testing.assert_array_equal, dict(found.params), dict(expected.params))
    assert summary["sparsity_reached"] == pytest.approx(0.5)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["after"] == summary["after"]
    loss = compress.perplexity(found.model, found.params, tokens.held_out, size=tokens.size)
    assert loss == summary["after"] and loss["loss"] != summary["before"]["loss"]
    packed = formats.load(tmp_path / "out" / "packed.safetensors")
    assert packed["block_1"]["mlp"]["down"]["kernel"].format == "csr"
    jax.tree.map(np.testing.assert_array_equal, formats.unpack(packed), dict(found.params))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`wanda`" in card and f"{summary['after']['perplexity']:.4f}" in card
    assert (tmp_path / "out" / "compression.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing is left beside it


@pytest.mark.slow
def test_a_written_folder_can_be_compressed_again(folder, tmp_path):
    run(folder, tmp_path / "once")
    again = run(tmp_path / "once", tmp_path / "twice", pattern="2:4", sparsity=None, method="magnitude")
    assert again["sparsity_reached"] >= 0.5
    params = huggingface.load(tmp_path / "twice").params
    kernel = np.asarray(params["block_0"]["mlp"]["up"]["kernel"])
    assert ((kernel.reshape(-1, 4, kernel.shape[1]) != 0).sum(axis=1) <= 2).all()


def test_an_interrupted_compression_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole")
    original, seen = compress.wanda().prune, []

    def stop(kernel, *rest):
        seen.append(kernel.shape)
        if len(seen) == 10:
            raise KeyboardInterrupt
        return original(kernel, *rest)

    monkeypatch.setitem(compress.METHODS, "wanda", lambda: compress.wanda()._replace(prune=stop))
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "part")
    assert not (tmp_path / "part").exists() and (tmp_path / "part.resume").is_dir()
    resumed = run(folder, tmp_path / "part")
    assert len(seen) == 10 + 7  # the second block again, not the first
    assert resumed["after"] == whole["after"] and not (tmp_path / "part.resume").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]


def test_models_of_our_own_go_through_a_folder(tmp_path):
    layers = ({"hidden": 0}, {"heads": 1})
    model = models.build("transformer", 256, **{**ATTRIBUTES, "head_width": 8, "layers": layers})
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    native.save(tmp_path, model, params)
    found, weights = native.load(tmp_path)
    tokens = jnp.arange(16)[None] * 3
    np.testing.assert_array_equal(
        model.apply({"params": params}, tokens), found.apply({"params": weights}, tokens)
    )
    assert compression_session.open_model(tmp_path).model == model
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        native.load(tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder in bfloat16, with shared heads, a tied head, and a tokenizer of its own."""
    model = models.build("transformer", 256, **{**ATTRIBUTES, "hidden": 32}, kv_heads=1, tied=True)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("models") / "small"
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    huggingface.save(path, model, half, {"model_type": "qwen2"})
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


SEARCH = {"method": "magnitude", "generations": 1, "offspring": 2, "stages": ((1, 16),)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes", "kind"),
    [
        ("flap", {"options": {"structures": ["channels"]}}, "sparsejax"),
        ("wanda_sp", {}, "huggingface"),
        ("ziplm", {"options": {"evaluations": 2, "starts": 1, "patience": 1}}, "huggingface"),
        ("slicegpt", {}, "sparsejax"),
        ("gqsa", {"options": {"block_epochs": 0, "epochs": 0}, "format": "auto"}, "huggingface"),
        ("evopress", {"options": SEARCH, "format": "bitmap"}, "huggingface"),
    ],
)
def test_methods_that_see_the_whole_model(small, tmp_path, method, changes, kind):
    summary = run(small, tmp_path / "out", **{"method": method, **changes})
    assert summary["folder"] == kind and 0.3 < summary["sparsity_reached"] < 0.7
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (small / "tokenizer.json").read_text()
    again = compression_session.open_model(tmp_path / "out")
    assert compression.parameters(again.params) == summary["parameters"]
    assert {str(leaf.dtype) for part in again.params for leaf in jax.tree.leaves(again.params[part])} == {
        "bfloat16"
    }
    tokens = compression.read_text(SETTINGS)
    loss = compress.perplexity(again.model, again.params, tokens.held_out, size=tokens.size)
    assert loss["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"library_name: {'transformers' if kind == 'huggingface' else kind}\n" in card
    assert "None" not in card
    if "format" in changes:
        assert summary["packed_bytes"] < summary["dense_bytes"]
    if method not in ("slicegpt", "ziplm"):
        return  # one folder of each kind is enough to compress again
    once_more = run(tmp_path / "out", tmp_path / "more", method="wanda", sparsity=0.75)
    assert once_more["sparsity_reached"] > 0.7  # the floor of what was asked, for every output


def test_a_format_that_does_not_fit_costs_no_model(folder, tmp_path):
    summary = run(folder, tmp_path / "out", format="2:4")
    assert "first violation" in summary["format_error"] or "2:4" in summary["format_error"]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "packed.safetensors").exists()


@pytest.mark.slow
def test_a_row_of_a_table(tmp_path):
    config = tables.override(
        compression.base(), {**compression.QUICK, "decoder.optimizer.warmup_steps": 0, "decoder.steps": 2}
    )
    config = tables.override(config, {"method": "flap", "sparsity": 0.5, "repeats": 2})
    summary = compression.run(config, tmp_path / "row")
    assert summary == json.loads((tmp_path / "row" / "summary.json").read_text())
    assert summary["sparsity"] == pytest.approx(0.5, abs=0.03) and summary["speedup"] > 0
    assert summary["damage"] == summary["bits_per_byte"] - summary["dense_bits_per_byte"]
    assert summary["parameters_left"] < 0.9


def test_bytes_are_their_own_tokens():
    text = "héllo\n\t wörld 123 \U0001f600"
    found = byte_tokenizer().encode(text)
    assert found.ids == list(text.encode())
    assert byte_tokenizer().decode(found.ids) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wonda"}, "unknown method 'wonda'"),
        ({"options": {"scoop": 1}}, "unknown keyword of method 'wanda': 'scoop'"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\), got 1.5"),
        ({"method": "flap", "sparsity": 2.0}, r"sparsity must be in \[0, 1\), got 2.0"),
        ({"method": "flap", "allocation": "owl"}, "flap decides by itself"),
        ({"format": "cssr"}, "unknown format 'cssr' for --format"),
        ({"pattern": "channel"}, "wanda cannot do the pattern channel"),
        ({"allocation": "owls"}, "unknown allocation 'owls'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        (
            {"calibration": {**SETTINGS["calibration"], "length": 64}},
            "length must be from 2 to the model's 32",
        ),
        ({"calibration": {**SETTINGS["calibration"], "corpus": "nowhere"}}, "the corpus 'nowhere'"),
    ],
)
def test_mistakes_leave_nothing_behind(folder, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(folder, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_only_decoders(tmp_path):
    model = models.build("encoder", 0, vocabulary=256, depth=1, width=16, heads=2, hidden=24, max_length=32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    huggingface.save(tmp_path / "bert", model, params, {"model_type": "bert"})
    byte_tokenizer().save(str(tmp_path / "bert" / "tokenizer.json"))
    with pytest.raises(ValueError, match="holds no decoder, which alone has a next token, but Encoder"):
        run(tmp_path / "bert", tmp_path / "out")


@pytest.mark.slow
def test_a_folder_in_the_way_of_finished_blocks_is_kept(folder, tmp_path):
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out.resume' is needed for finished blocks"):
        run(folder, tmp_path / "out")
    run(folder, tmp_path / "out", method="wanda_sp")
    assert (tmp_path / "out.resume" / "mine.txt").read_text() == "mine"


def test_owl_with_patterns(folder, tmp_path):
    summary = run(folder, tmp_path / "out", pattern="4:8", sparsity=None, allocation="owl")
    assert summary["sparsity_reached"] == pytest.approx(0.5, abs=0.1)


def test_an_existing_folder_is_not_touched(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        run(folder, tmp_path)
    with pytest.raises(ValueError, match="holds no config.json"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("value", ["damping", "[1]", "{'a': f()}", "{[1]: 2}", "{1: 2}"])
def test_options_are_dicts(value):
    with pytest.raises(ValueError, match="--options must be a Python dict"):
        command.literal("options", value)
