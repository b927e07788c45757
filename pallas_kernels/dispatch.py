IMPLEMENTATIONS = ("reference", "xla", "pallas_gpu", "pallas_tpu", "triton")


def pick(op, implementation, reasons):
    """The implementation to run: the named one, or the first of the device's that can.

    Args:
      op: name of the operation, for errors.
      implementation: a key of `reasons`, or None.
      reasons: {implementation: None if it can run here, else why it cannot}, best first.
    """
    if implementation is None:
        return next(name for name, reason in reasons.items() if reason is None)
    if implementation not in reasons:
        raise ValueError(f"{op} has no implementation {implementation!r} (known: {', '.join(reasons)})")
    if reasons[implementation] is not None:
        raise ValueError(f"{op} cannot run {implementation!r} here: {reasons[implementation]}")
    return implementation
