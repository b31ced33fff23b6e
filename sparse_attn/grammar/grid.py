"""Grid: the table of tiles of queries by blocks of keys, for rows that are one whole sequence each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.selection import LevelMap


@dataclasses.dataclass(frozen=True)
class Grid:
    """Blocks of one size along queries and keys, which are longer by whole blocks, if at all.

    Example: 3 tiles, 4 blocks, causal:

        first      visible    diagonal
        1 0 0 0    1 1 0 0    0 1 0 0
        1 0 0 0    1 1 1 0    0 0 1 0
        1 0 0 0    1 1 1 1    0 0 0 1

    Attributes:
      block_size: tokens in a block.
      query_blocks: tiles of queries.
      key_blocks: blocks of keys.
      is_causal: whether a query sees only keys up to its own position.
    """

    block_size: int
    query_blocks: int
    key_blocks: int
    is_causal: bool

    @classmethod
    def of(cls, query: jax.Array, key: jax.Array, block_size: int, *, is_causal: bool) -> "Grid":
        """The grid of `[batch, queries, heads, head_dim]` and `[batch, keys, kv_heads, head_dim]`."""
        return cls(block_size, -(-query.shape[1] // block_size), -(-key.shape[1] // block_size), is_causal)

    @property
    def row(self) -> np.ndarray:
        """The block at which each tile stands, int `[query_blocks, 1]`: positions align at the end."""
        return np.arange(self.query_blocks)[:, None] + self.key_blocks - self.query_blocks

    @property
    def column(self) -> np.ndarray:
        """The number of each block, int `[1, key_blocks]`."""
        return np.arange(self.key_blocks)[None]

    @property
    def first(self) -> np.ndarray:
        """The first block of every tile, bool `[query_blocks, key_blocks]`."""
        return (self.column == 0) & (self.row >= 0)

    @property
    def diagonal(self) -> np.ndarray:
        """The block of every tile at its own position, bool `[query_blocks, key_blocks]`."""
        return self.column == self.row

    @property
    def visible(self) -> np.ndarray:
        """The blocks that some query of a tile may see, bool `[query_blocks, key_blocks]`."""
        return (self.column <= self.row) | (not self.is_causal)

    def choose(self, levels: jax.Array) -> LevelMap:
        """The choice of bool or integer levels `[batch, heads, query_blocks, key_blocks]`, 0 out of sight."""
        levels = jnp.where(self.visible, levels, 0).astype(jnp.int8)
        return LevelMap(levels, self.block_size, self.block_size)
