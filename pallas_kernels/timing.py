"""How the benches measure: everything in one process, alternating, the median of repeats, the result awaited.

Starting a function on an accelerator and waiting for it takes longer than many of them run. A sample is therefore as
many calls as fill `SAMPLE`, of which only the last is awaited.
"""

import math
import statistics
import time

import jax
import numpy as np

REPEATS = 7
SAMPLE = 5.0  # milliseconds that a sample takes at least
CALLS = 1024  # of a sample at most


def blocking(function, *args):
    """`function(*args)` compiled with its arguments as arguments, as a function of none that waits for the result."""
    compiled = jax.jit(function)
    return waiting(lambda: compiled(*args))


def waiting(start):
    """A function of no arguments that waits for the result of `start`; `measure` starts it several times, then waits."""

    def wait():
        return jax.block_until_ready(start())

    wait.start = start
    return wait


def measure(functions, repeats: int = REPEATS, average=statistics.median):
    """{name: milliseconds of a call}: averages over `repeats` rounds, in each of which every function has one sample.

    Args:
      functions: {name: function of no arguments that blocks until its result is ready}; those of `blocking` and
        `waiting` are awaited once in a sample. Each runs beforehand, to find how many calls fill a sample.
      average: of the times of a function.
    """
    calls = {name: _calls(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_sample(function, calls[name]) / calls[name])
    return {name: average(seen) for name, seen in times.items()}


def _calls(function) -> int:
    """How many calls fill a sample, after one that may compile."""
    function()
    calls = 1
    while calls < CALLS and _sample(function, calls) < SAMPLE:
        calls *= 2
    return calls


def _sample(function, calls: int) -> float:
    """Milliseconds of some calls."""
    call = getattr(function, "start", function)
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - start)


def four_digits(number: float) -> str:
    """A number with four significant digits, or all of those before the point."""
    places = 3 - math.floor(math.log10(abs(number))) if number else 3
    return f"{number:.{max(0, places)}f}"


def max_error(found, expected) -> float:
    """The largest difference between two arrays, in units of the largest entry of the second."""
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    return float(
        np.max(np.abs(found - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30)
    )


def compare(op: str, case: str, ours, dense, peers, work, repeats: int = REPEATS, comparable=None) -> dict:
    """One line of a bench.

    Args:
      op, case: what is measured.
      ours, dense: functions of no arguments that block.
      peers: {name: function of no arguments that blocks}; the fastest is reported.
      work: the floating-point operations and bytes that ours needs at least.
      comparable: brings dense's arrays into the form of ours, whose error is relative to them.

    Returns:
      op, case, ours_ms, dense_ms, ratio_dense (how many times faster than dense), peer, peer_ms, ratio_peer,
      max_error, flops and bytes; the peer's are None if there is none.
    """
    times = measure({"ours": ours, "dense": dense} | peers, repeats)
    peer = min(peers, key=times.__getitem__, default=None)
    expected = dense() if comparable is None else comparable(dense())
    pairs = zip(jax.tree.leaves(ours()), jax.tree.leaves(expected), strict=True)
    return {
        "op": op,
        "case": case,
        "ours_ms": times["ours"],
        "dense_ms": times["dense"],
        "ratio_dense": times["dense"] / times["ours"],
        "peer": peer,
        "peer_ms": times.get(peer),
        "ratio_peer": times[peer] / times["ours"] if peer else None,
        "max_error": max(max_error(*pair) for pair in pairs),
        "flops": work[0],
        "bytes": work[1],
    }
