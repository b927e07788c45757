"""Sparse training methods as Optax transforms, one per file, and the registry that configs build them
from."""

import inspect

import optax

from sparsejax.masks import choose
from sparsejax.target import Target
from sparsejax.transforms.adams import adams
from sparsejax.transforms.ast import ast
from sparsejax.transforms.bdwp import bdwp
from sparsejax.transforms.cric import cric
from sparsejax.transforms.dense import dense
from sparsejax.transforms.fixed import fixed
from sparsejax.transforms.gradual import gradual
from sparsejax.transforms.hesso import hesso
from sparsejax.transforms.group_lasso import group_lasso
from sparsejax.transforms.mdgf import mdgf
from sparsejax.transforms.nuclear import nuclear
from sparsejax.transforms.one_shot import one_shot
from sparsejax.transforms.prox_l0 import prox_l0
from sparsejax.transforms.prox_l1 import prox_l1
from sparsejax.transforms.rigl import rigl
from sparsejax.transforms.sdgf import sdgf
from sparsejax.transforms.set_ import set_
from sparsejax.transforms.snfs import snfs
from sparsejax.transforms.ssvi import ssvi
from sparsejax.transforms.srste import sr_ste
from sparsejax.transforms.ste import ste
from sparsejax.transforms.turbo_vbi import turbo_vbi
from sparsejax.transforms.wgsef import wgsef

METHODS = {
    "adams": adams,
    "ast": ast,
    "bdwp": bdwp,
    "cric": cric,
    "dense": dense,
    "fixed": fixed,
    "gradual": gradual,
    "hesso": hesso,
    "group_lasso": group_lasso,
    "mdgf": mdgf,
    "nuclear": nuclear,
    "one_shot": one_shot,
    "prox_l0": prox_l0,
    "prox_l1": prox_l1,
    "rigl": rigl,
    "sdgf": sdgf,
    "set_": set_,
    "snfs": snfs,
    "sr_ste": sr_ste,
    "ssvi": ssvi,
    "ste": ste,
    "turbo_vbi": turbo_vbi,
    "wgsef": wgsef,
}

# Methods that keep dense weights, so that every forward pass has to mask them. The parameters of the others are
# zero outside the masks after every update.
STRAIGHT_THROUGH = frozenset({"ast", "bdwp", "mdgf", "sdgf", "sr_ste", "ste"})


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
