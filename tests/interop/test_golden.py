"""Every family against transformers' own outputs, and the ways to read a folder against each other."""

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
    edit,
    expected,
    run,
    tensors,
)

from sparsejax.interop.huggingface import load, save
from sparsejax.interop.tensors import Files
from sparsejax.models import generate


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_reproduce_the_logits_of_transformers(family):
    wanted = expected(family)
    assert_close(run(load(GOLDEN / family, "float32"), wanted["tokens"]), wanted["logits"])


@pytest.mark.parametrize("family", ["bert", "roberta", "minilm"])
def test_encoders_reproduce_the_hidden_states_of_transformers(family):
    wanted = expected(family)
    inputs = [wanted[name] for name in ("tokens", "types", "mask")]
    checkpoint = load(GOLDEN / family)
    assert_close(run(checkpoint, *inputs, method="encode"), wanted["hidden"])
    assert checkpoint.model.pooler == ("pooled" in wanted)
    if "pooled" in wanted:
        outputs = run(checkpoint, wanted["tokens"], types=wanted["types"], mask=wanted["mask"])
        assert_close(outputs, wanted["pooled"])


def test_vision_transformers_reproduce_the_logits_of_transformers():
    wanted = expected("vit")
    assert_close(run(load(GOLDEN / "vit"), wanted["images"]), wanted["logits"])


@pytest.mark.parametrize("family", ["mistral", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_generation_with_a_cache_is_that_of_transformers(family):
    wanted, checkpoint = expected(family), load(GOLDEN / family)
    length = wanted["tokens"].shape[1]
    with jax.default_matmul_precision("highest"):
        found = generate(checkpoint.model, checkpoint.params, wanted["tokens"], wanted["generated"].shape[1])
    np.testing.assert_array_equal(found[:, :length], wanted["tokens"])
    np.testing.assert_array_equal(found[:, length:], wanted["generated"])


def test_tensors_keep_their_dtype_unless_another_is_asked_for():
    for family, dtype in (("llama", "float32"), ("qwen3", "bfloat16")):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(load(GOLDEN / family).params)} == {dtype}
    stored, small = load(GOLDEN / "llama").params, load(GOLDEN / "llama", "bfloat16")
    assert_identical(small.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stored))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])
def test_lazy_parameters_are_the_same_and_read_one_part(family, monkeypatch):
    eager, lazy = load(GOLDEN / family), load(GOLDEN / family, lazy=True)
    assert tuple(lazy.params) == eager.model.parts() and len(lazy.params) == len(eager.params)
    assert_identical(dict(lazy.params), eager.params)
    read, names = Files.read, []
    monkeypatch.setattr(Files, "read", lambda self, name, part: names.append(name) or read(self, name, part))
    lazy.params["block_1"]
    assert names and all(".1." in name for name in names)
    with pytest.raises(ValueError, match="unknown part 'block_2'.*block_1"):
        lazy.params["block_2"]


def test_older_files_of_gpt2_have_no_prefix_but_buffers(tmp_path):
    def older(found):
        found = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
        return found | {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.float32)}

    folder = edit(tmp_path, "gpt2", change_tensors=older)
    assert_identical(load(folder).params, load(GOLDEN / "gpt2").params)


def test_older_configs_say_rope_theta_and_rope_scaling(tmp_path):
    rope = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = edit(tmp_path, "llama", {"rope_parameters": "absent", "rope_theta": 60.0, "rope_scaling": rope})
    assert load(folder).model == load(GOLDEN / "llama").model
    folder = edit(tmp_path, "qwen2", {"rope_parameters": "absent", "rope_theta": 90.0})
    assert load(folder).model == load(GOLDEN / "qwen2").model


def test_a_tied_head_may_be_stored_too(tmp_path):
    def store(found):
        return found | {"lm_head.weight": found["model.embed_tokens.weight"]}

    folder = edit(tmp_path, "llama_tied", change_tensors=store)
    assert_identical(load(folder).params, load(GOLDEN / "llama_tied").params)


def test_a_tied_head_may_stand_for_the_embedding(tmp_path):
    def store(found):
        inverse = {"model.rotary_emb.inv_freq": np.ones(4, np.float32)}  # a buffer of older versions
        return found | {"lm_head.weight": found.pop("model.embed_tokens.weight")} | inverse

    folder = edit(tmp_path, "llama_tied", change_tensors=store)
    assert_identical(load(folder).params, load(GOLDEN / "llama_tied").params)


