"""BSFA: every tile of logits is computed; where its largest one stays under a calibrated threshold, values are skipped.

Paper: Block Sparse Flash Attention (arXiv 2512.07011). Training-free, for causal prefill of whole prompts. With
m_ij = max over the queries of block i and the keys of block j of scale q k, a tile wholly before its query block is
attended exactly if m_ij >= thresholds[head, i]; tiles that overlap the query block always are. The comparison is with
a fixed number, not with the running maximum of the softmax, so the order of tiles does not matter. The choice needs
all products of queries and keys: what can be saved is the other half, the products with values.

The table belongs to one model and length. For one layer it is float32 `[heads, rows]`; row i is for query block i, and
query blocks past the last row take the last. A model's table is `[layers, heads, rows]`: give `attention` the one of
its layer. -inf keeps everything.

Calibration: for every (head, query block) of an example the threshold lies half-way between the top_k-th and the next
largest maximum of the tiles before the query block, -inf if there are not more than top_k; then the mean over examples.

    table = jnp.stack([calibrate(query[layer], key[layer], top_k=64) for layer in range(num_layers)])
    output = attention(query[layer], key[layer], value[layer], table[layer])

Defaults: tiles of 128 queries and 64 keys; top_k 64 (the authors ship 64 and 96 for general use, 32 for retrieval),
mean over 16 examples. Prompts of at most 128 tokens are dense, being one query block.

Where code and paper disagree: the authors' readme (Danielohayon/Block-Sparse-Flash-Attention at c3ee81e) says that the
table is indexed by key block; their kernel and calibration index it by query block, which is followed. Where the length
is no multiple of the tile, their kernel keeps one tile before the query block more, which is not done here. Their
kernel needs a GPU: its calibration is compared with, its attention is not.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import score
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="BSFA",
    paper="2512.07011",
    blocks="128 / 64",
    describe="none",
    score="largest exact logit of the tile",
    choose="per query block and head: above a calibrated threshold; diagonal forced",
    when="prefill, above 128 tokens",
)

Aggregation = Literal["mean", "median"]


def _tile_maxima(
    query: jax.Array, key: jax.Array, *, query_block_size: int, key_block_size: int, scale: float | None
) -> tuple[jax.Array, jax.Array]:
    """m_ij, float32 `[batch, heads, query_blocks, key_blocks]`, -inf in the future; and which tiles lie before their
    query block, bool `[query_blocks, key_blocks]`.
    """
    scale = check_attention(query, key, key, scale)
    check_self_attention(query, key)
    check_positive("query_block_size", query_block_size)
    check_positive("key_block_size", key_block_size)
    query, key = jax.lax.stop_gradient((query, key))
    visibility = make_visibility(query, key, is_causal=True)
    maxima = score.exact_blocks(
        query, key, visibility, query_block_size=query_block_size, key_block_size=key_block_size, scale=scale
    )
    start = query_block_size * jnp.arange(maxima.shape[2])
    end = key_block_size * (jnp.arange(maxima.shape[3]) + 1)
    return maxima, end[None, :] <= start[:, None]


def calibrate(
    query: jax.Array,
    key: jax.Array,
    *,
    top_k: int = 64,
    aggregation: Aggregation = "mean",
    query_block_size: int = 128,
    key_block_size: int = 64,
    scale: float | None = None,
) -> jax.Array:
    """One layer's thresholds, from its queries and keys in examples of one length.

    Args:
      query: `[examples, tokens, heads, head_dim]`.
      key: `[examples, tokens, kv_heads, head_dim]`.
      top_k: tiles before the query block that its threshold keeps.
      aggregation: how examples are brought together, "mean" or "median".
      query_block_size, key_block_size, scale: as in `attention`.

    Returns:
      float32 `[heads, query_blocks]`.
    """
    check_positive("top_k", top_k)
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {aggregation=}")
    sizes = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    maxima, is_before = _tile_maxima(query, key, **sizes, scale=scale)
    has_threshold = is_before.sum(-1) > top_k  # [query_blocks]
    best, _ = jax.lax.top_k(jnp.where(is_before[None, None], maxima, -jnp.inf), min(top_k + 1, maxima.shape[-1]))
    midpoint = best[..., -2:].mean(-1)  # -inf where there are fewer
    midpoint = midpoint.mean(0) if aggregation == "mean" else jnp.median(midpoint, axis=0)
    return jnp.where(has_threshold[None], midpoint, -jnp.inf)


@splits_over_mesh("bh", thresholds="h")
def select(
    query: jax.Array,
    key: jax.Array,
    thresholds: jax.Array,
    *,
    query_block_size: int = 128,
    key_block_size: int = 64,
    scale: float | None = None,
) -> LevelMap:
    """The tiles that are attended, levels 0 and 1. Args: those of `attention`."""
    sizes = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    maxima, is_before = _tile_maxima(query, key, **sizes, scale=scale)
    if thresholds.ndim != 2 or thresholds.shape[0] != query.shape[2] or thresholds.shape[1] < 1:
        raise ValueError(
            f"thresholds must be [{query.shape[2]} heads, at least 1 row], got thresholds.shape={thresholds.shape}"
        )
    row = jnp.minimum(jnp.arange(maxima.shape[2]), thresholds.shape[1] - 1)
    is_kept = (maxima >= thresholds[:, row][None, :, :, None]) | ~is_before[None, None]
    return LevelMap((is_kept & (maxima > -jnp.inf)).astype(jnp.int8), query_block_size, key_block_size)


@splits_over_mesh(thresholds="h")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    thresholds: jax.Array,
    *,
    query_block_size: int = 128,
    key_block_size: int = 64,
    scale: float | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q K^T) V, over the tiles that `select` keeps.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      thresholds: float `[heads, rows]`, this layer's part of the table, for the same scale and sizes.
      query_block_size, key_block_size: tokens in a block; the last may be shorter.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype. A ValueError names a wrong argument.
    """
    scale = check_attention(query, key, value, scale)
    sizes = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    levels = select(query, key, thresholds, **sizes, scale=scale)
    visibility = make_visibility(query, key, is_causal=True)
    return attend_tiles(query, key, value, levels, visibility, scale=scale).output().astype(query.dtype)
