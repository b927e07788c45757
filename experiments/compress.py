"""Compresses a trained language model: `python -m experiments.compress --model=FOLDER --method=wanda --sparsity=0.5 --out=FOLDER2`.

FOLDER is a Hugging Face folder, the workdir of a finished run of a decoder (`configs/stdlib_decoder.py`), or a folder
that this command wrote. FOLDER2 receives the compressed model as a Hugging Face folder that `transformers` loads (where
the family cannot express it, as sliced residual streams, as a folder that only this command and `sparsejax.interop.native`
load), `summary.json`, `compression.png` and a model card; it appears when everything is done. Interrupted layer-wise
compression goes on where it was when the same command is given again: finished blocks wait in FOLDER2.resume.

  --pattern=2:4                     unstructured, N:M or block:AxB, for methods that have patterns
  --options="{'damping': 0.1}"      keywords of the method; `{'initial': 'sparsegpt'}` names another method
  --allocation=owl                  or "{'block_0/*': 0.3}": how much of each layer
  --calibration=stdlib              or a text file or folder; --samples windows of --length tokens
  --format=csr                      also writes packed.safetensors (auto: a format for every leaf)

Exit codes: 0 finished; 2 a mistake in the arguments or the folder; 130 Ctrl-C.
"""

import ast
import sys

from absl import app, flags, logging

from experiments import compression_session
from experiments.arguments import parse
from sparsejax.allocator import keep_freed_memory

_MODEL = flags.DEFINE_string("model", None, "The folder of the model.")
_METHOD = flags.DEFINE_string("method", None, "A method of sparsejax.compress.METHODS.")
_SPARSITY = flags.DEFINE_float("sparsity", None, "The fraction to remove; left out with N:M patterns.")
_PATTERN = flags.DEFINE_string(
    "pattern", None, "unstructured, N:M such as 2:4, or block:AxB; the method's own if not given."
)
_OPTIONS = flags.DEFINE_string("options", "{}", "Keywords of the method, a Python dict.")
_ALLOCATION = flags.DEFINE_string(
    "allocation", "uniform", "uniform, owl, or a Python dict of layer patterns."
)
_CALIBRATION = flags.DEFINE_string("calibration", "stdlib", "The corpus: stdlib, a text file, or a folder.")
_SAMPLES = flags.DEFINE_integer("samples", 128, "Windows of calibration text.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of a window; the model's longest, at most 2048, if not given."
)
_EVALUATION = flags.DEFINE_string(
    "evaluation", None, "The corpus of the loss; that of calibration if not given."
)
_WINDOWS = flags.DEFINE_integer("windows", 64, "Windows of held-out text.", lower_bound=1)
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; as stored if not given.")
_FORMAT = flags.DEFINE_string(
    "format", None, "Also write packed weights: auto, nm, 2:4, block:32x32, bitmap or csr."
)
_OUT = flags.DEFINE_string("out", None, "The new folder.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is random.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show progress bars and the summary.")


def literal(flag: str, value: str) -> dict:
    """The dict that a flag's text spells.

    Raises:
      ValueError: one sentence, if it spells none.
    """
    try:
        found = ast.literal_eval(value)
    except (SyntaxError, TypeError, ValueError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"--{flag} must be a Python dict such as \"{{'damping': 0.1}}\", got {value!r}")
    return found


def main(arguments):
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    try:
        allocation = _ALLOCATION.value
        settings = {
            "seed": _SEED.value,
            "method": _METHOD.value,
            "options": literal("options", _OPTIONS.value),
            "sparsity": _SPARSITY.value,
            "pattern": _PATTERN.value,
            "allocation": literal("allocation", allocation) if allocation.startswith("{") else allocation,
            "calibration": {"corpus": _CALIBRATION.value, "samples": _SAMPLES.value, "length": _LENGTH.value},
            "evaluation": {"corpus": _EVALUATION.value or _CALIBRATION.value, "windows": _WINDOWS.value},
            "format": _FORMAT.value,
            "dtype": _DTYPE.value,
        }
        compression_session.compress_folder(_MODEL.value, _OUT.value, settings, progress=_PROGRESS.value)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = compression_session.is_resumable(_OUT.value)
        begins = "goes on after the last finished block" if kept else "begins anew"
        print(f"stopped; the same command {begins}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "method", "out"])
    app.run(main, flags_parser=parse)
