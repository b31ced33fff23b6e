"""PBS-Attn: keys sorted inside segments, so that the important ones share blocks, before blocks are chosen.

Paper: Sparser Block-Sparse Attention via Token Permutation (arXiv 2510.21270). Training-free causal prefill. In every
whole segment the keys, and the values with them, are sorted by the mean softmax weight that the last block of queries
gives them; softmax does not mind the order, and causality survives because no key leaves its segment and masks go by
original positions. Block means of queries and sorted keys are compared, softmax(Q K^T / sqrt(d)) over the blocks of
earlier segments; a query block takes the shortest prefix whose mass reaches `threshold`, the block that now holds the
first token, and all blocks of its own segment.

Defaults: blocks of 128, segments of 256, threshold 0.9, mean pooling (maximum in other runs). Rows of at most one
segment are dense.

Where code and paper disagree: nowhere found. The authors' code (xinghaow99/pbs-attn at 8ce8e02) is followed: the
sorting softmax runs over whole segments only and without causality, and a short last block is pooled with zeros for
what is missing. Theirs needs as many key/value heads as query heads. Here every query head sorts for itself, which
under grouped heads makes a copy of keys and values for each of them.
"""

import functools
import itertools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="PBS-Attn",
    paper="2510.21270",
    order="keys sorted inside segments by the last query block's weights",
    blocks="128 / 128",
    describe="mean",
    score="softmax over the blocks of earlier segments",
    choose="per query block and head: share of the mass; first token's block and own segment forced",
    when="prefill longer than a segment",
)

Pool = Literal["mean", "max"]
Pools = Pool | tuple[Pool, Pool]


def sort_scores(query: jax.Array, key: jax.Array, *, block_size: int, segment_size: int, scale: float) -> jax.Array:
    """Mean weight of the last block_size queries on every key of a whole segment, softmax over these keys.

    float32 `[batch, heads, keys of whole segments]`. Args: those of `select`.
    """
    key = key[:, : key.shape[1] // segment_size * segment_size]
    return score.softmax(scale * score.dot(query[:, -block_size:], key)).mean(2)


def sort_keys(scores: jax.Array, num_keys: int, segment_size: int) -> jax.Array:
    """The original key at each place: falling score inside every whole segment, ties to the earlier; the rest as it is.

    `sort_scores` -> int32 `[batch, heads, num_keys]`.
    """
    scores = scores if num_keys > segment_size else jnp.zeros_like(scores)  # a single segment stays as it is
    segments = scores.reshape(*scores.shape[:2], -1, segment_size)
    order = jnp.argsort(segments, axis=-1, descending=True, stable=True)
    order += segment_size * jnp.arange(segments.shape[2])[:, None]
    rest = jnp.broadcast_to(jnp.arange(scores.shape[2], num_keys), (*scores.shape[:2], num_keys - scores.shape[2]))
    return jnp.concatenate([order.reshape(scores.shape), rest], axis=-1).astype(jnp.int32)


def permute_keys(key: jax.Array, order: jax.Array) -> jax.Array:
    """Keys or values in each query head's order: `[batch, keys, kv_heads, x]` -> `[batch, keys, heads, x]`."""
    key = key.repeat(order.shape[1] // key.shape[2], axis=2)
    return jnp.take_along_axis(key, order.swapaxes(1, 2)[..., None], axis=1)


def score_blocks(
    query: jax.Array, permuted_key: jax.Array, *, block_size: int, segment_size: int, scale: float, pool: Pools
) -> jax.Array:
    """Softmax of scaled dot products of pooled blocks over the blocks of earlier segments, 0 elsewhere.

    float32 `[batch, heads, query_blocks, key_blocks]`. Args: those of `select`; keys as `permute_keys` gives them.
    """
    dtype, pools = jnp.promote_types(query.dtype, jnp.float32), (pool, pool) if isinstance(pool, str) else pool
    blocks = [split_blocks(array.astype(dtype), block_size) for array in (query, permuted_key)]
    described = (array.mean(2) if one == "mean" else array.max(2) for array, one in zip(blocks, pools, strict=True))
    scores = scale * score.dot(*described)
    segment = jnp.arange(scores.shape[-1]) * block_size // segment_size
    return score.softmax(scores, segment[None, :] < segment[:, None])


# Heads stay together where each has its own threshold.
_split = functools.partial(splits_over_mesh, whole=lambda options: "h" * isinstance(options.get("threshold"), tuple))


@_split("bh")
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    threshold: float | tuple[float, ...] = 0.9,
    block_size: int = 128,
    segment_size: int = 256,
    pool: Pools = "mean",
    keep_first: bool = True,
    scale: float | None = None,
) -> tuple[LevelMap, jax.Array]:
    """Which blocks of sorted keys each query block attends, and the order of keys, int32 `[batch, heads, keys]`.

    Args:
      query, key, scale: those of `attention`.
      threshold: share of the mass of earlier segments that is kept, or one for each head, between 0 and 1; one block at
        least.
      block_size: tokens in a block; the last may be shorter.
      segment_size: tokens in a segment, a multiple of block_size.
      pool: what a block is known by, the "mean" or the "max" of its tokens; or one for queries and one for keys.
      keep_first: whether the block that holds the first token is forced.
    """
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    check_positive("segment_size", segment_size)
    if segment_size % block_size:
        raise ValueError(f"segment_size must be a multiple of {block_size=}, got segment_size={segment_size}")
    if pool not in itertools.chain(get_args(Pool), itertools.product(get_args(Pool), repeat=2)):
        raise ValueError(f"pool must be one or two of {get_args(Pool)}, got pool={pool!r}")
    if isinstance(threshold, tuple) and len(threshold) != query.shape[2]:
        raise ValueError(f"threshold must be a number or one for each of {query.shape[2]} heads, got {threshold=}")
    share = jnp.maximum(jnp.asarray(threshold, jnp.float32), 1e-37).reshape(-1, 1, 1)  # takes the best one at least
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = jax.lax.stop_gradient((query, key))
    scores = sort_scores(query, key, block_size=block_size, segment_size=segment_size, scale=scale)
    order = sort_keys(scores, key.shape[1], segment_size)
    probability = score_blocks(
        query, permute_keys(key, order), block_size=block_size, segment_size=segment_size, scale=scale, pool=pool
    )
    block = jnp.arange(probability.shape[-1])
    segment = block * block_size // segment_size
    is_first = ((order == 0).argmax(-1) // block_size)[:, :, None, None] == block  # holds the first token
    chosen = choose.top_p(probability, share) | (keep_first & is_first & (segment[None, :] <= segment[:, None]))
    chosen |= segment[None, :] == segment[:, None]
    return LevelMap(chosen.astype(jnp.int8), block_size, block_size), order


@_split()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    **options: Any,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q K^T) V, of every query block over its chosen blocks of sorted keys.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      options: the others of `select`.

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    scale = check_attention(query, key, value, scale)
    levels, order = select(query, key, scale=scale, **options)
    visibility = make_visibility(query, key, is_causal=True)._replace(position=order.swapaxes(1, 2))
    key, value = permute_keys(key, order), permute_keys(value, order)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)
