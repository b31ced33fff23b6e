"""The choice of blocks: what routing gives and attention takes, as lists for tokens or as a map for tiles."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSelection:
    """Which key blocks each query attends.

    Attributes:
      indices: int32 `[batch, heads, queries, top_k]`, ids of the chosen blocks, -1 where a query has fewer. No id may
        stand twice in a row. `route_moba` gives the own block first (causal), then the others by falling score.
      block_size: keys in a block.
      num_blocks: upper bound of the block ids (exclusive).
    """

    indices: jax.Array
    block_size: int = dataclasses.field(metadata={"static": True})
    num_blocks: int = dataclasses.field(metadata={"static": True})

    def to_mask(self) -> jax.Array:
        """The choice as a table: bool `[batch, heads, queries, num_blocks]`. For looking at short sequences."""
        block = jnp.arange(self.num_blocks).reshape(1, 1, 1, 1, -1)
        return (self.indices[..., None] == block).any(axis=-2)

    def density(self) -> jax.Array:
        """Share of the table that is chosen, float32 `[batch, heads]`, between 0 and 1."""
        chosen = (self.indices >= 0).sum(axis=(-2, -1), dtype=jnp.float32)  # [batch, heads]
        return chosen / (self.indices.shape[-2] * self.num_blocks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LevelMap:
    """What each block of queries does with each block of keys.

    Attributes:
      levels: int8 `[batch, heads, query_blocks, key_blocks]`: 0 skip, 1 attend exactly; what a higher level means, an
        approximation of some kind, is the system's own.
      query_block_size: queries in a block.
      key_block_size: keys in a block.
      key_order: int32 `[batch, heads, keys]`, the original index of the key at each place, where keys are put in
        another order before they are cut into blocks; None: as they stand.
    """

    levels: jax.Array
    query_block_size: int = dataclasses.field(metadata={"static": True})
    key_block_size: int = dataclasses.field(metadata={"static": True})
    key_order: jax.Array | None = None

    def to_mask(self) -> jax.Array:
        """The pairs of blocks that are attended exactly: bool `[batch, heads, query_blocks, key_blocks]`."""
        return self.levels == 1

    def density(self) -> jax.Array:
        """Share of the pairs that is attended exactly, float32 `[batch, heads]`, between 0 and 1."""
        return self.to_mask().mean(axis=(-2, -1), dtype=jnp.float32)

    def to_selection(self) -> BlockSelection:
        """The same choice as lists, for maps whose query blocks are single tokens.

        Raises:
          ValueError: query_block_size is not 1.
        """
        if self.query_block_size != 1:
            raise ValueError(f"query_block_size must be 1, got query_block_size={self.query_block_size}")
        num_blocks = self.levels.shape[-1]
        indices = jnp.where(self.to_mask(), jnp.arange(num_blocks, dtype=jnp.int32), -1)
        return BlockSelection(indices, block_size=self.key_block_size, num_blocks=num_blocks)
