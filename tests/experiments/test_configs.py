"""Every file in configs/ is a valid experiment whose docstring says how to run it, what comes out and how long it takes."""

import importlib
import pathlib

import pytest

from sparsejax.training.config import resolve

FILES = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "configs").glob("[a-z]*.py"))
SHARED = {"base", "digits", "fashion"}  # what the others are made of


@pytest.mark.parametrize("name", FILES)
def test_config(name):
    module = importlib.import_module(f"configs.{name}")
    if name in SHARED:
        assert not hasattr(module, "get_config")
        return
    resolve(module.get_config())
    assert f"python -m experiments.run --config=configs/{name}.py" in module.__doc__
    assert any(unit in module.__doc__ for unit in ("second", "minute", "days"))
