"""Benches of the operations: `python -m pallas_kernels.bench [OP ...] [--json] [--table=FILE] [--size=N] [--repeats=N]`.

Without a name all operations that have a `bench` module are measured. Every line compares ours with the dense XLA
operation and with the fastest peer, measured in the same process (see `timing`); a ratio says how many times faster
ours is. On devices whose peaks are known, a line ends with the fraction of the roofline that ours reaches: the time
that its floating-point operations or its bytes need at least, whichever is longer, over the time it took.
"""

import argparse
import importlib
import json
import os
import pathlib

import jax

from pallas_kernels.timing import four_digits

# Operations (dense bfloat16 tensor cores) and bytes a second, from the data sheets.
PEAKS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
}


def operations() -> list[str]:
    """The operations that have a bench, by name."""
    return sorted(path.parent.name for path in pathlib.Path(__file__).parent.glob("*/bench.py"))


def roofline(result: dict, device: str) -> float | None:
    """The least time that the work of a result needs on a device over the time it took; None without known peaks."""
    if device not in PEAKS or not result.get("flops"):
        return None
    operations_per_second, bytes_per_second = PEAKS[device]
    seconds = max(result["flops"] / operations_per_second, result["bytes"] / bytes_per_second)
    return 1e3 * seconds / result["ours_ms"]


def line(result: dict, device: str) -> str:
    """A result as text."""
    peer = "no peer"
    if result["peer"]:
        peer = f"{result['peer']} {four_digits(result['peer_ms']):>9s} ms ({result['ratio_peer']:6.2f}x)"
    fraction = roofline(result, device)
    return (
        f"{result['op']:20s} {result['case']:52s} {four_digits(result['ours_ms']):>9s} ms   "
        f"dense {four_digits(result['dense_ms']):>9s} ms "
        f"({result['ratio_dense']:6.2f}x)   {peer}   error {result['max_error']:.1e}"
        + (f"   roofline {fraction:.0%}" if fraction else "")
    )


def table(results: list[dict], device: str) -> str:
    """All results as a Markdown page that names the device."""
    where = f"{device}, {os.cpu_count()} cores" if device == "cpu" else device
    heads = (
        "operation",
        "case",
        "ms",
        "dense, ms",
        "times faster",
        "best peer",
        "times faster",
        "largest error",
    )
    rows = [
        (
            f"`{r['op']}`",
            r["case"],
            four_digits(r["ours_ms"]),
            four_digits(r["dense_ms"]),
            f"{r['ratio_dense']:.2f}",
            r["peer"] or "",
            f"{r['ratio_peer']:.2f}" if r["peer"] else "",
            f"{r['max_error']:.0e}",
        )
        for r in results
    ]
    fractions = [roofline(r, device) for r in results]
    if any(fractions):
        heads += ("of the roofline",)
        rows = [(*row, f"{part:.0%}" if part else "") for row, part in zip(rows, fractions, strict=True)]
    lines = [heads, ("---", "---", *["---:"] * (len(heads) - 2)), *rows]
    return (
        f"# The kernels on {where}\n\n`python -m pallas_kernels.bench --table=FILE`, JAX {jax.__version__}. "
        "Ours, the dense operation in XLA and the fastest peer take turns in one process; medians. Errors are relative to "
        "the largest output.\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    )


def main() -> None:
    """Runs the benches named on the command line, all of them if none is."""
    known = operations()
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("op", nargs="*", metavar="|".join(known), help="which operations (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--table", metavar="FILE", help="also write the results to this file, as Markdown")
    parser.add_argument("--size", type=int, help="of the matrices or sequences (default: the device's)")
    parser.add_argument("--repeats", type=int, default=7, help="of which the median is taken (%(default)s)")
    args = parser.parse_args()
    if unknown := [op for op in args.op if op not in known]:
        parser.error(f"unknown operation {unknown[0]!r} (known: {', '.join(known)})")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.size is not None and args.size < 1:
        parser.error(f"--size must be at least 1, got {args.size}")
    device = jax.devices()[0].device_kind
    results = []
    for op in args.op or known:
        bench = importlib.import_module(f"pallas_kernels.{op}.bench")
        for case in bench.cases(args.size):
            results.append(bench.run(case, args.repeats))
            print(json.dumps(results[-1]) if args.json else line(results[-1], device), flush=True)
            if args.table:  # after every case, so that an interrupted bench leaves what it measured
                pathlib.Path(args.table).write_text(table(results, device))


if __name__ == "__main__":
    main()
