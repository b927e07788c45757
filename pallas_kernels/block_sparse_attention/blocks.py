"""Arrays of one attention call as arrays of blocks, and back."""

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.masks import reachable
from pallas_kernels.lists import block_lists


class Problem:
    """Shapes of one call, and the way from arrays to blocks and back.

    Row indices count (batch, group, head of the group, query block), those of keys (batch, group, key block).
    """

    def __init__(self, q, k, block_mask, config):
        self.batch, self.length, self.groups, self.group, _ = q.shape
        self.keys_length = k.shape[1]
        self.n, self.m = block_mask.shape[-2:]
        self.config = config
        self.block_q, self.block_k = config.block_q, config.block_k
        self.mask = block_mask
        if config.causal:
            self.mask = block_mask & reachable(self.n, self.m, self.block_q, self.block_k)

    def key_lists(self):
        """For every row of queries the rows of the key blocks it meets (rows, m), -1 after the end; their numbers."""
        lists, counts = block_lists(self.mask.reshape(-1, self.m))
        first = jnp.arange(lists.shape[0])[:, None] // (self.group * self.n) * self.m
        return jnp.where(lists < 0, -1, first + lists), counts

    def query_lists(self):
        """For every row of keys the rows of the query blocks it meets, of all heads of the group; their numbers."""
        mask = self.mask.transpose(0, 1, 4, 2, 3).reshape(-1, self.group * self.n)
        lists, counts = block_lists(mask)
        first = jnp.arange(lists.shape[0])[:, None] // self.m * self.group * self.n
        return jnp.where(lists < 0, -1, first + lists), counts

    def query_blocks(self, x):
        """(B, T, G, R, D) -> (rows, block_q, D), zeros after the end."""
        x = jnp.pad(x, ((0, 0), (0, self.n * self.block_q - self.length), (0, 0), (0, 0), (0, 0)))
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, self.block_q, x.shape[-1])

    def key_blocks(self, x):
        """(B, S, G, D) -> (rows of keys, block_k, D), zeros after the end."""
        x = jnp.pad(x, ((0, 0), (0, self.m * self.block_k - self.keys_length), (0, 0), (0, 0)))
        return x.transpose(0, 2, 1, 3).reshape(-1, self.block_k, x.shape[-1])

    def scalar_blocks(self, x):
        """(B, G, R, T) -> (rows, block_q)."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.n * self.block_q - self.length)))
        return x.reshape(-1, self.block_q)

    def queries(self, x):
        """The inverse of `query_blocks`."""
        x = x.reshape(self.batch, self.groups, self.group, self.n * self.block_q, -1)
        return x[:, :, :, : self.length].transpose(0, 3, 1, 2, 4)

    def query_scalars(self, x):
        """The inverse of `scalar_blocks`."""
        return x.reshape(self.batch, self.groups, self.group, -1)[..., : self.length]

    def keys(self, x):
        """The inverse of `key_blocks`."""
        x = x.reshape(self.batch, self.groups, self.m * self.block_k, -1)
        return x[:, :, : self.keys_length].transpose(0, 2, 1, 3)
