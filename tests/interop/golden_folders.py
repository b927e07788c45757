"""What the tests of folders share: the golden ones, made by `tests/golden/make_golden.py` with transformers."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

GOLDEN = Path(__file__).parents[1] / "golden"
DECODERS = ("gpt2", "opt", "llama", "llama_tied", "mistral", "qwen2", "qwen2_window", "qwen3", "mixtral")


def expected(family):
    return safetensors.numpy.load_file(GOLDEN / family / "expected.safetensors")


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compile, not run


def run(checkpoint, *inputs, **keywords):
    """The model's outputs as NumPy sees them, in full float32."""
    with jax.default_matmul_precision("highest"):
        function = jax.jit(lambda params: checkpoint.model.apply({"params": params}, *inputs, **keywords))
        params = dict(checkpoint.params)
        return np.asarray(function.lower(params).compile(QUICK)(params))


def assert_close(found, wanted, tolerance=1e-5):
    """To float32 rounding: the largest difference in units of the largest value."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def tensors(folder):
    """All tensors of a folder by name."""
    found = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def edit(tmp_path, family, changes=None, change_tensors=None):
    """A copy of a golden folder with other entries in its config, and tensors that went through a function."""
    folder = tmp_path / family
    shutil.copytree(GOLDEN / family, folder)
    new = {**config(folder), **(changes or {})}
    new = {key: value for key, value in new.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(new))
    if change_tensors is not None:
        found = change_tensors(tensors(folder))
        for file in folder.glob("model*"):
            file.unlink()
        safetensors.numpy.save_file(found, folder / "model.safetensors")
    return folder
