"""How the benches measure: everything in one process, alternating, the median of repeats, the result awaited."""

import statistics
import time

import jax
import numpy as np

REPEATS = 7


def blocking(function, *args):
    """`function(*args)` compiled with its arguments as arguments, as a function of none that waits for the result."""
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*args))


def measure(functions, repeats: int = REPEATS, average=statistics.median):
    """{name: milliseconds}: averages over `repeats` rounds, in each of which every function runs once.

    Args:
      functions: {name: function of no arguments that blocks until its result is ready}; each runs once beforehand.
      average: of the times of a function.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: average(seen) for name, seen in times.items()}


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
