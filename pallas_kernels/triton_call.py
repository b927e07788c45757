"""Kernels written in Triton, called through jax-triton, whose releases differ; it is imported when it is first used."""

import functools
import inspect

import jax


@functools.cache
def reason():
    """Why no kernel can be called, or None."""
    try:
        import jax_triton
    except (ImportError, AttributeError) as error:  # the latter where JAX has dropped what a release used
        return f"jax-triton cannot be imported ({error})"
    if jax_triton.__version_info__ <= (0, 4, 1) and jax.__version_info__ >= (0, 12):
        return (
            f"jax-triton {jax_triton.__version__} does not work with JAX {jax.__version__}, whose rules for dead code "
            "take another argument"
        )
    return None


def call(kernel, *args, out, grid, constants, compute_capability: int | None = None):
    """The results of a Triton kernel of four warps.

    Args:
      kernel: takes pointers to `args` and to the results, then `constants` by name.
      out: shape and dtype of the result, or a list of those.
      grid: how many programs there are, by axis.
      compute_capability: of the device to compile for, 90 for Hopper; None asks the device.
    """
    import jax_triton

    # The keyword's name before jax-triton 0.4 was `out_shape`.
    known = inspect.signature(jax_triton.triton_call).parameters
    return jax_triton.triton_call(
        *args,
        kernel=kernel,
        grid=grid,
        num_warps=4,
        compute_capability=compute_capability,
        **{"out_type" if "out_type" in known else "out_shape": out},
        **constants,
    )
