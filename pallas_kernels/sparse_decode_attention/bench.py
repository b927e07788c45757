"""Decoding over selected pages and over packed caches, against decoding over the whole dense cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import timing
from pallas_kernels.sparse_decode_attention import bitmap, pack, paged


class Case(NamedTuple):
    """One line of the bench: one token of each of some sequences of equal length."""

    kind: str
    length: int
    share: float
    batch: int
    heads: int
    kv_heads: int
    channels: int
    page: int
    dtype: type

    @property
    def name(self):
        part = "of the pages" if self.kind == "paged" else "of the channels packed"
        return f"{self.batch} x {self.length} tokens, {self.share:.3g} {part}"


def cases(size: int | None = None) -> list[Case]:
    """Small problems for CPUs, large ones for accelerators; `size` overrides the length."""
    if jax.default_backend() == "cpu":
        shape, length = (2, 8, 2, 128, 16, jnp.float32), size or 8192
    else:
        shape, length = (4, 32, 8, 128, 64, jnp.bfloat16), size or 65536
    wanted = [("paged", 1.0), ("paged", 1 / 4), ("paged", 1 / 16), ("bitmap", 0.5), ("bitmap", 0.25)]
    return [Case(kind, length, share, *shape) for kind, share in wanted]


def run(case: Case, repeats: int = timing.REPEATS) -> dict:
    """Ours, dense attention to the whole cache and, of pages, gathering them first."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.length, case.kv_heads, case.channels)
    q = jnp.asarray(rng.normal(size=(case.batch, case.heads, case.channels)), case.dtype)
    k, v = (jnp.asarray(rng.normal(size=shape), case.dtype) for _ in range(2))
    dense = timing.blocking(lambda q, k, v: jax.nn.dot_product_attention(q[:, None], k, v)[:, 0], q, k, v)
    ours, expected, peers, tokens, per_token = (_paged if case.kind == "paged" else _bitmap)(
        case, rng, q, k, v
    )
    keys = case.batch * tokens
    return timing.compare(
        "sparse_decode_attention",
        case.name,
        ours,
        dense,
        peers,
        (4.0 * keys * case.heads * case.channels, 2.0 * keys * case.kv_heads * per_token),
        repeats,
        comparable=lambda _: expected(),
    )


def _paged(case, rng, q, k, v):
    """Ours, the truth, the peers, the tokens that are read and the bytes of one in a head."""
    per_sequence = case.length // case.page
    chosen = max(1, int(per_sequence * case.share))
    pools = [x.reshape(-1, case.page, case.kv_heads, case.channels) for x in (k, v)]
    table = np.stack([np.sort(rng.permutation(per_sequence)[:chosen]) for _ in range(case.batch)])
    table = jnp.asarray(table + np.arange(case.batch)[:, None] * per_sequence, jnp.int32)
    lengths = jnp.full(case.batch, chosen * case.page, jnp.int32)
    args = q, *pools, table, lengths

    def gathered(q, k, v, table, lengths):
        k, v = (x[table].reshape(case.batch, -1, *x.shape[2:]) for x in (k, v))
        return jax.nn.dot_product_attention(q[:, None], k, v)[:, 0]

    ours = timing.blocking(lambda *args: paged(*args)[0], *args)
    expected = timing.blocking(lambda *args: paged(*args, implementation="reference")[0], *args)
    peers = {"gather, then dot_product_attention": timing.blocking(gathered, *args)}
    return ours, expected, peers, chosen * case.page, case.channels * jnp.dtype(case.dtype).itemsize


def _bitmap(case, rng, q, k, v):
    """As `_paged`."""
    del rng
    budget = int(case.channels * case.share)
    packed = [jax.jit(pack, static_argnums=1)(x.swapaxes(1, 2), budget) for x in (k, v)]
    args = q, *packed, jnp.full(case.batch, case.length, jnp.int32)
    ours = timing.blocking(lambda *args: bitmap(*args)[0], *args)
    expected = timing.blocking(lambda *args: bitmap(*args, implementation="reference")[0], *args)
    return ours, expected, {}, case.length, case.channels // 8 + budget * jnp.dtype(case.dtype).itemsize
