"""Block-Attention: the passages of a prompt do not see each other, so the keys and values of each can be cached.

Paper: Block-Attention for Efficient Prefilling (arXiv 2409.15355). The prompt is a row of segments given by content,
retrieved passages and last the question. A token attends its own segment up to itself, a token of the last segment
everything up to itself. Nothing is scored. Training and inference use the same mask; a model must be fine-tuned to it.

Reuse of a passage. What a passage computes does not depend on where it stands, but for the rotation of its keys. So
cache its values and its keys before rotation (or undo it: `rotate` with negative positions). For a prompt, concatenate
the caches, `rotate` the keys to the positions they now have, and call `attention` with the queries of the question
alone: queries stand at the end of the keys.

Where code and paper disagree: nowhere found. The authors' server (TemporaryLoRA/Block-Attention at c84e38b) turns keys
back and forth in float32 and rounds to bfloat16 after either turn; keys cached before rotation are spared that. Its
training mask is dense; the tiles of work here are this library's own.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_arrays, check_attention, check_integers, check_positive
from sparse_attn.keys import rotate
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import NOWHERE, Visibility, visible_blocks

__all__ = ["RECIPE", "attention", "rotate", "segment_visibility", "select"]

RECIPE = Recipe(
    name="Block-Attention",
    paper="2409.15355",
    blocks="segments of content",
    describe="none",
    score="none",
    choose="fixed: own segment, causal; the last segment sees all",
    when="prefill; keys and values of passages are cached and re-rotated",
    is_trainable=True,
)


def segment_visibility(query: jax.Array, key: jax.Array, segment_lengths: jax.Array) -> Visibility:
    """The mask as one interval of positions for each query: from the start of its segment, or from 0, to itself.

    Args: those of `attention`.
    """
    check_arrays(query, {"key": key})
    if segment_lengths.ndim != 2:
        raise ValueError(f"segment_lengths must be [batch, segments], got shape {segment_lengths.shape}")
    check_integers("segment_lengths", segment_lengths, (query.shape[0], segment_lengths.shape[1]))
    num_queries, num_keys = query.shape[1], key.shape[1]
    end = jnp.cumsum(segment_lengths, axis=1, dtype=jnp.int32)[:, None]  # [batch, 1, segments]
    begin = end - segment_lengths[:, None].astype(jnp.int32)
    position = jnp.arange(num_keys, dtype=jnp.int32)[None]  # [1, keys]
    place = jnp.arange(num_keys - num_queries, num_keys, dtype=jnp.int32)[None, :, None]  # [1, queries, 1]
    is_own = (begin <= place) & (place < end)  # [batch, queries, segments]
    start = jnp.where(is_own[..., :-1], begin[..., :-1], 0).sum(-1)  # the last segment sees from 0
    stop = jnp.where(is_own.any(-1), place[..., 0] + 1, 0)
    return Visibility(start, stop, jnp.where(position < end[:, :, -1], position, NOWHERE)[..., None])


@splits_over_mesh("bh", segment_lengths="b")
def select(
    query: jax.Array,
    key: jax.Array,
    segment_lengths: jax.Array,
    *,
    query_block_size: int = 64,
    key_block_size: int = 64,
) -> LevelMap:
    """The tiles that hold some visible pair, alike in all heads. Inside them `segment_visibility` decides.

    Args: those of `attention`.
    """
    check_positive("query_block_size", query_block_size)
    check_positive("key_block_size", key_block_size)
    visibility = segment_visibility(query, key, segment_lengths)
    levels = visible_blocks(visibility, query_block_size, key_block_size)  # [batch, 1, query_blocks, key_blocks]
    levels = jnp.broadcast_to(levels, (levels.shape[0], query.shape[2], *levels.shape[2:]))
    return LevelMap(levels.astype(jnp.int8), query_block_size, key_block_size)


@splits_over_mesh(segment_lengths="b")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_lengths: jax.Array,
    *,
    query_block_size: int = 64,
    key_block_size: int = 64,
    scale: float | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q K^T) V, over the own segment, or over everything from the last one.

    Args:
      query: `[batch, queries, heads, head_dim]`. With fewer queries than keys, query t stands at the place of key
        keys - queries + t: the question after cached passages.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype, rotated already; heads is a multiple of kv_heads.
      value: shaped like key.
      segment_lengths: int `[batch, segments]`, tokens of each segment, the question's last; rows with fewer passages
        hold zeros among them. Keys behind the sum are padding that nobody sees.
      query_block_size: queries in a tile of work; changes nothing in the result. So does
      key_block_size: keys in a tile.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype; zeros for queries in the padding.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    scale = check_attention(query, key, value, scale)
    sizes = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    levels = select(query, key, segment_lengths, **sizes)
    visibility = segment_visibility(query, key, segment_lengths)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)
