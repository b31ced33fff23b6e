"""What is attended: the two forms in which every backend is told a choice. Neither carries a gradient."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerQuery:
    """Every query of every head chose for itself: a list of blocks.

    Attributes:
      indices: int32 `[batch, heads, queries, top_k]`, none twice in a list; -1 for none.
      blocks: the geometry of the call.
    """

    indices: jax.Array
    blocks: Blocks

    @property
    def key_log_weight(self) -> None:
        """A key counts once."""

    def axes(self) -> "PerQuery":
        """The axes of the arrays as words, see `sparse_attn.sharding`."""
        return PerQuery("bh", self.blocks.axes())  # type: ignore[arg-type]

    def mask(self) -> jax.Array:
        """Which keys every query attends, bool `[batch, heads, queries, keys]`."""
        blocks = self.blocks
        block = jnp.arange(blocks.num_blocks).reshape(1, 1, 1, 1, -1)
        is_chosen = (self.indices[..., None] == block).any(-2)  # [batch, heads, queries, blocks]
        is_chosen = jnp.take_along_axis(is_chosen, blocks.block_of_key()[:, None, None, :], axis=-1)
        return is_chosen & _is_seen(blocks, self.indices.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerTile:
    """Every tile of queries chose blocks for all its queries: a table.

    Attributes:
      chosen: bool `[batch, heads, query_blocks, key_blocks]`.
      blocks: the geometry of the call, without segments.
      key_log_weight: float32 `[batch, keys, kv_heads or 1]`, natural logarithm of how often a key counts; None: once.
      query_block_size: queries in a tile.
    """

    chosen: jax.Array
    blocks: Blocks
    key_log_weight: jax.Array | None
    query_block_size: int = dataclasses.field(metadata={"static": True})

    def axes(self) -> "PerTile":
        """The axes of the arrays as words, see `sparse_attn.sharding`."""
        weight = self.key_log_weight
        word = None if weight is None else "b.k" if weight.shape[2] > 1 else "b"
        return PerTile("bh", self.blocks.axes(), word, self.query_block_size)  # type: ignore[arg-type]

    def mask(self) -> jax.Array:
        """Which keys every query attends, bool `[batch, heads, queries, keys]`."""
        chosen = self.chosen.repeat(self.query_block_size, 2)[:, :, : self.blocks.start.shape[1]]
        chosen = chosen.repeat(self.blocks.block_size, 3)[..., : self.blocks.num_keys]
        return chosen & _is_seen(self.blocks, chosen.shape[1])


Choice = PerQuery | PerTile


def _is_seen(blocks: Blocks, num_heads: int) -> jax.Array:
    """Which keys every query may see, bool `[batch, heads or 1, queries, keys]`."""
    position = blocks.key_position().swapaxes(1, 2)[:, :, None]  # [batch, kv_heads or 1, 1, keys]
    is_seen = (blocks.start[:, None, :, None] <= position) & (position < blocks.stop[:, None, :, None])
    return is_seen if is_seen.shape[1] == 1 else is_seen.repeat(num_heads // is_seen.shape[1], axis=1)
