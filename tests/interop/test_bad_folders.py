"""What is wrong with a folder is one sentence that names it."""

import json
import shutil

import numpy as np
import pytest
from golden_folders import GOLDEN, edit, tensors

from sparsejax.interop.huggingface import load

NAME = "model.layers.1.self_attn.k_proj.weight"


def refuse(folder, message, **keywords):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, **keywords)
    assert "\n" not in str(caught.value)


def test_folders_without_config_or_weights(tmp_path):
    refuse(tmp_path, "holds no config.json")
    refuse(tmp_path / "nowhere", "nowhere' holds no config.json$")
    refuse(
        "who/gpt2",
        r"holds no config.json \(Hub names are not downloaded; hf download who/gpt2 --local-dir gpt2\)",
    )
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    refuse(tmp_path, "holds no weights: neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").touch()
    refuse(
        tmp_path, r"index.json \(pytorch_model.bin needs PyTorch: load it there and save_pretrained once\)"
    )
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path, "config.json' is not a JSON file: ")
    (tmp_path / "config.json").write_text("[]")
    refuse(tmp_path, "config.json' must hold a JSON object, but it holds a list")


def test_unsupported_architectures_and_dtypes(tmp_path):
    known = "bert, gpt2, llama, mistral, mixtral, opt, qwen2, qwen3, roberta, vit"
    refuse(
        edit(tmp_path, "llama", {"model_type": "mamba"}),
        rf"model_type 'mamba' is not supported \(supported: {known}\)",
    )
    refuse(GOLDEN / "llama", r"unknown dtype 'int8' \(known: bfloat16, float16, float32\)", dtype="int8")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True is not supported",
        ),
        (
            "opt",
            {"do_layer_norm_before": False},
            "OPTForCausalLM with do_layer_norm_before=False is not supported",
        ),
        ("opt", {"word_embed_proj_dim": 16}, r"word_embed_proj_dim=16 is not supported \(only 32\)"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not",
        ),
        ("roberta", {"pad_token_id": 0}, r"pad_token_id=0 is not supported \(only 1\)"),
        ("llama", {"hidden_act": "mish"}, "unknown hidden_act 'mish'"),
        (
            "llama",
            {"hidden_size": "32"},
            "hidden_size in the config must be a whole number of at least 1, got '32'",
        ),
        (
            "llama",
            {"num_hidden_layers": True},
            "num_hidden_layers .* must be a whole number of at least 1, got True",
        ),
        (
            "llama",
            {"rms_norm_eps": None},
            "rms_norm_eps in the config must be a number of at least 0, got None",
        ),
        (
            "llama",
            {"tie_word_embeddings": "no"},
            "tie_word_embeddings in the config must be true or false, got 'no'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "unknown rope_type 'yarn'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config are not supported"),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "a sliding window in only some of the blocks",
        ),
        ("llama", {"num_attention_heads": 5, "head_dim": 8}, "kv_heads=2 .* must divide its heads=5"),
        ("gpt2", {"is_causal": False}, r"is_causal=False is not supported \(only True\)"),
        ("qwen3", {"is_causal": False}, r"is_causal=False is not supported \(only True\)"),
        ("roberta_mlm", {"hidden_act": "relu"}, r"hidden_act='relu' is not supported \(only 'gelu'\)"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ("llama", {"attention_bias": "false"}, "attention_bias .* must be true or false, got 'false'"),
        ("llama", {"rope_scaling": "linear"}, "must be one mapping for all layers, got 'linear'"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "must be one mapping for all layers"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": None}},
            "factor .* positive number, got None",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor .* positive number, got 0",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8,
                }
            },
            "low_freq_factor=4.0 must be less than high_freq_factor=4.0",
        ),
        *(
            ("qwen2", {"rope_parameters": "absent", "rope_theta": theta}, f"positive number, got {theta!r}")
            for theta in (None, "1e4", -5, 0)
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": "5"},
            "sliding_window .* whole number of at least 1, got '5'",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": "absent",
                "max_window_layers": None,
            },
            "max_window_layers .* whole number of at least 0, got None",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"]},
            "layer_types in the config must be a list of 2 names",
        ),
        ("bert_ner", {"id2label": 3}, "id2label .* must map numbers to labels, got 3"),
        ("vit", {"image_size": "x"}, "image_size .* must be one or two positive numbers .* got 'x'"),
    ],
)
def test_configs_that_our_models_cannot_follow(tmp_path, family, changes, message):
    refuse(edit(tmp_path, family, changes), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(NAME), f"the tensor {NAME} is missing in '.*llama'"),
        (
            lambda found: found.update({"model.layers.2.mlp.up_proj.weight": found[NAME]}),
            "model.safetensors holds the tensor model.layers.2.mlp.up_proj.weight, which LlamaForCausalLM with this",
        ),
        (
            lambda found: found.update({NAME: found[NAME].astype(np.int8)}),
            f"the tensor {NAME} is of dtype I8, but must be of BF16, F16, F32",
        ),
        (
            lambda found: found.update({NAME: found[NAME].T.copy()}),
            rf"the tensor {NAME} has shape \(32, 16\), but config.json asks for \(16, 32\)",
        ),
    ],
    ids=["missing", "extra", "dtype", "shape"],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_tensors_that_do_not_fit(tmp_path, change, message, lazy):
    def changed(found):
        change(found)
        return found

    refuse(edit(tmp_path, "llama", change_tensors=changed), message, lazy=lazy)


def test_shapes_of_fused_and_stacked_tensors(tmp_path):
    def widen(name):
        return lambda found: found | {name: np.zeros((4, 4), np.float32)}

    name = "transformer.h.0.attn.c_attn.weight"
    refuse(edit(tmp_path, "gpt2", change_tensors=widen(name)), rf"{name} has shape .* asks for \(32, 96\)")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    refuse(edit(tmp_path, "mixtral", change_tensors=widen(name)), rf"{name} has shape .* asks for \(32, 20\)")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    refuse(
        edit(tmp_path, "vit", change_tensors=widen(name)), rf"{name} has shape .* asks for \(32, 3, 4, 4\)"
    )


def test_two_tensors_of_one_parameter(tmp_path):
    def twice(found):
        return found | {
            "model.norm.weight": found["model.norm.weight"],
            "norm.weight": np.ones(32, np.float32),
        }

    refuse(
        edit(tmp_path, "llama", change_tensors=twice),
        "llama' holds both (model.norm.weight and norm.weight|norm.weight and model.norm.weight), which name",
    )


@pytest.mark.parametrize("cut", [0, 3, 500, -10])
def test_damaged_files(tmp_path, cut):
    folder = edit(tmp_path, "llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])
    refuse(folder, "llama/model.safetensors' is not a sound safetensors file: ")


def test_indices_that_do_not_fit(tmp_path):
    folder = edit(tmp_path, "qwen2")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def write(weight_map):
        path.write_text(json.dumps({"weight_map": weight_map}))

    name, file = "model.norm.weight", index["weight_map"]["model.norm.weight"]
    write({**index["weight_map"], "model.other.weight": file})
    refuse(folder, f"model.safetensors.index.json says that model.other.weight is in {file}, but it is not")
    write({**index["weight_map"], name: "../model.safetensors"})
    refuse(folder, "model.safetensors.index.json names '../model.safetensors', which is not in '.*qwen2'")
    write([name])
    refuse(folder, "index.json' has no weight_map from tensors to files")
    write(index["weight_map"])
    assert set(tensors(folder)) == set(index["weight_map"])
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, "names 'model-00002-of-00003.safetensors', which is not in '.*qwen2'")
