"""The tables of the decoders: GPT-2, OPT, and Llama with those that follow it."""

from sparsejax.interop.family import ALL, ATTENTION, QKV, Bias, Family, Key, Same, Variant, activation, sizes
from sparsejax.models.transformer import Transformer

_CAUSAL = {"is_causal": True}  # false in embedding models, whose tokens see those after them too

GPT2 = Family(
    model=Transformer,
    variants=(Variant("GPT2LMHeadModel", "transformer."),),
    keys={
        "classes": Key("vocab_size", 50257),
        "depth": Key("n_layer", 12),
        "width": Key("n_embd", 768),
        "heads": Key("n_head", 12),
        "hidden": Key("n_inner", None),
        "max_length": Key("n_positions", 1024),
        "epsilon": Key("layer_norm_epsilon", 1e-5),
        "activation": activation("activation_function", "gelu_new"),
        "tied": Key("tie_word_embeddings", True),
    },
    fixed={"norm": "layer", "positions": "learned"},
    bias=(Bias(ALL),),
    requires={
        **_CAUSAL,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    tensors={
        "embed": "wte",
        "positions": "wpe",
        "block_{i}/norm_0": "h.{i}.ln_1",
        "block_{i}/attention/query": "h.{i}.attn.c_attn[0/3]",
        "block_{i}/attention/key": "h.{i}.attn.c_attn[1/3]",
        "block_{i}/attention/value": "h.{i}.attn.c_attn[2/3]",
        "block_{i}/attention/out": "h.{i}.attn.c_proj",
        "block_{i}/norm_1": "h.{i}.ln_2",
        "block_{i}/mlp/up": "h.{i}.mlp.c_fc",
        "block_{i}/mlp/down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
        "head": "lm_head",
    },
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    kernels="same",
    layouts={"head": "linear"},
)

OPT = Family(
    model=Transformer,
    variants=(Variant("OPTForCausalLM", "model."),),
    keys={
        **sizes(50272, 12, 768, 12, 3072, 2048),
        "hidden": Key("ffn_dim", 3072),
        "activation": activation("activation_function", "relu"),
        "tied": Key("tie_word_embeddings", True),
    },
    fixed={"norm": "layer", "positions": "learned", "position_offset": 2, "epsilon": 1e-5},
    bias=(Bias(ALL, "enable_bias"),),
    requires={
        **_CAUSAL,
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": Same("hidden_size"),
    },
    tensors={
        "embed": "decoder.embed_tokens",
        "positions": "decoder.embed_positions",
        "block_{i}/norm_0": "decoder.layers.{i}.self_attn_layer_norm",
        "block_{i}/attention/query": "decoder.layers.{i}.self_attn.q_proj",
        "block_{i}/attention/key": "decoder.layers.{i}.self_attn.k_proj",
        "block_{i}/attention/value": "decoder.layers.{i}.self_attn.v_proj",
        "block_{i}/attention/out": "decoder.layers.{i}.self_attn.out_proj",
        "block_{i}/norm_1": "decoder.layers.{i}.final_layer_norm",
        "block_{i}/mlp/up": "decoder.layers.{i}.fc1",
        "block_{i}/mlp/down": "decoder.layers.{i}.fc2",
        "norm": "decoder.final_layer_norm",
        "head": "lm_head",
    },
)

_LLAMA_ATTENTION = {
    "embed": "embed_tokens",
    "block_{i}/norm_0": "layers.{i}.input_layernorm",
    "block_{i}/attention/query": "layers.{i}.self_attn.q_proj",
    "block_{i}/attention/key": "layers.{i}.self_attn.k_proj",
    "block_{i}/attention/value": "layers.{i}.self_attn.v_proj",
    "block_{i}/attention/out": "layers.{i}.self_attn.o_proj",
    "block_{i}/norm_1": "layers.{i}.post_attention_layernorm",
    "norm": "norm",
    "head": "lm_head",
}
_LLAMA_TENSORS = {
    **_LLAMA_ATTENTION,
    "block_{i}/mlp/up": "layers.{i}.mlp.up_proj",
    "block_{i}/mlp/gate": "layers.{i}.mlp.gate_proj",
    "block_{i}/mlp/down": "layers.{i}.mlp.down_proj",
}
_ROTARY = {"norm": "rms", "positions": "rotary", "gated": True}
_BUFFERS = ("*rotary_emb.inv_freq",)


def _grouped(kv_heads, epsilon=1e-6, head_width=None) -> dict[str, Key]:
    """The keys that the followers of Llama share."""
    return {
        "kv_heads": Key("num_key_value_heads", kv_heads, is_optional=True),
        "head_width": Key("head_dim", head_width, is_optional=True),
        "epsilon": Key("rms_norm_eps", epsilon),
        "activation": activation("hidden_act", "silu"),
        "tied": Key("tie_word_embeddings", False),
    }


LLAMA = Family(
    model=Transformer,
    variants=(Variant("LlamaForCausalLM", "model."),),
    keys={**sizes(32000, 32, 4096, 32, 11008, 2048), **_grouped(None)},
    fixed=_ROTARY,
    bias=(
        Bias(ATTENTION, "attention_bias", False),
        Bias(("up", "gate", "down"), "mlp_bias", False),
    ),
    requires=_CAUSAL,
    tensors=_LLAMA_TENSORS,
    ignored=_BUFFERS,
    theta=1e4,
)

MISTRAL = Family(
    model=Transformer,
    variants=(Variant("MistralForCausalLM", "model."),),
    keys={
        **sizes(32000, 32, 4096, 32, 14336, 131072),
        **_grouped(8),
        "window": Key("sliding_window", 4096, is_optional=True),
    },
    fixed=_ROTARY,
    requires=_CAUSAL,
    tensors=_LLAMA_TENSORS,
    ignored=_BUFFERS,
    theta=1e4,
)

QWEN2 = Family(
    model=Transformer,
    variants=(Variant("Qwen2ForCausalLM", "model."),),
    keys={**sizes(151936, 32, 4096, 32, 22016, 32768), **_grouped(32)},
    fixed=_ROTARY,
    bias=(Bias(QKV),),
    requires=_CAUSAL,
    tensors=_LLAMA_TENSORS,
    ignored=_BUFFERS,
    theta=1e4,
    layered_window=True,
)

QWEN3 = QWEN2._replace(
    variants=(Variant("Qwen3ForCausalLM", "model."),),
    keys={**sizes(151936, 32, 4096, 32, 22016, 32768), **_grouped(32, head_width=128)},
    fixed={**_ROTARY, "qk_norm": True},
    bias=(Bias(ATTENTION, "attention_bias", False),),
    tensors={
        **_LLAMA_TENSORS,
        "block_{i}/attention/query_norm": "layers.{i}.self_attn.q_norm",
        "block_{i}/attention/key_norm": "layers.{i}.self_attn.k_norm",
    },
)

MIXTRAL = Family(
    model=Transformer,
    variants=(Variant("MixtralForCausalLM", "model."),),
    keys={
        **sizes(32000, 32, 4096, 32, 14336, 131072),
        **_grouped(8, epsilon=1e-5),
        "window": Key("sliding_window", None),
        "experts": Key("num_local_experts", 8),
        "experts_per_token": Key("num_experts_per_tok", 2),
    },
    fixed=_ROTARY,
    requires=_CAUSAL,
    tensors={
        **_LLAMA_ATTENTION,
        "block_{i}/mlp/router": "layers.{i}.block_sparse_moe.gate",
        "block_{i}/mlp/gate": "layers.{i}.block_sparse_moe.experts.{e}.w1",
        "block_{i}/mlp/down": "layers.{i}.block_sparse_moe.experts.{e}.w2",
        "block_{i}/mlp/up": "layers.{i}.block_sparse_moe.experts.{e}.w3",
    },
    ignored=_BUFFERS,
    theta=1e6,
)
