"""InfLLM-v2: dense attention that, past a length, reads only the blocks whose pooled keys weigh most; no new weights.

Paper: InfLLM-V2: Dense-Sparse Switchable Attention (arXiv 2509.24663). Causal. Keys are pooled: a mean over `pool_size`
tokens every `pool_stride`. Every query takes the softmax over the pooled keys that end at or before it; the weights are
added up over the query heads of a key/value head; a block scores the largest weight of a pooled key that overlaps it.
The first `initial_blocks`, the own block and the `local_blocks` before it are always taken, the best others fill up to
`top_k`; one choice for the group. Sequences shorter than `dense_length` read everything. Trained through the attention.

Defaults: those of MiniCPM4.1, blocks of 64, 1 initial, 32 local, 96 in all (MiniCPM4: 64 in all), dense below 8192.

Where code and paper disagree. To save time the paper estimates the softmax's denominator from coarser pools (of 128
tokens, every 64); the authors' kernels (OpenBMB/infllmv2_cuda_impl at f908e73) do so or not; here it is exact. The
kernels force the own block and `local_blocks` more, which is followed. They give blocks of the future the weight 0, so
that these may be chosen, and mask them later; here such places stay empty. They know groups of 16 query heads only; any
size goes here. No outputs of the authors' code were at hand to compare with: their kernels need a GPU.
"""

from typing import cast

import jax
import jax.numpy as jnp

from sparse_attn.attention import block_sparse_attention
from sparse_attn.checks import check_attention, check_positive, check_self_attention
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import split_blocks
from sparse_attn.selection import BlockSelection
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe

RECIPE = Recipe(
    name="InfLLM-v2",
    paper="2509.24663",
    blocks="1 / 64",
    describe="mean key of 32 tokens, every 16",
    score="softmax, summed over the query heads of a key/value head, largest of the means that overlap a block",
    choose="per query token and key/value head: top-k; first, own and 32 local blocks forced and counted",
    when="dense below 8192 tokens",
    is_trainable=True,
)


def pooled_keys(key: jax.Array, *, pool_size: int, pool_stride: int) -> jax.Array:
    """Mean i runs over the pool_size keys from pool_stride i on; those that run over the end count zeros there.

    `[batch, tokens, kv_heads, head_dim]` -> float32 `[batch, ceil(tokens / pool_stride), kv_heads, head_dim]`.
    """
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    sums = split_blocks(key, pool_stride).sum(2)  # [batch, means, kv_heads, head_dim]
    num_means, strides = sums.shape[1], pool_size // pool_stride
    sums = jnp.pad(sums, ((0, 0), (0, strides - 1), (0, 0), (0, 0)))
    return jnp.stack([sums[:, offset : offset + num_means] for offset in range(strides)]).sum(0) / pool_size


@splits_over_mesh("bh")
def select(
    query: jax.Array,
    key: jax.Array,
    *,
    block_size: int = 64,
    pool_size: int = 32,
    pool_stride: int = 16,
    initial_blocks: int = 1,
    local_blocks: int = 32,
    top_k: int = 96,
    dense_length: int = 8192,
    scale: float | None = None,
) -> BlockSelection:
    """The blocks that each query attends, alike for the query heads of a key/value head. Args: those of `attention`.

    Indices int32 `[batch, heads, tokens, top_k]` (all blocks for a short sequence): the forced blocks in their order,
    then the others by falling score, -1 where a query has fewer.
    """
    check_self_attention(query, key)
    scale = check_attention(query, key, key, scale)
    check_positive("block_size", block_size)
    check_positive("pool_size", pool_size)
    check_positive("pool_stride", pool_stride)
    if pool_size % pool_stride or block_size % pool_stride:
        raise ValueError(f"pool_stride must divide {pool_size=} and {block_size=}, got {pool_stride=}")
    if initial_blocks < 0 or local_blocks < 0 or top_k < initial_blocks + local_blocks + 1:
        raise ValueError(
            f"top_k must hold {initial_blocks=} and {local_blocks=}, neither below 0, and one more, got {top_k=}"
        )
    query, key = jax.lax.stop_gradient((query, key))
    batch, num_tokens, num_heads, _ = query.shape
    kv_heads, num_blocks = key.shape[2], -(-num_tokens // block_size)
    block = jnp.arange(num_blocks, dtype=jnp.int32)[None]
    if num_tokens < dense_length:
        own = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] // block_size
        indices = jnp.broadcast_to(jnp.where(block <= own, block, -1), (batch, num_heads, num_tokens, num_blocks))
        return BlockSelection(indices, block_size=block_size, num_blocks=num_blocks)

    means = pooled_keys(key, pool_size=pool_size, pool_stride=pool_stride)
    num_means = means.shape[1]
    end = pool_stride * jnp.arange(num_means)[None] + pool_size  # [1, means]
    # The means that overlap a block: those that start in it, and the last ones to start before it.
    before, per_block = pool_size // pool_stride - 1, block_size // pool_stride
    overlapping = per_block * jnp.arange(num_blocks)[:, None] + jnp.arange(before + per_block)[None]
    fill = ((0, 0),) * 3 + ((before, num_blocks * per_block - num_means),)

    def choose_blocks(position: jax.Array, query: jax.Array) -> jax.Array:
        has_ended = end <= position[:, None] + 1  # [t, means]
        weights = score.softmax(scale * score.dot(query, means), has_ended[None, None])
        weights = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]).sum(2)  # [batch, kv_heads, t, means]
        scores = jnp.pad(weights, fill)[..., overlapping].max(-1)  # [batch, kv_heads, t, blocks]
        own = (position // block_size)[:, None]
        is_forced = (block < initial_blocks) | (own - local_blocks <= block)
        scores = jnp.where(is_forced[None, None], jnp.inf, scores)
        scores = jnp.where((block <= own)[None, None], scores, -jnp.inf)
        return choose.top_k_indices(scores, top_k).swapaxes(1, 2)  # [batch, t, kv_heads, top_k]

    chosen = choose.by_queries(choose_blocks, (query,), elements_per_query=batch * num_heads * num_means)
    indices = chosen.swapaxes(1, 2).repeat(num_heads // kv_heads, axis=1)
    return BlockSelection(indices, block_size=block_size, num_blocks=num_blocks)


@splits_over_mesh()
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int = 64,
    pool_size: int = 32,
    pool_stride: int = 16,
    initial_blocks: int = 1,
    local_blocks: int = 32,
    top_k: int = 96,
    dense_length: int = 8192,
    scale: float | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q K^T) V, over the tokens of the chosen blocks.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      block_size: tokens in a block; the last may be short.
      pool_size, pool_stride: tokens in a pooled key, and between the starts of two; the stride divides both sizes.
      initial_blocks, local_blocks: blocks at the start, and just before the own one, that are always chosen.
      top_k: blocks that a query attends, forced ones included.
      dense_length: sequences of fewer tokens attend everything.
      scale: factor of the logits, in the scores too. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype. A ValueError names a wrong argument.
    """
    scale = check_attention(query, key, value, scale)
    selection = select(
        query,
        key,
        block_size=block_size,
        pool_size=pool_size,
        pool_stride=pool_stride,
        initial_blocks=initial_blocks,
        local_blocks=local_blocks,
        top_k=top_k,
        dense_length=dense_length,
        scale=scale,
    )
    return cast(jax.Array, block_sparse_attention(query, key, value, selection, scale=scale))
