"""Block-sparse attention against dense attention, by density; the masks keep the diagonal, as selectors do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import timing
from pallas_kernels.block_sparse_attention import block_sparse_attention


class Case(NamedTuple):
    """One line of the bench: self-attention of one sequence."""

    length: int
    density: float
    causal: bool
    backward: bool
    heads: int
    kv_heads: int
    channels: int
    block: int
    dtype: type

    @property
    def name(self):
        passes = "forward and backward" if self.backward else "forward"
        return f"{self.length} tokens, {self.density:.0%} of blocks, {'causal, ' * self.causal}{passes}"


def cases(size: int | None = None) -> list[Case]:
    """Small problems for CPUs, large ones for accelerators; `size` overrides the length."""
    if jax.default_backend() == "cpu":
        shape, length = (4, 2, 64, 64, jnp.float32), size or 2048
    else:
        shape, length = (16, 4, 128, 128, jnp.bfloat16), size or 32768
    wanted = [(1.0, False, False), (0.25, False, False), (0.1, False, False), (0.05, False, False)]
    wanted += [(0.1, True, False), (0.1, False, True), (0.1, True, True)]
    return [Case(length, *each, *shape) for each in wanted]


def run(case: Case, repeats: int = timing.REPEATS) -> dict:
    """Ours, dense attention (cuDNN's on GPUs) and the fastest peer that runs here."""
    args = _arguments(case)
    on_gpu = jax.default_backend() == "gpu"
    mask = args[3]
    if case.causal:
        mask = mask & np.tril(np.ones(mask.shape[-2:], bool))
    pairs = float(mask.sum()) * case.block**2
    flops = pairs * case.channels * (14 if case.backward else 4)
    width = jnp.dtype(case.dtype).itemsize * case.length * case.channels
    arrays = 2 * case.heads + 2 * case.kv_heads  # q, o, k and v; with gradients these, do, dq, dk and dv
    moved = width * (arrays + (arrays + case.heads + 2 * case.kv_heads if case.backward else 0))
    # at length 32768 the definition's logits do not fit into memory
    truth = "reference" if case.length <= 4096 else "xla"
    expected = timing.blocking(_ours(case, truth), *args)
    dense = _dense(case, "cudnn" if on_gpu else None)
    peers = {} if on_gpu else {"dot_product_attention with a mask": timing.blocking(_masked(case), *args)}
    return timing.compare(
        "block_sparse_attention",
        case.name,
        timing.blocking(_ours(case), *args),
        timing.blocking(dense, *args[:3]),
        peers,
        (flops, moved),
        repeats,
        comparable=lambda _: expected(),
    )


def _arguments(case):
    rng = np.random.default_rng(0)
    shapes = [(1, case.length, heads, case.channels) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    blocks = -(-case.length // case.block)
    mask = rng.random((1, case.heads, blocks, blocks)) < case.density
    mask |= np.eye(blocks, dtype=bool)
    return *(jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes), jnp.asarray(mask)


def _with_gradients(case, attend):
    if not case.backward:
        return attend
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), (0, 1, 2))


def _ours(case, implementation=None):
    blocks = dict(block_q=case.block, block_k=case.block)
    return _with_gradients(
        case,
        lambda q, k, v, mask: block_sparse_attention(
            q, k, v, mask, **blocks, causal=case.causal, implementation=implementation
        ),
    )


def _dense(case, implementation):
    return _with_gradients(
        case,
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=case.causal, implementation=implementation
        ),
    )


def _masked(case):
    def attend(q, k, v, mask):
        mask = mask.repeat(case.block, 2).repeat(case.block, 3)[:, :, : case.length, : case.length]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=case.causal)

    return _with_gradients(case, attend)
