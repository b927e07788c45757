"""The tables of the encoders: BERT (and so MiniLM) and RoBERTa for text, ViT for images."""

import numbers
from collections.abc import Mapping

from sparsejax.interop.family import ALL, QKV, Bias, Family, Key, Variant, activation, sizes
from sparsejax.models.encoder import Encoder
from sparsejax.models.vision_transformer import VisionTransformer

_SIZES = {name: key for name, key in sizes(None, 12, 768, 12, 3072, 512).items() if name != "classes"}
_KEYS = {
    **_SIZES,
    "vocabulary": Key("vocab_size", 30522),
    "types": Key("type_vocab_size", 2),
    "epsilon": Key("layer_norm_eps", 1e-12),
    "activation": activation("hidden_act", "gelu"),
    "pad": Key("pad_token_id", 0, is_optional=True, least=0),
}
_REQUIRES = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_BODY = {
    "embed": "embeddings.word_embeddings",
    "types": "embeddings.token_type_embeddings",
    "positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "block_{i}/attention/query": "encoder.layer.{i}.attention.self.query",
    "block_{i}/attention/key": "encoder.layer.{i}.attention.self.key",
    "block_{i}/attention/value": "encoder.layer.{i}.attention.self.value",
    "block_{i}/attention/out": "encoder.layer.{i}.attention.output.dense",
    "block_{i}/norm_0": "encoder.layer.{i}.attention.output.LayerNorm",
    "block_{i}/mlp/up": "encoder.layer.{i}.intermediate.dense",
    "block_{i}/mlp/down": "encoder.layer.{i}.output.dense",
    "block_{i}/norm_1": "encoder.layer.{i}.output.LayerNorm",
    "pooler": "pooler.dense",
}
_POOLER = "pooler.dense.weight"
_POOLED = {"pool": "first", "pooler": True}

BERT = Family(
    model=Encoder,
    variants=(
        Variant("BertForMaskedLM", "bert.", ("cls.predictions.bias",), {"tied": True}, "vocabulary"),
        Variant("BertForSequenceClassification", "bert.", ("classifier.weight", _POOLER), _POOLED, "labels"),
        Variant("BertForTokenClassification", "bert.", ("classifier.weight",), {}, "labels"),
        Variant("BertModel", "", (_POOLER,), _POOLED, "none"),
        Variant("BertModel", "", (), {}, "none"),
    ),
    keys=_KEYS,
    fixed={},
    bias=(Bias(ALL),),
    requires=_REQUIRES,
    tensors={
        **_BODY,
        "head": "classifier",
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "head_bias": "cls.predictions.bias",
    },
    ignored=("embeddings.position_ids", "cls.predictions.decoder.*"),
    unread=("cls.*", "classifier.*", "pooler.dense.*", "qa_outputs.*"),
)

ROBERTA = Family(
    model=Encoder,
    variants=(
        Variant(
            "RobertaForMaskedLM",
            "roberta.",
            ("lm_head.bias",),
            {"tied": True},
            "vocabulary",
            {"hidden_act": "gelu"},  # its head has this activation, whatever the blocks have
        ),
        Variant("RobertaModel", "", (_POOLER,), _POOLED, "none"),
        Variant("RobertaModel", "", (), {}, "none"),
    ),
    keys={
        **_KEYS,
        "vocabulary": Key("vocab_size", 50265),
        "max_length": Key("max_position_embeddings", 512, extra=2),
        "pad": Key("pad_token_id", 1),
    },
    fixed={"position_offset": 2},
    bias=(Bias(ALL),),
    requires={**_REQUIRES, "pad_token_id": 1},
    tensors={
        **_BODY,
        "transform": "lm_head.dense",
        "transform_norm": "lm_head.layer_norm",
        "head_bias": "lm_head.bias",
    },
    ignored=("embeddings.position_ids", "lm_head.decoder.*"),
    unread=("lm_head.*", "classifier.*", "pooler.dense.*", "qa_outputs.*"),
)


def _image(config: Mapping) -> tuple:
    found = config.get("image_size", 224)
    sides = [found, found] if isinstance(found, numbers.Integral) else found
    shape = [*sides, config.get("num_channels", 3)] if isinstance(sides, list | tuple) else []
    if len(shape) != 3 or not all(isinstance(size, numbers.Integral) and size > 0 for size in shape):
        raise ValueError(
            f"image_size in the config must be one or two positive numbers and num_channels one, got {found!r} and "
            f"{config.get('num_channels', 3)!r}"
        )
    return (1, *shape), "float32"


VIT = Family(
    model=VisionTransformer,
    variants=(
        Variant("ViTForImageClassification", "vit.", ("classifier.weight",), {}, "labels"),
        Variant("ViTModel", "", (), {}, "none"),
    ),
    keys={
        **{name: key for name, key in _SIZES.items() if name != "max_length"},
        "patch": Key("patch_size", 16),
        "epsilon": Key("layer_norm_eps", 1e-12),
        "activation": activation("hidden_act", "gelu"),
    },
    fixed={"pool": "token"},
    bias=(Bias(QKV, "qkv_bias"), Bias(("out", "up", "down"))),
    tensors={
        "embed": "embeddings.patch_embeddings.projection",
        "token": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "block_{i}/norm_0": "encoder.layer.{i}.layernorm_before",
        "block_{i}/attention/query": "encoder.layer.{i}.attention.attention.query",
        "block_{i}/attention/key": "encoder.layer.{i}.attention.attention.key",
        "block_{i}/attention/value": "encoder.layer.{i}.attention.attention.value",
        "block_{i}/attention/out": "encoder.layer.{i}.attention.output.dense",
        "block_{i}/norm_1": "encoder.layer.{i}.layernorm_after",
        "block_{i}/mlp/up": "encoder.layer.{i}.intermediate.dense",
        "block_{i}/mlp/down": "encoder.layer.{i}.output.dense",
        "norm": "layernorm",
        "head": "classifier",
    },
    unread=("classifier.*", "pooler.dense.*"),
    layouts={"embed": "patches"},
    example=_image,
)