def test_dynamic_scaling_is_none_within_the_longest_sequence(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 90.0, "factor": 2.0, "partial_rotary_factor": None}
    checkpoint = load(edit(tmp_path, "qwen2", {"rope_parameters": dynamic}), lazy=True)
    assert checkpoint.model.rotary_scaling["rope_type"] == "dynamic"
    np.testing.assert_array_equal(checkpoint.model._rates(), load(GOLDEN / "qwen2", lazy=True).model._rates())


def test_code_that_a_config_names_is_not_run(tmp_path, caplog):
    load(edit(tmp_path, "llama", {"auto_map": {"AutoModel": "modeling.Other"}}), lazy=True)
    assert "the code that auto_map names is not run" in caplog.text


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, 5),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": "absent",
                "max_window_layers": 0,
            },
            5,
        ),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": "absent"}, None),
        ({"use_sliding_window": False, "sliding_window": 5, "layer_types": "absent"}, None),
    ],
)
def test_sliding_windows_of_qwen(tmp_path, changes, window):
    assert load(edit(tmp_path, "qwen2", changes), lazy=True).model.window == window


def test_old_files_of_bert_say_gamma_and_beta(tmp_path):
    def older(found):
        names = {
            name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            for name in found
        }
        old = {"bert." + names[name]: tensor for name, tensor in found.items()}
        return old | {"bert.embeddings.position_ids": np.arange(24)[None]}

    folder = edit(tmp_path, "bert", change_tensors=older)
    assert_identical(load(folder).params, load(GOLDEN / "bert").params)


@pytest.mark.parametrize("family", ["bert_mlm", "bert_ner", "roberta_mlm"])
def test_heads_reproduce_the_logits_of_transformers(family):
    """The file of `bert_ner` holds a pooler too, and the masks hide a token that is no padding."""
    wanted, checkpoint = expected(family), load(GOLDEN / family)
    assert not checkpoint.model.pooler and checkpoint.model.pool is None
    outputs = run(checkpoint, wanted["tokens"], types=wanted["types"], mask=wanted["mask"])
    assert_close(outputs, wanted["logits"])


def test_encoders_with_a_head_for_labels(tmp_path):
    def classify(found):
        found = {"bert." + name: tensor for name, tensor in found.items()}
        return found | {
            "classifier.weight": np.ones((3, 32), np.float32),
            "classifier.bias": np.ones(3, np.float32),
        }

    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    architectures = {"architectures": ["BertForSequenceClassification"]}
    folder = edit(tmp_path, "bert", labels | architectures, classify)
    model, params, old = load(folder)
    assert (model.classes, model.pool, model.pooler) == (3, "first", True)
    save(tmp_path / "again", model, params, old)
    assert_identical(tensors(tmp_path / "again"), tensors(folder))
    assert config(tmp_path / "again") == config(folder)
    (tmp_path / "2").mkdir()
    other = edit(tmp_path / "2", "bert", labels | {"architectures": ["BertForTokenClassification"]}, classify)
    model = load(other).model  # the tensors alone would fit the other class too
    assert (model.classes, model.pool, model.pooler) == (3, None, False)
    (tmp_path / "3").mkdir()
    body = load(edit(tmp_path / "3", "bert", labels, classify))  # its config names a BertModel
    assert (body.model.classes, body.model.pooler) == (0, True)
    assert_identical(body.params, load(GOLDEN / "bert").params)


def test_vision_transformers_without_a_head_give_the_state_of_the_class_token(tmp_path):
    def body(found):
        return {
            name.removeprefix("vit."): tensor for name, tensor in found.items() if "classifier" not in name
        }

    folder = edit(tmp_path, "vit", {"architectures": ["ViTModel"]}, body)
    checkpoint, wanted = load(folder), expected("vit")
    state = run(checkpoint, wanted["images"])
    head = load(GOLDEN / "vit").params["head"]
    assert_close(state @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), wanted["logits"])
    save(tmp_path / "again", *checkpoint)
    assert_identical(tensors(tmp_path / "again"), tensors(folder))
    assert config(tmp_path / "again") == config(folder)


def test_heads_that_our_encoders_lack_are_left_out_with_a_warning(tmp_path, caplog):
    def answer(found):
        found = {"bert." + name: tensor for name, tensor in found.items()}
        return found | {"qa_outputs.weight": np.ones((2, 32), np.float32)}

    checkpoint = load(edit(tmp_path, "bert", change_tensors=answer))
    assert "qa_outputs.weight: not in Encoder, left out" in caplog.text
    assert_identical(checkpoint.params, load(GOLDEN / "bert").params)
