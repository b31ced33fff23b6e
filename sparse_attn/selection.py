"""The choice of blocks: what routing gives and attention takes."""

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
