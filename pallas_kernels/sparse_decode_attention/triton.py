"""Decoding over a packed cache in Triton, called through jax-triton: any budget, and GPUs that `pallas_gpu` lacks.

Triton gathers from memory by address, so that packed tokens are expanded as they are read. The tokens of a sequence
are divided among several programs, whose parts are merged after, as in `pallas_gpu`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_call
from pallas_kernels.sparse_decode_attention import xla

_TOKENS = 64  # of a tile
_PROGRAMS = 264  # to aim at: two for each multiprocessor of a Hopper GPU


def bitmap(q, k_bits, k_values, v_bits, v_values, lengths, config, compute_capability=None):
    """As `xla.bitmap`. `compute_capability` (90 for Hopper) is the device's if None."""
    # it cannot be imported without Triton
    from pallas_kernels.sparse_decode_attention.triton_kernel import bitmap_kernel

    batch, groups, group, channels = q.shape
    splits = min(-(-k_bits.shape[2] // _TOKENS), max(1, _PROGRAMS // (batch * groups)))
    out, lse = triton_call.call(
        bitmap_kernel,
        q,
        k_bits,
        k_values,
        v_bits,
        v_values,
        lengths,
        out=[
            jax.ShapeDtypeStruct((splits, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((splits, *q.shape[:3]), jnp.float32),
        ],
        grid=(splits, batch * groups),
        constants=constants(q, k_bits, k_values, v_values, config),
        compute_capability=compute_capability,
    )
    out, lse = xla.merge(out, lse)
    return out.astype(q.dtype), lse


def constants(q, k_bits, k_values, v_values, config):
    """What the kernel knows when it is compiled."""
    return dict(
        groups=q.shape[1],
        group=q.shape[2],
        height=_power_of_two(q.shape[2]),  # of the smallest matrix product
        channels=q.shape[3],
        lanes=_power_of_two(q.shape[3]),
        capacity=k_bits.shape[2],
        width=k_bits.shape[3],
        k_budget=k_values.shape[3],
        v_budget=v_values.shape[3],
        scale=config.scale,
        soft_cap=config.soft_cap or 0.0,
        tokens=_TOKENS,
    )


def _power_of_two(size):
    """The smallest that holds so many, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
