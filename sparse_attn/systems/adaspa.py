"""AdaSpa: the blocks that hold the most attention, found exactly at two denoising steps and kept in between.

Paper: Training-free and Adaptive Sparse Attention for Efficient Long Video Generation (AdaSpa, arXiv 2502.21079). For
video diffusion, not causal. With L_t the log-sum-exp of query t's logits, the mass of a pair of blocks is the sum of
exp(scale q_t k_s - L_t) over its tokens. Every row of blocks keeps the same number of largest masses, 1 - sparsity of
the key blocks. Then heads are adapted: with n heads whose kept mass (recall) is above 0.8, the n heads of largest
recall keep half as many blocks and the n heads of smallest recall half as many more, so that the mean stays. Text
tokens, at the end, keep all their rows and columns.

Masks and L hardly change between denoising steps. A search costs the product of queries and keys once for L and once
for the masses; a later search may reuse an earlier L and save the former. Both are state, which the caller carries:

    state = None
    for step in range(10, 50):
        if step in (10, 30):
            state = search(query, key, None if state is None else state.log_sum_exp)
        output = attention(query, key, value, state)

Defaults: sparsity 0.8, blocks of 64, searches at steps 10 and 30 of 50, dense before. At its first search the paper
uses the output of the full attention that gave L; here that is the caller's matter.

Where code and paper disagree: no code was found, the paper is followed, no outputs were at hand to compare with. Its
listing has log(q k - L) where exp is meant. Chosen here, because it does not say: numbers of blocks are rounded to the
nearest, at least one, and text comes on top of them; the share is of the key blocks without text; recall runs over all
rows; n is at most half of the heads, so that no head is of both kinds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_not_negative, check_positive, check_self_attention
from sparse_attn.grammar import choose, score
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

RECIPE = Recipe(
    name="AdaSpa",
    paper="2502.21079",
    blocks="64 / 64",
    describe="none",
    score="exact mass of the block, by a cached log-sum-exp",
    choose="per query block and head: top-k share, in three tiers of heads by recall; text forced",
    when="dense in the first 10 denoising steps; search at steps 10 and 30 of 50, reuse in between",
)

_RECALL = 0.8  # heads above it can do with less


class Search(NamedTuple):
    """What a search found, for later steps: the choice, and log_sum_exp, float32 `[batch, tokens, heads]`."""

    levels: LevelMap
    log_sum_exp: jax.Array


_SEARCH_AXES: Any = ("bh", "b.h")


@splits_over_mesh("bh", whole="h", log_sum_exp="b.h")
def select(
    query: jax.Array,
    key: jax.Array,
    log_sum_exp: jax.Array | None = None,
    *,
    sparsity: float = 0.8,
    text_length: int = 0,
    block_size: int = 64,
    scale: float | None = None,
) -> LevelMap:
    """The choice of `search`: levels 0 and 1."""
    return search(
        query, key, log_sum_exp, sparsity=sparsity, text_length=text_length, block_size=block_size, scale=scale
    ).levels


@splits_over_mesh(Search(*_SEARCH_AXES), whole="h", log_sum_exp="b.h")
def search(
    query: jax.Array,
    key: jax.Array,
    log_sum_exp: jax.Array | None = None,
    *,
    sparsity: float = 0.8,
    text_length: int = 0,
    block_size: int = 64,
    scale: float | None = None,
) -> Search:
    """Exact masses of all pairs of blocks, one block of queries at a time, and the choice by them.

    Args:
      query, key, sparsity, text_length, block_size, scale: those of `attention`.
      log_sum_exp: that of an earlier search, float32 `[batch, tokens, heads]`, used as it is. None: computed here.
    """
    scale = check_attention(query, key, key, scale)
    check_self_attention(query, key)
    check_positive("block_size", block_size)
    check_not_negative("text_length", text_length)
    if not 1 / 3 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 1/3, where the densest heads are dense, and 1, got {sparsity=}")
    if log_sum_exp is not None and log_sum_exp.shape != query.shape[:3]:
        raise ValueError(f"log_sum_exp must have shape {query.shape[:3]}, got log_sum_exp.shape={log_sum_exp.shape}")
    query, key = jax.lax.stop_gradient((query, key))
    batch, num_tokens, num_heads, _ = query.shape
    num_blocks = -(-num_tokens // block_size)
    visibility = make_visibility(query, key, is_causal=False)
    if log_sum_exp is None:
        everything = jnp.ones((batch, num_heads, num_blocks, num_blocks), jnp.int8)
        full = LevelMap(everything, block_size, block_size)
        log_sum_exp = attend_tiles(query, key, key, full, visibility, scale=scale).log_sum_exp()
    mass = score.exact_blocks(
        query,
        key,
        visibility,
        query_block_size=block_size,
        key_block_size=block_size,
        scale=scale,
        log_sum_exp=log_sum_exp,
    )
    end = jnp.minimum(block_size * (jnp.arange(num_blocks) + 1), num_tokens)
    has_text = end > num_tokens - text_length  # [blocks]
    is_forced = (has_text[:, None] | has_text[None, :])[None, None]
    ranking = choose.rank(jnp.where(has_text[None, None, None], -jnp.inf, mass))
    num_video = max(0, num_tokens - text_length) // block_size if text_length else num_blocks
    count = max(1, round((1 - sparsity) * num_video))
    fewer = max(1, count // 2)
    kept_mass = jnp.where((ranking < count) | is_forced, mass, 0).sum((2, 3))
    recall = kept_mass / mass.sum((2, 3))  # [batch, heads]
    place = choose.rank(recall)
    num_adapted = jnp.minimum((recall > _RECALL).sum(-1, keepdims=True), num_heads // 2)
    counts = jnp.where(place < num_adapted, fewer, count)
    counts = jnp.where(place >= num_heads - num_adapted, 2 * count - fewer, counts)
    chosen = (ranking < counts[..., None, None]) | is_forced
    return Search(LevelMap(chosen.astype(jnp.int8), block_size, block_size), log_sum_exp)


@splits_over_mesh(whole="h", state=Search(*_SEARCH_AXES))
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: Search | None = None,
    *,
    sparsity: float = 0.8,
    text_length: int = 0,
    block_size: int = 64,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, softmax(scale q K^T) V, over the blocks of a search.

    Args:
      query: `[batch, tokens, heads, head_dim]`, floating point; text tokens at the end.
      key: `[batch, tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads and every query head
        chooses for itself.
      value: shaped like key.
      state: the latest search, of this step or an earlier one; its choice is taken and the options of a search below do
        not count. None: search now.
      sparsity: share of the key blocks that a row leaves out on average, between 1/3 and 1.
      text_length: tokens at the end that see and are seen by all.
      block_size: tokens in a block; the last may be shorter.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array of query's shape and dtype. A ValueError names a wrong argument.
    """
    scale = check_attention(query, key, value, scale)
    if state is None:
        state = search(query, key, sparsity=sparsity, text_length=text_length, block_size=block_size, scale=scale)
    visibility = make_visibility(query, key, is_causal=False)
    return attend_tiles(query, key, value, state.levels, visibility, scale=scale).output().astype(query.dtype)
