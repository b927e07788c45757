"""The supported families by `model_type`."""

from sparsejax.interop.decoders import GPT2, LLAMA, MISTRAL, MIXTRAL, OPT, QWEN2, QWEN3
from sparsejax.interop.encoders import BERT, ROBERTA, VIT

FAMILIES = {
    "bert": BERT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "opt": OPT,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "roberta": ROBERTA,
    "vit": VIT,
}
