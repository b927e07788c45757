"""The supported families of Hugging Face models: what their configs say and how their tensors are called.

A family is one table, read in both directions. `keys` links attributes of our models to entries of `config.json`
(with the value that transformers assumes for a missing entry), `fixed` holds the attributes that the family
implies, `requires` the entries that have to have one value, because ours know no other. `tensors` links modules
of our parameter tree to modules of the checkpoint: `{i}` is the block, `{e}` the expert (whose tensors ours
stacks), and `[1/3]` the second of three equal parts of the columns of a fused tensor. A leaf's own name follows
from its kind: `kernel`, `scale` and `embedding` are called `weight` there, `bias` is `bias`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sparsejax.models.transformer import Transformer

ACTIVATIONS = {  # theirs -> ours; the first of several names is the one that is written
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
QKV = ("query", "key", "value")
ATTENTION = (*QKV, "out")
ALL = (*ATTENTION, "up", "down")
TOPS = ("lm_head.", "classifier.")  # modules that never carry the prefix


class Key(NamedTuple):
    """An entry of a config.

    Attributes:
      name: of the entry.
      default: what transformers takes if it is missing.
      values: our names of their values, None if they are the same.
      is_optional: whether null is allowed; it is where that is the default.
    """

    name: str
    default: Any
    values: Mapping[str, str] | None = None
    is_optional: bool = False


class Bias(NamedTuple):
    """Projections that have a bias if the entry `switch` of the config says so (None: always)."""

    names: tuple[str, ...]
    switch: str | None = None
    default: bool = True


class Same(NamedTuple):
    """The value of another entry, in `Family.requires`."""

    name: str


def _tokens(config: Mapping) -> tuple:
    return (1, 1), "int32"


class Family(NamedTuple):
    """One model type; see the module.

    Attributes:
      model: the class of our model.
      architecture: what `architectures` of a written config names.
      keys, fixed, requires, tensors: see the module; a value of `requires` is the allowed one, or a `Same`.
      bias: which projections have one.
      prefix: beginning of the names in files of the whole model, but not in those of its body alone.
      optional: attributes that are True if the checkpoint has a tensor of this name.
      example: shape and dtype of an input, for a config.
      ignored: shell patterns of tensors that hold no parameters: buffers of older versions.
      heads: shell patterns of tensors of task heads that our model lacks: left out, with a warning.
      kernels: how kernels lie in the file: `linear` (out, in), `same` (in, out), as in GPT-2, or `patches`
        (out, channels, rows, columns); `layouts` names the modules whose kernel lies otherwise.
      theta: the default base of rotary positions, None for a family without them.
      layered_window: whether `layer_types` and `max_window_layers` say which blocks have a sliding window.
    """

    model: type
    architecture: str
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]
    tensors: Mapping[str, str]
    bias: tuple[Bias, ...] = ()
    requires: Mapping[str, Any] = {}
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kernels: str = "linear"
    layouts: Mapping[str, str] = {}
    theta: float | None = None
    layered_window: bool = False
    optional: Mapping[str, str] = {}
    example: Callable[[Mapping], tuple] = _tokens

    def canonical(self, name: str) -> str:
        """The name that `tensors` has for a tensor of a file with or without the prefix."""
        if not any(known.startswith(self.prefix) for known in self.tensors.values()):
            return name.removeprefix(self.prefix)
        return name if name.startswith((self.prefix, *TOPS)) else self.prefix + name


def _sizes(classes, depth, width, heads, hidden, length) -> dict[str, Key]:
    """The keys that most configs share, with their defaults."""
    return {
        "classes": Key("vocab_size", classes),
        "depth": Key("num_hidden_layers", depth),
        "width": Key("hidden_size", width),
        "heads": Key("num_attention_heads", heads),
        "hidden": Key("intermediate_size", hidden),
        "max_length": Key("max_position_embeddings", length),
    }


GPT2 = Family(
    model=Transformer,
    architecture="GPT2LMHeadModel",
    keys={
        "classes": Key("vocab_size", 50257),
        "depth": Key("n_layer", 12),
        "width": Key("n_embd", 768),
        "heads": Key("n_head", 12),
        "hidden": Key("n_inner", None),
        "max_length": Key("n_positions", 1024),
        "epsilon": Key("layer_norm_epsilon", 1e-5),
        "activation": Key("activation_function", "gelu_new", ACTIVATIONS),
        "tied": Key("tie_word_embeddings", True),
    },
    fixed={"norm": "layer", "positions": "learned"},
    bias=(Bias(ALL),),
    requires={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    tensors={
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "block_{i}/norm_0": "transformer.h.{i}.ln_1",
        "block_{i}/attention/query": "transformer.h.{i}.attn.c_attn[0/3]",
        "block_{i}/attention/key": "transformer.h.{i}.attn.c_attn[1/3]",
        "block_{i}/attention/value": "transformer.h.{i}.attn.c_attn[2/3]",
        "block_{i}/attention/out": "transformer.h.{i}.attn.c_proj",
        "block_{i}/norm_1": "transformer.h.{i}.ln_2",
        "block_{i}/mlp/up": "transformer.h.{i}.mlp.c_fc",
        "block_{i}/mlp/down": "transformer.h.{i}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    prefix="transformer.",
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    kernels="same",
    layouts={"head": "linear"},
)

OPT = Family(
    model=Transformer,
    architecture="OPTForCausalLM",
    keys={
        **_sizes(50272, 12, 768, 12, 3072, 2048),
        "hidden": Key("ffn_dim", 3072),
        "activation": Key("activation_function", "relu", ACTIVATIONS),
        "tied": Key("tie_word_embeddings", True),
    },
    fixed={"norm": "layer", "positions": "learned", "position_offset": 2, "epsilon": 1e-5},
    bias=(Bias(ALL, "enable_bias"),),
    requires={
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": Same("hidden_size"),
    },
    tensors={
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "block_{i}/norm_0": "model.decoder.layers.{i}.self_attn_layer_norm",
        "block_{i}/attention/query": "model.decoder.layers.{i}.self_attn.q_proj",
        "block_{i}/attention/key": "model.decoder.layers.{i}.self_attn.k_proj",
        "block_{i}/attention/value": "model.decoder.layers.{i}.self_attn.v_proj",
        "block_{i}/attention/out": "model.decoder.layers.{i}.self_attn.out_proj",
        "block_{i}/norm_1": "model.decoder.layers.{i}.final_layer_norm",
        "block_{i}/mlp/up": "model.decoder.layers.{i}.fc1",
        "block_{i}/mlp/down": "model.decoder.layers.{i}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
    prefix="model.",
)

_LLAMA_ATTENTION = {
    "embed": "model.embed_tokens",
    "block_{i}/norm_0": "model.layers.{i}.input_layernorm",
    "block_{i}/attention/query": "model.layers.{i}.self_attn.q_proj",
    "block_{i}/attention/key": "model.layers.{i}.self_attn.k_proj",
    "block_{i}/attention/value": "model.layers.{i}.self_attn.v_proj",
    "block_{i}/attention/out": "model.layers.{i}.self_attn.o_proj",
    "block_{i}/norm_1": "model.layers.{i}.post_attention_layernorm",
    "norm": "model.norm",
    "head": "lm_head",
}
_LLAMA_TENSORS = {
    **_LLAMA_ATTENTION,
    "block_{i}/mlp/up": "model.layers.{i}.mlp.up_proj",
    "block_{i}/mlp/gate": "model.layers.{i}.mlp.gate_proj",
    "block_{i}/mlp/down": "model.layers.{i}.mlp.down_proj",
}
_ROTARY = {"norm": "rms", "positions": "rotary", "gated": True}
_BUFFERS = ("*.rotary_emb.inv_freq",)


def _grouped(kv_heads, epsilon=1e-6, head_width=None) -> dict[str, Key]:
    """The keys that the followers of Llama share."""
    return {
        "kv_heads": Key("num_key_value_heads", kv_heads, is_optional=True),
        "head_width": Key("head_dim", head_width, is_optional=True),
        "epsilon": Key("rms_norm_eps", epsilon),
        "activation": Key("hidden_act", "silu", ACTIVATIONS),
        "tied": Key("tie_word_embeddings", False),
    }


LLAMA = Family(
    model=Transformer,
    architecture="LlamaForCausalLM",
    keys={**_sizes(32000, 32, 4096, 32, 11008, 2048), **_grouped(None)},
    fixed=_ROTARY,
    bias=(
        Bias(ATTENTION, "attention_bias", False),
        Bias(("up", "gate", "down"), "mlp_bias", False),
    ),
    tensors=_LLAMA_TENSORS,
    ignored=_BUFFERS,
    theta=1e4,
)

MISTRAL = Family(
    model=Transformer,
    architecture="MistralForCausalLM",
    keys={
        **_sizes(32000, 32, 4096, 32, 14336, 131072),
        **_grouped(8),
        "window": Key("sliding_window", 4096, is_optional=True),
    },
    fixed=_ROTARY,
    tensors=_LLAMA_TENSORS,
    ignored=_BUFFERS,
    theta=1e4,
)

QWEN2 = Family(
    model=Transformer,
    architecture="Qwen2ForCausalLM",
    keys={**_sizes(151936, 32, 4096, 32, 22016, 32768), **_grouped(32)},
    fixed=_ROTARY,
    bias=(Bias(QKV),),
    tensors=_LLAMA_TENSORS,
    ignored=_BUFFERS,
    theta=1e4,
    layered_window=True,
)

QWEN3 = QWEN2._replace(
    architecture="Qwen3ForCausalLM",
    keys={**_sizes(151936, 32, 4096, 32, 22016, 32768), **_grouped(32, head_width=128)},
    fixed={**_ROTARY, "qk_norm": True},
    bias=(Bias(ATTENTION, "attention_bias", False),),
    tensors={
        **_LLAMA_TENSORS,
        "block_{i}/attention/query_norm": "model.layers.{i}.self_attn.q_norm",
        "block_{i}/attention/key_norm": "model.layers.{i}.self_attn.k_norm",
    },
)

MIXTRAL = Family(
    model=Transformer,
    architecture="MixtralForCausalLM",
    keys={
        **_sizes(32000, 32, 4096, 32, 14336, 131072),
        **_grouped(8, epsilon=1e-5),
        "window": Key("sliding_window", None),
        "experts": Key("num_local_experts", 8),
        "experts_per_token": Key("num_experts_per_tok", 2),
    },
    fixed=_ROTARY,
    tensors={
        **_LLAMA_ATTENTION,
        "block_{i}/mlp/router": "model.layers.{i}.block_sparse_moe.gate",
        "block_{i}/mlp/gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "block_{i}/mlp/down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
        "block_{i}/mlp/up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    },
    ignored=_BUFFERS,
    theta=1e6,
)

FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "opt": OPT,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
