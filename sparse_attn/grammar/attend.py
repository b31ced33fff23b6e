"""Attend: exact softmax attention over the pairs of blocks that were chosen."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import NOWHERE, Arrays, Blocks
from sparse_attn import attention
from sparse_attn.attend.backends import Implementation
from sparse_attn.attend.choice import PerTile
from sparse_attn.attend.partial import Partial, as_partial
from sparse_attn.layout import visible_tiles
from sparse_attn.selection import LevelMap


def attend_levels(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    levels: LevelMap,
    blocks: Blocks,
    *,
    scale: float,
    level: int = 1,
    key_log_weight: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Softmax attention of every query over the visible keys of the blocks that its tile has at `level`.

    logits = scale q k + key_log_weight. Gradients flow to query, key and value; softmax and sums are float32.
    Source: FlashAttention-2 (arXiv 2307.08691), sections 2 and 3, over a list of blocks.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: `[batch, keys, kv_heads, value_head_dim]`.
      levels: the choice; its sizes must cover the queries and keys.
      blocks: which keys a query may see inside chosen blocks.
      scale: factor of the logits.
      level: the level of the map that is attended here.
      key_log_weight: float32 `[batch, keys, kv_heads]`, natural logarithm of how many times a key counts; no gradient.
      implementation: as in `moba_attention`.

    Raises:
      ValueError: levels does not fit the arrays.
      NotImplementedError: the implementation cannot do the call.
    """
    batch, num_queries, num_heads, _ = query.shape
    if levels.key_order is not None:
        key, value = (permute_keys(array, levels.key_order) for array in (key, value))
        blocks = dataclasses.replace(blocks, position=levels.key_order.swapaxes(1, 2))
    num_keys = key.shape[1]
    query_block, key_block = levels.query_block_size, levels.key_block_size
    expected = (batch, num_heads, -(-num_queries // query_block), -(-num_keys // key_block))
    if levels.levels.shape != expected:
        raise ValueError(
            f"levels must be [batch, heads, query_blocks, key_blocks] = {expected}, got {levels.levels.shape}"
        )
    query, key, value = _zero_unseen((query, key, value), blocks)
    visible = visible_tiles(dataclasses.replace(blocks, block_size=key_block), query_block)
    chosen = (levels.levels == level) & visible.repeat(num_heads // visible.shape[1], axis=1)
    choice = PerTile(
        chosen,
        dataclasses.replace(blocks, block_size=min(key_block, num_keys)),
        None if key_log_weight is None else jax.lax.stop_gradient(key_log_weight),
        min(query_block, num_queries),
    )
    return as_partial(*attention.attend((query, key, value), choice, scale, implementation))


def permute_keys(key: jax.Array, order: jax.Array) -> jax.Array:
    """Keys or values in each query head's order: `[batch, keys, kv_heads, x]` -> `[batch, keys, heads, x]`.

    order: int32 `[batch, heads, keys]`, the original index of the key at each place.
    """
    key = key.repeat(order.shape[1] // key.shape[2], axis=2)
    return jnp.take_along_axis(key, order.swapaxes(1, 2)[..., None], axis=1)


def _zero_unseen(arrays: Arrays, blocks: Blocks) -> Arrays:
    """The arrays with zeros for queries that see no position and keys that stand nowhere, so that NaN cannot spread."""
    query, key, value = arrays
    query = jnp.where((blocks.start < blocks.stop)[..., None, None], query, 0)
    if blocks.position is None:
        return query, key, value
    is_there = (blocks.position < NOWHERE)[..., None]  # [batch, keys, kv_heads or 1, 1]
    return query, jnp.where(is_there, key, 0), jnp.where(is_there, value, 0)
