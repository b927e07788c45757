"""What the Mosaic GPU kernels of both passes know of a call."""

import jax.numpy as jnp

from pallas_kernels import flash_gpu
from pallas_kernels.block_sparse_attention.masks import reachable, unmasked
from pallas_kernels.lists import block_lists


class Tiles:
    """Shapes of one call, its lists of blocks, and the logits of a tile."""

    def __init__(self, q, k, block_mask, config):
        self.batch, self.length, self.groups, self.group, self.channels = q.shape
        self.keys_length = k.shape[1]
        self.heads = self.groups * self.group
        self.n, self.m = block_mask.shape[-2:]
        self.config = config
        self.mask = block_mask
        if config.causal:
            self.mask = block_mask & reachable(self.n, self.m, config.block_q, config.block_k)
        self.full = unmasked(self.n, self.m, config.block_q, config.block_k, self.keys_length, config.causal)

    def key_lists(self):
        """Of every row of the mask (batch, head, query block)."""
        return _two_part_lists(self.mask & self.full, self.mask & ~self.full)

    def query_lists(self):
        """Of every (batch, group, key block); entries count (head of the group, query block)."""
        parts = [(self.mask & part).transpose(0, 1, 4, 2, 3) for part in (self.full, ~self.full)]
        return _two_part_lists(*(part.reshape(-1, self.group * self.n) for part in parts))

    def queries(self, x):
        """(B, T, G, R, D) -> (B, whole blocks, heads, D)."""
        return self._pad(x, self.n * self.config.block_q)

    def keys(self, x):
        """(B, S, G, D) -> (B, whole blocks, G, D)."""
        return self._pad(x, self.m * self.config.block_k)

    def _pad(self, x, rows):
        x = x.reshape(*x.shape[:2], -1, self.channels)
        return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0)))

    def scalars(self, x):
        """(B, G, R, T) -> (B, heads, whole blocks)."""
        x = x.reshape(self.batch, self.heads, -1)
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.n * self.config.block_q - x.shape[2])))

    def logits(self, products):
        """Logits to base 2, and their derivative by the scaled products (None if it is 1)."""
        return flash_gpu.logits(products, self.config.scale, self.config.soft_cap)

    def mask_logits(self, logits, first_query, first_key, query_axis, value):
        """Logits with `value` where the query does not see the key."""
        key = first_key + flash_gpu.positions(logits.shape, 1 - query_axis)
        seen = key < self.keys_length
        if self.config.causal:
            seen &= first_query + flash_gpu.positions(logits.shape, query_axis) >= key
        return jnp.where(seen, logits, value)


def _two_part_lists(first, second):
    """Lists of the columns in `first`, then of those in `second`; their lengths, and the lengths of `first`."""
    columns = first.shape[-1]
    both = jnp.concatenate([first, second], -1).reshape(-1, 2 * columns)
    lists, counts = block_lists(both)
    # a column is in one of them at most: half of the room is enough
    return lists[:, :columns] % columns, counts, both[:, :columns].sum(-1, dtype=jnp.int32)
