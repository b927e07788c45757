"""Trains one configuration: `python -m experiments.run --config=configs/quickstart.py --workdir=W`.

Every field of the file can be overridden: `--config.method.sparsity=0.95 --config.steps=500`. To change a method
with its keywords, replace the section:

  --config.method="{'name': 'fixed', 'sparsity': 0.5, 'pattern': '2:4'}"

The same command resumes an interrupted run. On several devices add `--mesh=data:4,model:2`; on several processes
also `--coordinator`, `--num_processes` and `--process_id`.

`--mode=deploy --workdir=W` packs the network of a finished run, checks it against the dense one, and reports
latency, memory and FLOPs of both; `--format` names a packed format instead of the one that is picked.

Exit codes: 0 finished, or stopped by SIGTERM; 1 the loss is not finite, or packed and dense outputs differ;
2 a mistake in the arguments; 130 Ctrl-C.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.arguments import parse
from sparsejax import training
from sparsejax.allocator import keep_freed_memory
from sparsejax.training.deploy import deploy

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The configuration file, for example configs/quickstart.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run; the same folder resumes it.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "deploy"], "Train, or pack and measure a finished run.")
_FORMAT = flags.DEFINE_string(
    "format", None, "With --mode=deploy: nm, 2:4, block, block:32x32, bitmap, csr or dense."
)
_MESH = flags.DEFINE_string("mesh", None, "Devices, for example data:4,model:2; one device if not given.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar and the summary.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.")
_PROCESSES = flags.DEFINE_integer("num_processes", 1, "How many processes train together.")
_PROCESS = flags.DEFINE_integer("process_id", 0, "The number of this process, from 0.")


def main(arguments):
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "Waiting for previous save" not in record.getMessage())
    keep_freed_memory()
    try:
        if _MODE.value == "deploy":
            deploy(_WORKDIR.value, _FORMAT.value, progress=_PROGRESS.value)
            return
        if _PROCESSES.value > 1 and not _COORDINATOR.value:
            raise ValueError(f"--num_processes={_PROCESSES.value} needs --coordinator=HOST:PORT")
        if not 0 <= _PROCESS.value < _PROCESSES.value:
            raise ValueError(f"--process_id must be in [0, {_PROCESSES.value}), got {_PROCESS.value}")
        if _COORDINATOR.value:
            jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        training.run(_CONFIG.value, _WORKDIR.value, mesh=_MESH.value, progress=_PROGRESS.value)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    flags.register_multi_flags_validator(
        ["mode", "config"],
        lambda given: given["mode"] == "deploy" or given["config"] is not None,
        "--config must name a configuration file, for example configs/quickstart.py",
    )
    app.run(main, flags_parser=parse)
