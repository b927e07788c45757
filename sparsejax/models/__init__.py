"""Models by name: `build("mlp", classes=10, hidden=(300, 100))`.

All are linen modules with `__call__(x, train=False)` that return float32 outputs `(batch, classes)`, those of a
transformer, and of an encoder without a pool, for every token: `(batch, length, classes)`. The last layer is called
`head`, unless it is tied to the embedding or there are no classes. Batch statistics, where there are any, live in
`batch_stats`.
"""

from dataclasses import fields

from flax import linen

from sparsejax.masks import choose
from sparsejax.models.cnn import CNN
from sparsejax.models.encoder import Encoder, sentence_embeddings
from sparsejax.models.generate import generate, init_cache
from sparsejax.models.mlp import MLP
from sparsejax.models.resnet import ResNet
from sparsejax.models.transformer import Transformer
from sparsejax.models.vision_transformer import VisionTransformer
from sparsejax.models.wide_resnet import WideResNet

MODELS = {
    "cnn": CNN,
    "encoder": Encoder,
    "mlp": MLP,
    "resnet": ResNet,
    "transformer": Transformer,
    "vit": VisionTransformer,
    "wide_resnet": WideResNet,
}


def build(name: str, classes: int, **kw) -> linen.Module:
    """The model called `name` with `classes` outputs (for regression: the number of targets).

    Args:
      name: a key of `MODELS`.
      classes: width of the last layer.
      **kw: the model's own keywords; lists, as they come out of a config, become tuples.

    Raises:
      ValueError: for an unknown name or keyword, or a depth the model cannot have.
    """
    model = choose("model", name, MODELS)
    known = [field.name for field in fields(model) if field.name not in ("classes", "parent", "name")]
    for key in kw:
        choose(f"keyword of model {name!r}:", key, known)
    return model(classes, **{key: tuple(v) if isinstance(v, list) else v for key, v in kw.items()})


__all__ = [
    "CNN",
    "Encoder",
    "MLP",
    "MODELS",
    "ResNet",
    "Transformer",
    "VisionTransformer",
    "WideResNet",
    "build",
    "generate",
    "init_cache",
    "sentence_embeddings",
]
