"""Folders that we write: exact round trips, padding, streaming, and nothing at all when something is wrong."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_folders import (
    DECODERS,
    GOLDEN,
    assert_close,
    assert_identical,
    config,
    expected,
    run,
    tensors,
)

import sparsejax
from sparsejax.interop import native
from sparsejax.interop.huggingface import load, save, writer
from sparsejax.models import Encoder, Transformer, VisionTransformer

FAMILIES = (*DECODERS, "bert", "bert_mlm", "roberta", "roberta_mlm", "minilm", "vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_byte_for_byte(tmp_path, family):
    save(tmp_path / "out", *load(GOLDEN / family))
    assert (tmp_path / "out" / "config.json").read_bytes() == (GOLDEN / family / "config.json").read_bytes()
    assert_identical(tensors(tmp_path / "out"), tensors(GOLDEN / family))
    assert_identical(load(tmp_path / "out").params, load(GOLDEN / family).params)
    if (GOLDEN / family / "model.safetensors").exists():
        written = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert written == (GOLDEN / family / "model.safetensors").read_bytes()


def test_streaming_writes_the_same_in_shards(tmp_path):
    model, params, old = load(GOLDEN / "mixtral", lazy=True)
    with writer(tmp_path / "out", model, old, shard_bytes=30_000) as out:
        for part in reversed(model.parts()):
            out[part] = params[part]
        assert not (tmp_path / "out").exists()
    assert_identical(tensors(tmp_path / "out"), tensors(GOLDEN / "mixtral"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [*files, "config.json", "model.safetensors.index.json"]
    )
    sizes = [tensor.size for tensor in tensors(tmp_path / "out").values()]
    assert index["metadata"] == {"total_parameters": sum(sizes), "total_size": 4 * sum(sizes)}
    assert os.listdir(tmp_path) == ["out"]
    save(tmp_path / "again", model, load(tmp_path / "out", lazy=True).params, old)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (GOLDEN / "mixtral" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dtype_of_the_parameters_is_written(tmp_path, family):
    model, params, old = load(GOLDEN / family, "bfloat16")
    save(tmp_path / "out", model, params, {**old, "torch_dtype": "float32"})
    assert {str(tensor.dtype) for tensor in tensors(tmp_path / "out").values()} == {"bfloat16"}
    dtypes = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert config(tmp_path / "out") == {**config(GOLDEN / family), **dtypes}
    assert_identical(load(tmp_path / "out").params, params)


def test_rotary_positions_are_written_for_older_readers_too(tmp_path):
    model, params, old = load(GOLDEN / "qwen2")
    scaling = {"rope_type": "linear", "factor": 2.0}
    save(tmp_path / "out", model.clone(rotary_scaling=scaling), params, old)
    rope = {"rope_theta": 90.0, "rope_scaling": scaling, "rope_parameters": {**scaling, "rope_theta": 90.0}}
    assert config(tmp_path / "out") == {**old, **rope}
    assert load(tmp_path / "out", lazy=True).model == model.clone(rotary_scaling=scaling)


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    model, params, old = load(GOLDEN / "llama")
    same = model.clone(depth=np.int64(2), rotary_theta=np.float32(60), dtype=jnp.bfloat16)
    save(tmp_path / "out", same, params, {**old, "hidden_size": np.int64(32)})
    assert config(tmp_path / "out") == old
    (tmp_path / "own").mkdir()
    native.save(tmp_path / "own", same, params)
    assert sorted(os.listdir(tmp_path / "own")) == ["config.json", "model.safetensors"]
    assert native.load(tmp_path / "own")[0] == model.clone(dtype="bfloat16")


def test_a_description_that_json_cannot_hold_is_found_out_before_the_work(tmp_path):
    model, params, old = load(GOLDEN / "llama")
    with pytest.raises(TypeError):
        writer(tmp_path / "out", model, {**old, "extra": object()})
    with pytest.raises(TypeError):
        native.save(tmp_path, model.clone(rotary_theta=1e4, dtype=object()), params)
    assert not list(tmp_path.iterdir())


def test_configs_of_our_own_that_lack_something(tmp_path):
    for wrong in ({}, {"attributes": {}}, {"attributes": 3}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "sparsejax", "name": "mlp", **wrong}))
        with pytest.raises(ValueError, match="config.json' must hold attributes with classes, got"):
            native.load(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "sparsejax", "attributes": {"classes": 2}})
    )
    with pytest.raises(ValueError, match="unknown model None"):
        native.load(tmp_path)


def test_small_files_of_the_source_and_the_card(tmp_path):
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "2_Dense").mkdir()
    (source / "0_Transformer").mkdir()
    copied = ("tokenizer.json", "merges.txt", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
    copied += ("1_Pooling/config.json", "2_Dense/model.safetensors")
    for name in (*copied, "README.md", "training_args.bin", "0_Transformer/model.safetensors"):
        (source / name).write_text(name)
    paths = {
        "Transformer": "0_Transformer",
        "Pooling": "1_Pooling",
        "Dense": "2_Dense",
        "Normalize": "3_Normalize",
    }
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in paths.items()]
    modules += [{"path": path, "type": "other"} for path in ("", "..", "../source", str(tmp_path))]
    (source / "modules.json").write_text(json.dumps(modules))
    save(tmp_path / "out", *load(GOLDEN / "minilm"), source=source, card="# Größe\n")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# Größe\n"
    for name in copied:
        assert (tmp_path / "out" / name).read_text() == name
    names = {name.split("/")[0] for name in copied}
    own = {"README.md", "config.json", "model.safetensors", "modules.json"}
    assert set(os.listdir(tmp_path / "out")) == names | own
    (source / "modules.json").write_text("[3]")
    with pytest.raises(ValueError, match="modules.json' is not a list of modules with path and type"):
        save(tmp_path / "other", *load(GOLDEN / "minilm"), source=source)


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    save(tmp_path / "link", *load(GOLDEN / "minilm"))
    assert (tmp_path / "link").is_symlink()
    assert_identical(tensors(tmp_path / "target"), tensors(GOLDEN / "minilm"))


def test_a_finished_folder_that_cannot_get_its_name_is_kept(tmp_path):
    model, params, old = load(GOLDEN / "minilm")
    with (
        pytest.raises(OSError, match=r"the finished folder '.*\.partial' cannot be renamed to '.*out'"),
        writer(tmp_path / "out", model, old) as out,
    ):
        for part in model.parts():
            out[part] = params[part]
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
    (kept,) = tmp_path.glob(".out.*.partial")
    assert_identical(tensors(kept), tensors(GOLDEN / "minilm"))


def shrink(params, sizes, head_width):
    """The parameters of blocks with only some heads, their keys and channels, cut by hand."""
    cut = jax.tree.map(np.asarray, params)
    for i, (kv_heads, group, hidden) in enumerate(sizes):
        attention, mlp = cut[f"block_{i}"].get("attention"), cut[f"block_{i}"]["mlp"]
        all_kv = attention["key"]["kernel"].shape[-1] // head_width
        grid = np.arange(attention["query"]["kernel"].shape[-1]).reshape(all_kv, -1, head_width)
        heads = grid[:kv_heads, :group].ravel()
        keys = np.arange(kv_heads * head_width)
        for name, chosen in (("query", heads), ("key", keys), ("value", keys)):
            attention[name] = {leaf: value[..., chosen] for leaf, value in attention[name].items()}
        attention["out"]["kernel"] = attention["out"]["kernel"][heads]
        for name in {"up", "gate"} & set(mlp):
            mlp[name] = {leaf: value[..., :hidden] for leaf, value in mlp[name].items()}
        mlp["down"]["kernel"] = mlp["down"]["kernel"][:hidden]
    return cut


def layers_of(sizes):
    return tuple(
        {"heads": kv_heads * group, "kv_heads": kv_heads, "hidden": hidden}
        for kv_heads, group, hidden in sizes
    )


def test_uneven_heads_and_channels_are_padded_to_the_same_function(tmp_path):
    model, params, old = load(GOLDEN / "llama")
    sizes = ((2, 1, 24), (1, 2, 13))
    params = shrink(params, sizes, 8)
    model = model.clone(layers=layers_of(sizes))
    save(tmp_path / "out", model, params, old)
    back = load(tmp_path / "out")
    assert (back.model.heads, back.model.kv_heads, back.model.hidden, back.model.layers) == (4, 2, 24, ())
    assert config(tmp_path / "out") == {**old, "intermediate_size": 24}
    tokens = expected("llama")["tokens"]
    shrunk = run(back._replace(model=model, params=params), tokens)
    assert_close(run(back, tokens), shrunk)
    assert np.abs(shrunk - expected("llama")["logits"]).max() > 0.1
    kernel = np.asarray(back.params["block_1"]["attention"]["query"]["kernel"]).reshape(32, 2, 2, 8)
    assert kernel[:, 0].all() and not kernel[:, 1].any()


@pytest.mark.slow
def test_heads_of_gpt2_are_padded_until_they_fill_the_width(tmp_path):
    model, params, old = load(GOLDEN / "gpt2")
    sizes = ((3, 1, 7), (2, 1, 9))
    params = shrink(params, sizes, 8)
    layers = [{"heads": layer["heads"], "hidden": layer["hidden"]} for layer in layers_of(sizes)]
    model = model.clone(layers=tuple(layers))
    save(tmp_path / "out", model, params, old)
    back = load(tmp_path / "out")
    assert (back.model.heads, back.model.hidden) == (4, 9)
    tokens = expected("gpt2")["tokens"]
    assert_close(run(back, tokens), run(back._replace(model=model, params=params), tokens))


def test_blocks_that_are_gone_are_written_as_zeros(tmp_path):
    model, params, old = load(GOLDEN / "mistral")
    model = model.clone(layers=({"heads": 0}, {"heads": 0, "hidden": 0}))
    params = {**params, "block_0": {name: params["block_0"][name] for name in ("mlp", "norm_1")}}
    del params["block_1"]
    save(tmp_path / "out", model, params, old)
    back = load(tmp_path / "out")
    assert not any(leaf.any() for leaf in jax.tree.leaves(back.params["block_1"]["mlp"]))
    tokens = expected("mistral")["tokens"]
    assert_close(run(back, tokens), run(back._replace(model=model, params=params), tokens))


def test_a_bias_switches_on_those_of_its_group(tmp_path):
    model, params, old = load(GOLDEN / "llama_tied")
    bias = jnp.arange(32, dtype=jnp.float32)
    params["block_0"]["mlp"]["down"]["bias"] = bias
    model = model.clone(layers=({"bias": ("down",)}, {}))
    save(tmp_path / "out", model, params, old)
    assert config(tmp_path / "out") == {**old, "mlp_bias": True}
    found = load(tmp_path / "out").params
    np.testing.assert_array_equal(found["block_0"]["mlp"]["down"]["bias"], bias)
    assert (
        not found["block_1"]["mlp"]["down"]["bias"].any() and not found["block_0"]["mlp"]["up"]["bias"].any()
    )


def test_a_model_of_ours_becomes_a_checkpoint_of_gpt2(tmp_path):
    model = Transformer(classes=50, width=16, heads=2, max_length=12)
    tokens = np.arange(10, dtype=np.int32)[None]
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    save(tmp_path / "out", model, params, {"model_type": "gpt2"})
    wanted = {
        "vocab_size": 50,
        "n_embd": 16,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": 12,
        "dtype": "float32",
    }
    wanted |= {"layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "architectures": ["GPT2LMHeadModel"]}
    assert config(tmp_path / "out") == {"model_type": "gpt2", **wanted}
    assert_identical(load(tmp_path / "out").params, params)


def test_packed_kernels_become_dense(tmp_path):
    model, params, old = load(GOLDEN / "llama")
    kernel = params["block_0"]["mlp"]["up"]["kernel"]
    mask = sparsejax.patterns.parse("2:4").mask(jnp.abs(kernel), 0.5)
    params["block_0"]["mlp"]["up"]["kernel"] = sparsejax.formats.pack(kernel, mask, "2:4")
    save(tmp_path / "out", model, params, old)
    found = load(tmp_path / "out").params["block_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(found, jnp.where(mask, kernel, 0))


STREAM = ({"stream": (32, 24, 24)}, {"stream": (24, 24, 32)})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "mistral",
            {"bias": ("down",)},
            "a checkpoint of MistralForCausalLM has no bias of down",
        ),
        (
            "llama",
            {"qk_norm": True},
            "LlamaForCausalLM has no place for the parameter block_0/attention/key_norm/scale",
        ),
        (
            "llama",
            {"layers": STREAM},
            r"block_0 has stream=\(32, 24, 24\), but a checkpoint of LlamaForCausalLM has",
        ),
        ("gpt2", {"norm": "rms"}, r"GPT2LMHeadModel cannot express norm='rms' \(it would mean 'layer'\)"),
        ("gpt2", {"window": 4}, r"GPT2LMHeadModel cannot express window=4 \(it would mean None\)"),
        ("gpt2", {"head_width": 6}, "GPT2LMHeadModel cannot express head_width=6"),
        (
            "gpt2",
            {"linear": {"name": "monarch"}},
            "has no place for the parameter block_0/attention/key/first_kernel",
        ),
        (
            "mixtral",
            {"layers": ({"experts": 3}, {})},
            "block_1 has 4 experts and block_0 3, but a checkpoint of Mix",
        ),
        (
            "bert",
            {"layers": ({}, {"heads": 0})},
            "block_1 has heads=0 and no norm there, but a checkpoint of Bert",
        ),
        ("minilm", {"pool": "mean"}, r"BertModel cannot express pool='mean' \(it would mean None\)"),
        ("minilm", {"types": 0}, "type_vocab_size in the config must be a whole number of at least 1, got 0"),
    ],
)
def test_what_a_family_cannot_express(tmp_path, family, changes, message):
    model, _, old = load(GOLDEN / family, lazy=True)
    with pytest.raises(ValueError, match=message) as caught:
        writer(tmp_path / "out", model.clone(**changes), old)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_bad_calls(tmp_path):
    model, params, old = load(GOLDEN / "llama")

    def refuse(message, folder="out", model=model, params=params, config=old, **keywords):
        before = sorted(tmp_path.rglob("*"))  # without parents that were made for the folder either
        with pytest.raises(ValueError, match=message):
            save(tmp_path / folder, model, params, config, **keywords)
        assert sorted(tmp_path.rglob("*")) == before

    refuse("model_type None is not supported", config={})
    refuse(
        "a checkpoint of BertForMaskedLM needs a model of the class Encoder, got Transformer",
        config={"model_type": "bert"},
    )
    refuse("source 'nowhere' is not a folder", source="nowhere")
    refuse("shard_bytes must be at least 1, got 0", shard_bytes=0)
    refuse("parameters have 'extra', which the model lacks", params={**params, "extra": {}})
    refuse(
        "norm of the model were not written, so there is no folder",
        params={name: part for name, part in params.items() if name != "norm"},
    )
    refuse("norm/scale is missing", params={**params, "norm": {}}, folder="new/parent/out")
    with_bias = {"scale": params["norm"]["scale"], "bias": np.zeros(32)}
    refuse("norm/bias is not a parameter of the model", params={**params, "norm": with_bias})
    refuse(
        r"norm/scale has shape \(3,\), but the model has \(32,\)",
        params={**params, "norm": {"scale": np.ones(3)}},
    )
    refuse("norm/scale has dtype float64, which cannot", params={**params, "norm": {"scale": np.ones(32)}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    refuse("full' exists already; remove it or name another folder", folder="full")
    refuse("file' exists already", folder="full/file")


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    model, params, old = load(GOLDEN / "llama")
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "out", model, old, shard_bytes=1) as out:
        out["embed"] = params["embed"]
        assert [path.name[:5] for path in tmp_path.iterdir()] == [".out."]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(ValueError, match="embed was written already"),
        writer(tmp_path / "out", model, old) as out,
    ):
        out["embed"] = params["embed"]
        out["embed"] = params["embed"]
    with (
        pytest.raises(ValueError, match="unknown part 'blocks'"),
        writer(tmp_path / "out", model, old) as out,
    ):
        out["blocks"] = params["embed"]
    assert not list(tmp_path.iterdir())


def test_a_vit_of_ours_needs_the_size_of_its_images(tmp_path):
    model = VisionTransformer(classes=3, patch=4, width=16, depth=1, heads=2, pool="token")
    params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 8, 8, 3)))["params"]
    with pytest.raises(ValueError, match=r"for images of 224x224 pixels \(image_size in the config\)"):
        save(tmp_path / "out", model, params, {"model_type": "vit"})
    save(tmp_path / "out", model, params, {"model_type": "vit", "image_size": 8})
    back = load(tmp_path / "out")
    assert_identical(back.params, params)
    assert (back.model.classes, back.model.hidden) == (3, 64)


def test_an_encoder_of_ours_becomes_a_checkpoint_of_bert(tmp_path):
    model = Encoder(classes=0, vocabulary=50, width=16, heads=2, max_length=12, epsilon=1e-6)
    params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    save(tmp_path / "out", model, params, {"model_type": "bert"})
    assert config(tmp_path / "out")["pad_token_id"] is None
    back = load(tmp_path / "out").model
    assert (back.width, back.hidden, back.heads, back.classes, back.vocabulary) == (16, 64, 2, 0, 50)
    assert_identical(load(tmp_path / "out").params, params)
