"""NSA: three attentions side by side - over block means, over a few whole blocks, over a window - added under gates.

Paper: Native Sparse Attention (arXiv 2502.11089). Causal. Every query token
  1. attends the mean key and value of every block that has ended (the compressed branch);
  2. takes the softmax weights of 1, adds them up over the query heads of a key/value head, and attends the tokens of
     the `top_k` best blocks, the own block always among them (the selected branch; one choice for the group);
  3. attends the last `window_size` tokens.
The output is the sum of the three, each times its gate: a number for every token and query head that the model computes
(in the paper a sigmoid of the token's features). Gradients flow through branches and gates, not through the choice.

Defaults: block_size 64, top_k 16, window_size 512.

Where code and paper disagree. Followed is the reference of fla-org/native-sparse-attention (at bd67af5): descriptions
are means over the selected branch's own blocks and only the own block is forced. The paper has learned compression of
overlapping blocks (32 tokens, every 16), keys and values of its own for each branch, and also forces the first block.
The reference's path for packed sequences writes block 0 where a query has fewer than top_k blocks and so counts it
several times; here such places stay empty. Its means count the padding behind a ragged end, which nobody attends.
"""

from typing import cast

import jax
import jax.numpy as jnp

from sparse_attn.attention import block_sparse_attention
from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, rest, score
from sparse_attn.grammar.describe import block_mean
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.window import sliding_window_attention

RECIPE = Recipe(
    name="NSA",
    paper="2502.11089",
    blocks="1 / 64",
    describe="mean key",
    score="softmax, summed over the query heads of a key/value head",
    choose="per query token and key/value head: top-k, own block forced and counted",
    rest="mean key and value of every block, chosen or not; window of the last tokens",
    merge="sum of three outputs under gates",
    is_trainable=True,
)


def compressed_weights(
    query: jax.Array, means: jax.Array, position: jax.Array, *, block_size: int, scale: float
) -> jax.Array:
    """The weights of the compressed branch: softmax(scale q mean) over the blocks that end at or before the query.

    Args:
      query: `[batch, t, heads, head_dim]`.
      means: `[batch, blocks, kv_heads, head_dim]`.
      position: int `[t]`, places of the queries.
      block_size, scale: those of `attention`.

    Returns:
      float32 `[batch, heads, t, blocks]`; zeros for a query before the end of the first block.
    """
    num_ended = (position + 1) // block_size  # [t]
    has_ended = jnp.arange(means.shape[1])[None] < num_ended[:, None]
    return score.softmax(scale * score.dot(query, means), has_ended[None, None])


def group_scores(weights: jax.Array, position: jax.Array, *, block_size: int, kv_heads: int) -> jax.Array:
    """`compressed_weights` with 1 for the own block, summed over the query heads of each key/value head.

    float32 `[batch, kv_heads, t, blocks]`.
    """
    batch, _, num_queries, num_blocks = weights.shape
    is_own = jnp.arange(num_blocks)[None] == (position // block_size)[:, None]  # [t, blocks]
    weights = jnp.where(is_own[None, None], 1, weights)
    return weights.reshape(batch, kv_heads, -1, num_queries, num_blocks).sum(2)


@splits_over_mesh("bh")
def select(
    query: jax.Array, key: jax.Array, *, block_size: int = 64, top_k: int = 16, scale: float | None = None
) -> BlockSelection:
    """The blocks of the selected branch, alike for the query heads of a key/value head. Args: those of `attention`.

    Returns:
      BlockSelection with indices int32 `[batch, heads, tokens, top_k]`: the own block first, then by falling score, -1
      where a query has fewer blocks.
    """
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    scale = check_attention(query, key, key, scale)
    query, key = jax.lax.stop_gradient((query, key))
    batch, _, num_heads, _ = query.shape
    kv_heads = key.shape[2]
    means = block_mean(key, block_size)
    num_blocks = means.shape[1]

    def choose_blocks(position: jax.Array, query: jax.Array) -> jax.Array:
        weights = compressed_weights(query, means, position, block_size=block_size, scale=scale)
        scores = group_scores(weights, position, block_size=block_size, kv_heads=kv_heads)
        block, own = jnp.arange(num_blocks)[None], (position // block_size)[:, None]
        scores = jnp.where((block == own)[None, None], jnp.inf, scores)  # another block may have all the weight too
        scores = jnp.where((block <= own)[None, None], scores, -jnp.inf)
        return choose.top_k_indices(scores, top_k).swapaxes(1, 2)

    elements = batch * num_heads * num_blocks
    indices = choose.by_queries(choose_blocks, (query,), elements_per_query=elements)  # [batch, tokens, kv_heads, k]
    indices = indices.swapaxes(1, 2).repeat(num_heads // kv_heads, axis=1)
    return BlockSelection(indices, block_size=block_size, num_blocks=num_blocks)


@splits_over_mesh(gates="b.h")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gates: jax.Array,
    *,
    block_size: int = 64,
    top_k: int = 16,
    window_size: int = 512,
    scale: float | None = None,
) -> jax.Array:
    """gates_0 compressed + gates_1 selected + gates_2 window, each softmax(scale q K^T) V over its own keys.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      gates: floating point `[batch, tokens, heads, 3]`, of the compressed, the selected and the window branch.
      block_size: tokens in a block; the last may be short.
      top_k: blocks of the selected branch, the own one included.
      window_size: tokens of the window, the query's own included. 0: no window.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    check_self_attention(query, key)
    scale = check_attention(query, key, value, scale)
    if gates.shape != (*query.shape[:3], 3) or not jnp.issubdtype(gates.dtype, jnp.floating):
        raise ValueError(f"gates must be floating point {(*query.shape[:3], 3)}, got {gates.dtype}{gates.shape}")
    if window_size != 0:
        check_positive("window_size", window_size)
    selection = select(query, key, block_size=block_size, top_k=top_k, scale=scale)

    # One zero query in front: then block i of the queries is the tokens for which exactly i blocks have ended.
    shifted = jnp.pad(query, ((0, 0), (1, 0), (0, 0), (0, 0)))
    query_blocks = -(-shifted.shape[1] // block_size)
    has_ended = jnp.arange(selection.num_blocks)[None] < jnp.arange(query_blocks)[:, None]
    has_ended = jnp.broadcast_to(has_ended, (query.shape[0], 1, *has_ended.shape))
    means = block_mean(key, block_size), block_mean(value, block_size)
    no_count = jnp.zeros((1, 1), jnp.float32)  # a block counts as one key, however many it holds
    pooled = rest.pooled(shifted, *means, no_count, has_ended, query_block_size=block_size, scale=scale)

    output = gates[..., :1] * pooled.output()[:, 1:]
    output += gates[..., 1:2] * cast(jax.Array, block_sparse_attention(query, key, value, selection, scale=scale))
    if window_size != 0:
        output += gates[..., 2:] * sliding_window_attention(query, key, value, window_size=window_size, scale=scale)
    return output.astype(query.dtype)
