"""Segments: packed rows for systems that are trained with them, whose segment ids are known at run time only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.blocks import Blocks
from sparse_attn.attend.route import block_means
from sparse_attn.checks import WHOLE_ROWS, Sequences, check_self_attention, check_sequences
from sparse_attn.layout import order_keys


def check_segments(
    query: jax.Array, key: jax.Array, segment_ids: ArrayLike | None, seq_lengths: ArrayLike | None
) -> Sequences:
    """The sequence arguments of causal self-attention, checked with the arrays `[batch, tokens, heads, head_dim]`."""
    check_self_attention(query, key)
    return check_sequences(query, key, WHOLE_ROWS, segment_ids=segment_ids, seq_lengths=seq_lengths, is_causal=True)


def whole_blocks(blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """The blocks that have all their keys, in their order: far fewer than the table of packed rows has entries.

    Example: blocks of 2 keys over segments of 3, 1 and 4 keys have lengths 2, 1, 1, 2, 2; the whole ones are
    `[0, 3, 4]`, and before the blocks stand `[0, 1, 1, 1, 2]` whole ones.

    Returns:
      Ids int32 `[batch, whole]`, of other blocks where a row has fewer, and the number of whole blocks before each
      block, int32 `[batch, blocks]`. There are keys // block_size of them at most; the list has at least one entry.
    """
    is_whole = blocks.block_length == blocks.block_size
    before = jnp.cumsum(is_whole, axis=1, dtype=jnp.int32) - is_whole
    ids = jnp.argsort(~is_whole, axis=1, stable=True).astype(jnp.int32)
    return ids[:, : max(1, blocks.num_keys // blocks.block_size)], before


def means_of(array: jax.Array, blocks: Blocks, ids: jax.Array) -> jax.Array:
    """Mean of each listed block.

    Args:
      array: `[batch, keys, kv_heads, x]` in block order, padding zero.
      blocks: the geometry.
      ids: int32 `[batch, list]`.

    Returns:
      float32 (float64 for float64) `[batch, list, kv_heads, x]`.
    """
    return order_keys(block_means(array, blocks), ids)


def pick(array: jax.Array, places: jax.Array) -> jax.Array:
    """array[b, places[b]] of every row b, or its end: `[batch, n]`, int `[batch, m]` -> `[batch, m]`."""
    return jnp.take_along_axis(array, places, axis=1, mode="clip")


def are_among(first: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """first <= place < first + count, for places below size: int `[batch, t]` twice -> bool `[batch, 1, t, size]`."""
    place = jnp.arange(size) - first[..., None]
    return ((place >= 0) & (place < count[..., None]))[:, None]


def as_lists(chosen: jax.Array, first: jax.Array, blocks: Blocks) -> jax.Array:
    """What each query chose among the whole blocks before its own, as lists of blocks, its own in front.

    Args:
      chosen: int32 `[batch, tokens, kv_heads, list]`, places in the list of whole blocks, -1 for none.
      first: int32 `[batch, tokens]`, the place there of the first block of a query's segment.
      blocks: the geometry, causal.

    Returns:
      int32 `[batch, kv_heads, tokens, 1 + list]`, ids of blocks, -1 for none.
    """
    offset = (blocks.first_block - first)[..., None, None]  # the blocks of a segment before its last are whole
    own = jnp.where(blocks.start < blocks.stop, blocks.last_block, -1)[..., None, None]
    own = jnp.broadcast_to(own, (*chosen.shape[:3], 1))
    return jnp.concatenate([own, jnp.where(chosen >= 0, chosen + offset, -1)], axis=-1).swapaxes(1, 2)


def in_segment_order(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], segment_ids: jax.Array | None
) -> jax.Array:
    """function(*arrays, segment_ids), which counts distances along the row, for segments that may be torn apart.

    Tokens are sorted by their segment before the call, and what it gives `[batch, sequence, heads, x]` is put back.

    Args:
      function: of arrays whose segments are contiguous.
      arrays: `[batch, sequence, heads, x]`.
      segment_ids: int `[batch, sequence]`, or None, which is passed on.
    """
    if segment_ids is None:
        return function(*arrays, None)
    order = jnp.argsort(segment_ids, axis=1, stable=True)
    output = function(*(order_keys(array, order) for array in arrays), pick(segment_ids, order))
    return order_keys(output, jnp.argsort(order, axis=1))
