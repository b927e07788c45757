"""Sparse training methods as Optax transforms, one per file, and the registry that configs build them
from."""

import inspect

import optax

from sparsejax.masks import choose
from sparsejax.target import Target
from sparsejax.transforms.dense import dense
from sparsejax.transforms.fixed import fixed
from sparsejax.transforms.gradual import gradual
from sparsejax.transforms.one_shot import one_shot
from sparsejax.transforms.rigl import rigl
from sparsejax.transforms.set_ import set_
from sparsejax.transforms.snfs import snfs

METHODS = {
    "dense": dense,
    "fixed": fixed,
    "gradual": gradual,
    "one_shot": one_shot,
    "rigl": rigl,
    "set_": set_,
    "snfs": snfs,
}


def keywords(name: str) -> tuple[str, ...]:
    """The keywords that a method takes, those of `Target` included.

    Raises:
      ValueError: for an unknown method, listing the known ones.
    """
    parameters = inspect.signature(choose("method", name, METHODS)).parameters.values()
    own = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    takes_target = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return (*own, *(inspect.signature(Target).parameters if takes_target else ()))


def build(name: str, inner: optax.GradientTransformation, **kwargs) -> optax.GradientTransformationExtraArgs:
    """The transform `name` of `METHODS` around an inner optimizer.

    Raises:
      ValueError: for an unknown method or keyword, listing the known ones, or a missing keyword.
    """
    known = keywords(name)
    for keyword in kwargs:
        choose(f"keyword of method {name!r}", keyword, known)
    try:
        return METHODS[name](inner, **kwargs)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
