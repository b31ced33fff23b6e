"""Score: how well query blocks match key blocks. Every score is float32 `[batch, heads, query_blocks, key_blocks]`."""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import NOWHERE, Blocks
from sparse_attn.grammar.describe import split_blocks


def dot(query: jax.Array, key: jax.Array) -> jax.Array:
    """Unscaled dot products of descriptions.

    Args:
      query: `[batch, query_blocks, heads, head_dim]`.
      key: `[batch, key_blocks, kv_heads, head_dim]`; query head h meets key head h // (heads / kv_heads).

    Returns:
      float32 (float64 for float64) `[batch, heads, query_blocks, key_blocks]`.
    """
    batch, query_blocks, num_heads, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, query_blocks, key.shape[2], -1, head_dim)
    scores = jnp.einsum("bikgd,bjkd->bkgij", query.astype(dtype), key.astype(dtype), precision="highest")
    return scores.reshape(batch, num_heads, query_blocks, -1)


def softmax(scores: jax.Array, can_choose: jax.Array | None = None) -> jax.Array:
    """Softmax along the key blocks; pairs that cannot be chosen get 0, and so does a row without any other.

    Args:
      scores: `[..., query_blocks, key_blocks]`.
      can_choose: bool, broadcasts to scores. None: all.
    """
    if can_choose is not None:
        scores = jnp.where(can_choose, scores, -jnp.inf)
    largest = scores.max(-1, keepdims=True, initial=-jnp.inf)  # a row may have no columns
    weight = jnp.exp(scores - jnp.where(jnp.isneginf(largest), 0, largest))
    total = weight.sum(-1, keepdims=True)
    return weight / jnp.where(total == 0, 1, total)


def exact_blocks(
    query: jax.Array,
    key: jax.Array,
    blocks: Blocks,
    *,
    query_block_size: int,
    key_block_size: int,
    scale: float,
    log_sum_exp: jax.Array | None = None,
) -> jax.Array:
    """What each pair of blocks really holds, from all its logits, one query block at a time.

    Without `log_sum_exp` the largest visible logit, max(scale q k), -inf where there is none. With it the attention
    mass, the sum of exp(scale q k - log_sum_exp of the query). Costs the full product of queries and keys in time, but
    holds no more of it than one query block's.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`.
      blocks: who sees whom.
      query_block_size: tokens in a query block.
      key_block_size: tokens in a key block.
      scale: factor of the logits.
      log_sum_exp: `[batch, queries, heads]`, of each query's full row of logits.

    Returns:
      float32 `[batch, heads, query_blocks, key_blocks]`.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key = jnp.pad(key.astype(dtype), ((0, 0), (0, -num_keys % key_block_size), (0, 0), (0, 0)))
    position = jnp.pad(
        blocks.key_position(), ((0, 0), (0, -num_keys % key_block_size), (0, 0)), constant_values=NOWHERE
    ).swapaxes(1, 2)  # [batch, kv_heads or 1, keys]
    is_mass = log_sum_exp is not None
    subtracted = log_sum_exp if log_sum_exp is not None else jnp.zeros((batch, num_queries, num_heads), dtype)

    def score_block(block: tuple[jax.Array, ...]) -> jax.Array:
        query, start, stop, subtracted = block  # [batch, query_block_size, ...]
        grouped = query.reshape(batch, query_block_size, kv_heads, -1, head_dim).astype(dtype)
        logits = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key, precision="highest")
        is_seen = (start[:, None, :, None] <= position[:, :, None]) & (position[:, :, None] < stop[:, None, :, None])
        subtracted = subtracted.reshape(batch, query_block_size, kv_heads, -1).transpose(0, 2, 3, 1)[..., None]
        is_seen = is_seen[:, :, None]  # [batch, kv_heads or 1, 1, t, keys]
        shape = (batch, num_heads, query_block_size, -1, key_block_size)
        if is_mass:
            return jnp.where(is_seen, jnp.exp(logits - subtracted), 0).reshape(shape).sum((2, 4))
        return jnp.where(is_seen, logits, -jnp.inf).reshape(shape).max((2, 4))  # [batch, heads, key_blocks]

    tiles = [
        split_blocks(array, query_block_size).swapaxes(0, 1) for array in (query, blocks.start, blocks.stop, subtracted)
    ]
    return jnp.moveaxis(jax.lax.map(score_block, tuple(tiles)), 0, 2)


def peaks(query: jax.Array, key: jax.Array, *, query_block_size: int, key_block_size: int, scale: float) -> jax.Array:
    """How near a key block comes to the best key: max over queries t of exp(x_tj - max_j x_tj), rows then adding to 1.

    x_tj = max of scale q k over the keys of block j. Holds the logits of one query block at a time.

    Args:
      query: `[batch, queries, heads, head_dim]`, whole blocks, of samples for instance.
      key: `[batch, keys, kv_heads, head_dim]`, whole blocks.
      query_block_size, key_block_size: tokens in a block.
      scale: factor of the logits.

    Returns:
      float32 `[batch, heads, query_blocks, key_blocks]`.
    """
    batch, _, num_heads, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key = key.astype(dtype)

    def score_block(query: jax.Array) -> jax.Array:  # [batch, query_block_size, heads, head_dim]
        grouped = query.astype(dtype).reshape(batch, query_block_size, key.shape[2], -1, head_dim)
        logits = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key, precision="highest")
        highest = logits.reshape(batch, num_heads, query_block_size, -1, key_block_size).max(-1)
        peak = jnp.exp(highest - highest.max(-1, keepdims=True)).max(2)  # [batch, heads, key_blocks]
        return peak / peak.sum(-1, keepdims=True)

    return jnp.moveaxis(jax.lax.map(score_block, split_blocks(query, query_block_size).swapaxes(0, 1)), 0, 2)
