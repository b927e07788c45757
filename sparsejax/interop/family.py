"""What a family of Hugging Face models is: what their configs say and how their tensors are called.

A family is one table, read in both directions. `keys` links attributes of our models to entries of `config.json`
(with the value that transformers assumes for a missing entry), `fixed` holds the attributes that the family
implies, `requires` the entries that have to have one value, because ours know no other. `tensors` links modules
of our parameter tree to modules of the checkpoint: `{i}` is the block, `{e}` the expert (whose tensors ours
stacks), and `[1/3]` the second of three equal parts of the columns of a fused tensor. A leaf's own name follows
from its kind: `kernel`, `scale` and `embedding` are called `weight` there, `bias` is `bias`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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
HEADS = ("lm_head.", "classifier.", "cls.")  # modules on top of the body, whose names have no prefix


class Key(NamedTuple):
    """An entry of a config.

    Attributes:
      name: of the entry.
      default: what transformers takes if it is missing.
      values: our names of their values, None if they are the same.
      is_optional: whether null is allowed; it is where that is the default.
      extra: how much larger their number is than ours.
      least: the smallest whole number that makes sense.
    """

    name: str
    default: Any
    values: Mapping[str, str] | None = None
    is_optional: bool = False
    extra: int = 0
    least: int = 1


class Bias(NamedTuple):
    """Projections that have a bias if the entry `switch` of the config says so (None: always)."""

    names: tuple[str, ...]
    switch: str | None = None
    default: bool = True


class Same(NamedTuple):
    """The value of another entry, in `Family.requires`."""

    name: str


class Variant(NamedTuple):
    """A class of a family's models in transformers: the body, or the body with a head.

    Attributes:
      architecture: its name, which stands in `architectures` of the config.
      prefix: before the names of the body's tensors.
      signs: tensors by which a checkpoint is known to be of this class.
      attributes: those of our model that it implies.
      classes: what our `classes` are: `none` (there is no head), the `vocabulary`, or the `labels` of the config; None:
        the keys say it.
      requires: as of the family, for this class alone.
    """

    architecture: str
    prefix: str = ""
    signs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = {}
    classes: str | None = None
    requires: Mapping[str, Any] = {}

    def written(self, name: str) -> str:
        """The name in a file of a tensor of `Family.tensors`."""
        return name if name.startswith(HEADS) else self.prefix + name


def _tokens(config: Mapping) -> tuple:
    return (1, 1), "int32"


class Family(NamedTuple):
    """One model type; see the module.

    Attributes:
      model: the class of our model.
      variants: the classes of theirs, see `variant`.
      keys, fixed, requires, tensors: see the module; a value of `requires` is the allowed one, or a `Same`.
      bias: which projections have one.
      ignored: shell patterns of tensors that hold no parameters: buffers of older versions, copies of tied ones.
      unread: shell patterns of tensors of heads that our model lacks: left out, with a warning.
      kernels: how kernels lie in the file: `linear` (out, in), `same` (in, out), as in GPT-2, or `patches`
        (out, channels, rows, columns); `layouts` names the modules whose kernel lies otherwise.
      theta: the default base of rotary positions, None for a family without them.
      layered_window: whether `layer_types` and `max_window_layers` say which blocks have a sliding window.
      example: shape and dtype of an input, for a config.
    """

    model: type
    variants: tuple[Variant, ...]
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]
    tensors: Mapping[str, str]
    bias: tuple[Bias, ...] = ()
    requires: Mapping[str, Any] = {}
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    kernels: str = "linear"
    layouts: Mapping[str, str] = {}
    theta: float | None = None
    layered_window: bool = False
    example: Callable[[Mapping], tuple] = _tokens

    def variant(self, names: Iterable[str], architectures: Iterable[str] = ()) -> Variant:
        """The variant of a checkpoint.

        Args:
          names: of its tensors, which have to hold the variant's signs.
          architectures: of its config; of the variants that fit the first that is named here is taken, else the
            first, since the tensors alone do not tell what a checkpoint is for.
        """
        names = set(names)
        fitting = [variant for variant in self.variants if names.issuperset(variant.signs)]
        return next((variant for variant in fitting if variant.architecture in architectures), fitting[0])


def activation(name: str, default: str) -> Key:
    """The key of an activation."""
    return Key(name, default, ACTIVATIONS)


def sizes(classes, depth, width, heads, hidden, length) -> dict[str, Key]:
    """The keys that most configs share, with their defaults."""
    return {
        "classes": Key("vocab_size", classes),
        "depth": Key("num_hidden_layers", depth),
        "width": Key("hidden_size", width),
        "heads": Key("num_attention_heads", heads),
        "hidden": Key("intermediate_size", hidden),
        "max_length": Key("max_position_embeddings", length),
    }
