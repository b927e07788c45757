"""Which implementation of an operation runs: the named one, or the first that the device and the shapes allow.

An operation is a folder, an implementation a module in it. Modules are imported when they are first used, so that
none of them needs the others' back ends.
"""

import importlib

import jax

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


def prefer(implementation, reasons):
    """As `pick`, but another implementation stands in for one that cannot run: gradients have other shapes."""
    return implementation if reasons.get(implementation, "unknown") is None else pick("", None, reasons)


def module(op, implementation):
    """The module of an implementation, `pallas_kernels.<op>.<implementation>`."""
    return importlib.import_module(f"pallas_kernels.{op}.{implementation}")


def gpu_reason(*generations, at=None):
    """Why kernels written for some generations of NVIDIA GPUs cannot run, or None.

    Args:
      *generations: major compute capabilities, 9 for Hopper.
      at: an operand; kernels run on its device.
    """
    platform, device = _where(at)
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {platform}"
    found = getattr(device, "compute_capability", "none")
    if found.split(".")[0] in map(str, generations):
        return None
    wanted = " or ".join(f"{generation}.x" for generation in generations)
    return f"it needs a GPU of compute capability {wanted}, and this one has {found}"


def tpu_reason(*, at=None):
    """Why kernels written for TPUs cannot run, or None; `at` as in `gpu_reason`."""
    platform = _where(at)[0]
    return None if platform == "tpu" else f"it needs a TPU, and JAX runs on {platform}"


def _where(at):
    """The platform and device of an operation: of the operand where it is bound to one, else JAX's default."""
    device = jax.config.jax_default_device
    if isinstance(at, jax.Array) and not isinstance(at, jax.core.Tracer) and at.committed:
        device = min(at.devices(), key=lambda each: each.id)
    if device is None:
        return jax.default_backend(), jax.local_devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.platform, device
