"""Compression of trained models from calibration data: statistics of each layer's inputs, then a method.

`METHODS` maps names to factories. A layer-wise method (`Layerwise`) goes through a model block by block with
`prune_layers`; the others (`Whole`) have a `run` of their own.
"""

import inspect
from collections.abc import Mapping

from sparsejax.compress import statistics
from sparsejax.compress.base import Compressed, CompressionWarning, Layerwise, Whole
from sparsejax.compress.calibration import Observed, observe, prune_layers
from sparsejax.compress.cfsp import cfsp
from sparsejax.compress.dsnot import dsnot
from sparsejax.compress.evaluate import perplexity
from sparsejax.compress.evopress import evopress
from sparsejax.compress.flap import flap
from sparsejax.compress.gqsa import gqsa, group_pruning
from sparsejax.compress.jlcm import jlcm
from sparsejax.compress.least_squares import least_squares, masked_least_squares
from sparsejax.compress.magnitude import magnitude
from sparsejax.compress.owl import owl
from sparsejax.compress.pat import pat
from sparsejax.compress.pv_tuning import pv_optimizer, pv_tuning
from sparsejax.compress.quantise import rtn
from sparsejax.compress.slicegpt import slicegpt
from sparsejax.compress.sparsegpt import sparsegpt
from sparsejax.compress.structured import magnitude_sp, random_sp, wanda_sp
from sparsejax.compress.stun import stun
from sparsejax.compress.topkld import topkld
from sparsejax.compress.wanda import wanda
from sparsejax.compress.ziplm import ziplm
from sparsejax.masks import choose

# Keywords of factories that are methods themselves.
BASES = ("initial", "method")

METHODS = {
    "cfsp": cfsp,
    "dsnot": dsnot,
    "evopress": evopress,
    "flap": flap,
    "gqsa": gqsa,
    "group_pruning": group_pruning,
    "jlcm": jlcm,
    "least_squares": least_squares,
    "magnitude": magnitude,
    "magnitude_sp": magnitude_sp,
    "pat": pat,
    "pv_tuning": pv_tuning,
    "random_sp": random_sp,
    "rtn": rtn,
    "slicegpt": slicegpt,
    "sparsegpt": sparsegpt,
    "stun": stun,
    "wanda": wanda,
    "wanda_sp": wanda_sp,
    "ziplm": ziplm,
}


def build(name: str, **keywords) -> Layerwise | Whole:
    """The method called `name`.

    Args:
      name: a key of `METHODS`.
      **keywords: of its factory. A method that builds on another takes its name, or a mapping of "name" and keywords, as
        `build("dsnot", initial="sparsegpt")`.

    Raises:
      ValueError: for an unknown name or keyword, a value that its factory cannot take, and for a method to build on
        that has no name or is not layer-wise.
    """
    factory = choose("method", name, METHODS)
    known = inspect.signature(factory).parameters
    for key in keywords:
        choose(f"keyword of method {name!r}:", key, known)
    values = {key: _base(name, key, value) if key in BASES else value for key, value in keywords.items()}
    try:
        return factory(**values)
    except TypeError as error:
        raise ValueError(f"method {name!r} cannot take {keywords} ({error})") from error


def _base(name: str, key: str, value):
    """The method that the one called `name` builds on."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    if "name" not in value:
        raise ValueError(f"{key} of method {name!r} must have the name of a method, got {dict(value)}")
    found = build(**value)
    if not isinstance(found, Layerwise):
        raise ValueError(f"{key} of method {name!r} must be a layer-wise method, got {value['name']!r}")
    return found


__all__ = [
    "Compressed",
    "CompressionWarning",
    "Layerwise",
    "METHODS",
    "Observed",
    "Whole",
    "build",
    "cfsp",
    "dsnot",
    "evopress",
    "flap",
    "gqsa",
    "group_pruning",
    "jlcm",
    "least_squares",
    "magnitude",
    "magnitude_sp",
    "masked_least_squares",
    "observe",
    "owl",
    "pat",
    "perplexity",
    "prune_layers",
    "pv_optimizer",
    "pv_tuning",
    "random_sp",
    "rtn",
    "slicegpt",
    "sparsegpt",
    "statistics",
    "stun",
    "topkld",
    "wanda",
    "wanda_sp",
    "ziplm",
]
