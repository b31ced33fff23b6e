"""Who may see whom, whatever was chosen: causality, padding and content, by the positions tokens had in the text."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NOWHERE = jnp.iinfo(jnp.int32).max
"""The position of a key that nobody sees."""


class Visibility(NamedTuple):
    """A query sees the keys whose position p has start <= p < stop. All int32.

    Positions are those of the original text, so that permuted keys stay causal.

    Attributes:
      start: `[batch, queries]`, first position that the query may see.
      stop: `[batch, queries]`, one past the last.
      position: `[batch, keys, kv_heads]`, or `[batch, keys, 1]` for all heads; NOWHERE for padding.
    """

    start: jax.Array
    stop: jax.Array
    position: jax.Array


def make_visibility(query: jax.Array, key: jax.Array, *, is_causal: bool) -> Visibility:
    """Visibility of whole sequences in their order; causal positions align at the end, as in S5.

    Args:
      query: `[batch, queries, heads, head_dim]`; only its shape counts, as does key's.
      key: `[batch, keys, kv_heads, head_dim]`.
      is_causal: whether a query sees only keys up to its own position.
    """
    batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    stop = jnp.arange(num_queries, dtype=jnp.int32) + 1 + num_keys - num_queries
    stop = jnp.maximum(stop, 0) if is_causal else jnp.full(num_queries, num_keys, jnp.int32)
    stop = jnp.broadcast_to(stop, (batch, num_queries))
    position = jnp.arange(num_keys, dtype=jnp.int32)[None, :, None]
    return Visibility(jnp.zeros_like(stop), stop, jnp.broadcast_to(position, (batch, num_keys, 1)))


def visible_blocks(visibility: Visibility, query_block_size: int, key_block_size: int) -> jax.Array:
    """Pairs of blocks in which some query may see some key, judged by the ends of each block's positions.

    bool `[batch, kv_heads or 1, query_blocks, key_blocks]`. Exact where the positions of a key block and the reach of
    its queries have no gaps; otherwise it may count a pair too many, never one too few.
    """
    start, stop, position = visibility

    def ends(array: jax.Array, is_there: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
        """Least and largest number of each block, `[batch, tokens, x]` -> `[batch, blocks, x]`."""
        fill = ((0, 0), (0, -array.shape[1] % block_size), (0, 0))
        is_there = jnp.pad(is_there, fill).reshape(array.shape[0], -1, block_size, array.shape[2])
        array = jnp.pad(array, fill).reshape(is_there.shape)
        return jnp.where(is_there, array, NOWHERE).min(2), jnp.where(is_there, array, -1).max(2)

    is_seeing = (start < stop)[..., None]  # [batch, queries, 1]
    first, _ = ends(start[..., None], is_seeing, query_block_size)  # [batch, query_blocks, 1]
    _, last = ends(stop[..., None] - 1, is_seeing, query_block_size)
    nearest, farthest = ends(position, position < NOWHERE, key_block_size)  # [batch, key_blocks, kv_heads or 1]
    nearest, farthest = (array.swapaxes(1, 2)[:, :, None, :] for array in (nearest, farthest))
    return (nearest <= last[:, None]) & (first[:, None] <= farthest)


def zero_unseen(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays with zeros for queries that see no position and keys that stand NOWHERE, so that NaN cannot spread.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`; so is value.
      visibility: who sees whom.
    """
    is_seeing = (visibility.start < visibility.stop)[..., None, None]  # [batch, queries, 1, 1]
    is_there = (visibility.position < NOWHERE)[..., None]  # [batch, keys, kv_heads or 1, 1]
    return jnp.where(is_seeing, query, 0), jnp.where(is_there, key, 0), jnp.where(is_there, value, 0)
