"""Attention in which every query block meets only the key blocks that a mask selects.

Flash attention [Dao, 2022, 2023] over lists of blocks: no array of queries times keys exists, blocks that are not
selected are neither read nor computed, and the log-sum-exp that is kept for the backward pass is also a result,
with which attention over disjoint sets of keys is merged. `reference` is the definition.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.batching import independent
from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.lists import BlockLists, block_lists
from pallas_kernels.meshes import on_mesh

__all__ = ["BlockLists", "block_lists", "block_sparse_attention"]

OP = "block_sparse_attention"


class Config(NamedTuple):
    """What is known when a call is compiled."""

    block_q: int
    block_k: int
    causal: bool
    scale: float
    soft_cap: float | None


def block_sparse_attention(
    q,
    k,
    v,
    block_mask,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
):
    """softmax(scale * q k^T) v over the key blocks that `block_mask` selects for every query block.

    Args:
      q: (B, Tq, H, D) bfloat16, float16 or float32.
      k, v: (B, Tk, Hkv, D) of the same dtype, H a multiple of Hkv: query head h reads head h // (H / Hkv).
      block_mask: bool, broadcastable to (B, H, ceil(Tq / block_q), ceil(Tk / block_k)). Entry (i, j) says whether
        queries [i * block_q, (i + 1) * block_q) see keys [j * block_k, (j + 1) * block_k). It may be traced, and
        has no gradient.
      block_q, block_k: sizes of the blocks. The last ones may be cut short by the end of the sequence.
      causal: query t sees keys 0 to t only, as in `jax.nn.dot_product_attention`; blocks that lie wholly above the
        diagonal cost nothing whatever the mask says.
      scale: multiplies the logits; None is D ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), before masking.
      return_lse: also return the log of the sum of exponentials of every row's logits. It has a gradient.
      implementation: one of "reference", "xla", "pallas_gpu" (Hopper), "pallas_tpu", or None for the device's best.

    Returns:
      (B, Tq, H, D) of the dtype of q, and with `return_lse` also (B, H, Tq) float32. A query that sees no key
      gives zeros, -inf, and no gradient.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run here.
    """
    q, k, v, block_mask = (jnp.asarray(x) for x in (q, k, v, block_mask))
    _check(q, k, v, block_mask, block_q, block_k, soft_cap)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    config = Config(block_q, block_k, bool(causal), scale, None if soft_cap is None else float(soft_cap))
    blocks = (-(-q.shape[1] // block_q), -(-k.shape[1] // block_k))
    name = dispatch.pick(OP, implementation, reasons(q, config))

    def run(q, k, v, block_mask):
        mask = jnp.broadcast_to(block_mask, (q.shape[0], q.shape[2], *blocks))
        if name == "reference":
            return reference.attention(q, k, v, mask, config)
        groups = k.shape[2], q.shape[2] // k.shape[2]
        out, lse = _attention(
            q.reshape(*q.shape[:2], *groups, -1), k, v, mask.reshape(-1, *groups, *blocks), config, name
        )
        return out.reshape(q.shape), lse.reshape(lse.shape[0], -1, lse.shape[-1])

    out, lse = on_mesh(run, _specs, q, k, v, block_mask)
    return (out, lse) if return_lse else out


def _specs(q, *others):
    """Output and log-sum-exp are sharded along the sequences and heads of q."""
    del others
    return PartitionSpec(q[0], None, q[2], None), PartitionSpec(q[0], q[2], None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, block_mask, config, name):
    return _kernels(config, name)[0](q, k, v, block_mask)


def _attention_forward(q, k, v, block_mask, config, name):
    out, lse = _attention(q, k, v, block_mask, config, name)
    return (out, lse), (q, k, v, block_mask, out, lse)


def _attention_backward(config, name, residuals, gradients):
    block_mask = residuals[3]
    gradients = _kernels(config, name)[1](*residuals, *gradients)
    return *gradients, np.zeros(block_mask.shape, jax.dtypes.float0)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.lru_cache(maxsize=None)
def _kernels(config, name):
    """The two passes of an implementation, independent over sequences and heads."""
    module = dispatch.module(OP, name)
    forward = independent(
        functools.partial(module.forward, config=config), "btghd bsgd bsgd bghnm -> btghd bght", "bgh"
    )
    # k and v receive gradients from every head of their group, which therefore stays together
    backward = independent(
        functools.partial(module.backward, config=config),
        "btghd bsgd bsgd bghnm btghd bght btghd bght -> btghd bsgd bsgd",
        "bg",
    )
    return forward, backward


def reasons(q, config):
    """{implementation: why it cannot run here, or None}, best first."""
    return {
        "pallas_gpu": dispatch.gpu_reason(9, at=q) or dispatch.module(OP, "pallas_gpu").reason(q, config),
        "pallas_tpu": dispatch.tpu_reason(at=q) or dispatch.module(OP, "pallas_tpu").reason(q, config),
        "xla": None,
        "reference": None,
    }


def _check(q, k, v, block_mask, block_q, block_k, soft_cap):
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
    ):
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}; they must be (B, Tq, H, D) and twice "
            "(B, Tk, Hkv, D)"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, which is no multiple of the {k.shape[2]} heads of k and v"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q and k have shapes {q.shape} and {k.shape}; no axis may be empty")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they must be one of bfloat16, float16 and "
            "float32"
        )
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if not isinstance(block, int | np.integer) or block < 1:
            raise ValueError(f"{name} is {block}; it must be an integer of at least 1")
    if soft_cap is not None and not (soft_cap > 0 and math.isfinite(soft_cap)):
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive and finite, or None")
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q), -(-k.shape[1] // block_k))
    if block_mask.dtype != jnp.bool_ or not _broadcasts(block_mask.shape, shape):
        raise ValueError(
            f"block_mask is {block_mask.dtype} of shape {block_mask.shape}; it must be bool and broadcastable to "
            f"{shape} (sequences, heads, query blocks, key blocks)"
        )


def _broadcasts(shape, target):
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
