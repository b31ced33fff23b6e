"""Combiner, fixed form: every token attends its own region token by token and each other region through a summary.

Paper: Combiner: Full Attention Transformer with Sparse Computation Cost (arXiv 2107.05768). Attention is an expectation
over p(j | i), the weight of key j for query i. Keys j of i's own region are met directly; a key of another region r has
p(j | i) = p(r | i) p(j | r), where p(j | r) knows nothing of i, so that the mean value of a region is shared by all
queries. Every key thus gets a weight above 0, at the cost of a sparse pattern. With block_size about the square root of
the length the cost is of order length^1.5.

The variant here is Combiner-Fixed, the one that is a single softmax over disjoint keys. Regions are blocks. With q~_r
and k~_r the largest query and key of region r, channel by channel, and logits scaled by 1 / sqrt(head_dim):
    p(j | r) = softmax over j in r of q~_r k_j; value of the region: sum over j of p(j | r) v_j;
    p(j | i) for own j and p(r | i): one softmax over q_i k_j for own keys j and q_i k~_r for the other regions r.
A region counts once, not once for each of its tokens. Causal: own keys up to i and earlier regions. The log-sparse and
axial variants (nested or crossing regions) and learned summaries are not here.

Default: regions of 128 tokens, causal.

Where code and paper disagree: the authors' code (google-research/google-research, combiner/: `sqrt_fixed_full` in TF,
`_SelfAttSqrtn` in JAX) is followed in its default pooling, the maximum. Corrected: without causality the TF code counts
the own region twice, directly and through its summary; here the summary of the own region is left out.
"""

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import rest, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.merge import merge
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="Combiner-Fixed",
    paper="2107.05768",
    blocks="128 / 128",
    describe="channel-wise largest query and key; mean value weighted by softmax of their match",
    score="dot with the summary key",
    choose="fixed: own block exactly, other (earlier) blocks through the summary",
    rest="region summary, counted once",
    is_trainable=True,
)


@splits_over_mesh("bh")
def select(query: jax.Array, key: jax.Array, *, block_size: int = 128, is_causal: bool = True) -> LevelMap:
    """Level 1 for the own region, 2 (summary) for the others, 0 for later ones if causal; alike in all rows and heads.

    Args: those of `attention`.
    """
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    batch, num_tokens, num_heads, _ = query.shape
    block = jnp.arange(-(-num_tokens // block_size))
    is_own = block[:, None] == block[None]
    is_other = block[:, None] > block[None] if is_causal else ~is_own
    levels = jnp.where(is_own, 1, jnp.where(is_other, 2, 0)).astype(jnp.int8)
    levels = jnp.broadcast_to(levels, (batch, num_heads, *levels.shape))
    return LevelMap(levels, query_block_size=block_size, key_block_size=block_size)


def summarize(
    query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The key k~_r and the value sum_j p(j | r) v_j of every region.

    Args:
      query, key, value: as in `attention`.
      block_size: tokens in a region.
      scale: factor of the logits q~_r k_j.

    Returns:
      Both float32 (float64 for float64) `[batch, regions, heads, head_dim]`: the weights come from queries, so every
      query head has a value of its own. The keys are repeated to as many heads; there is one a region.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    kv_heads, dtype = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (split_blocks(array.astype(dtype), block_size) for array in (query, key, value))
    is_there = split_blocks(jnp.ones((1, num_tokens, 1, 1), bool), block_size)  # [1, regions, block_size, 1, 1]
    largest_query, largest_key = (jnp.where(is_there, array, -jnp.inf).max(2) for array in (query, key))
    grouped = largest_query.reshape(batch, -1, kv_heads, num_heads // kv_heads, head_dim)
    # Axes: b batch, r regions, k key/value heads, g query heads of one, s keys of a region, d head_dim.
    logits = scale * jnp.einsum("brkgd,brskd->brkgs", grouped, key, precision="highest")
    weight = score.softmax(logits, is_there[:, :, None, None, :, 0, 0])
    mean = jnp.einsum("brkgs,brskd->brkgd", weight, value, precision="highest")
    return largest_key.repeat(num_heads // kv_heads, axis=2), mean.reshape(batch, -1, num_heads, head_dim)


@splits_over_mesh()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int = 128,
    is_causal: bool = True,
    scale: float | None = None,
) -> jax.Array:
    """One softmax over the keys of the own region and the summaries of the others, as the module's text defines it.

    Args:
      query: `[batch, tokens, heads, head_dim]`.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      block_size: tokens in a region, at least 1; the last may be shorter.
      is_causal: whether a query sees only keys up to its own place, and only earlier regions.
      scale: factor of all logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    scale = check_attention(query, key, value, scale)
    levels = select(query, key, block_size=block_size, is_causal=is_causal)
    own = attend_tiles(query, key, value, levels, make_visibility(query, key, is_causal=is_causal), scale=scale)
    stand_ins = summarize(query, key, value, block_size=block_size, scale=scale)
    others = rest.pooled(
        query, *stand_ins, jnp.zeros((1, 1)), levels.levels == 2, query_block_size=block_size, scale=scale
    )
    return merge(own, others).output().astype(query.dtype)
