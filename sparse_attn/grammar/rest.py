"""Rest: what stands in for the keys that were not chosen. The plainest rest is to drop them, which needs no code."""

import jax
import jax.numpy as jnp

from sparse_attn.attend.partial import Partial
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.grammar.describe import block_lengths, block_mean, split_blocks
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap

_LOGITS_PER_STEP = 2**20


def pooled(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_count: jax.Array,
    is_used: jax.Array,
    *,
    query_block_size: int,
    scale: float,
) -> Partial:
    """Attention to one stand-in for each block of keys: a key that counts exp(log_count) times.

    Logits are scale q k_j + log_count_j; with the mean key, the mean value and log_count = log(number of keys) this is
    the zeroth-order expansion of the block's attention. Differentiable; holds one step's logits at a time.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, key_blocks, kv_heads, head_dim]`, the stand-ins.
      value: `[batch, key_blocks, kv_heads, head_dim]`.
      log_count: float32, broadcasts to `[batch, key_blocks]`.
      is_used: bool `[batch, heads or 1, query_blocks, key_blocks]`: whether the queries of a block attend a stand-in.
      query_block_size: queries in a query block.
      scale: factor of the logits.
    """
    batch, num_queries, num_heads, _ = query.shape
    key_blocks, kv_heads = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key, value = key.astype(dtype), value.astype(dtype)
    log_count = jnp.broadcast_to(log_count, (batch, key_blocks)).astype(dtype)[:, None, None, None, :]

    @jax.checkpoint
    def attend_block(block: tuple[jax.Array, jax.Array]) -> Partial:
        query, is_used = block  # [batch, query_block_size, heads, head_dim], [batch, heads or 1, key_blocks]
        grouped = query.reshape(batch, query_block_size, kv_heads, -1, query.shape[-1]).astype(dtype)
        logits = scale * jnp.einsum("btkgd,bjkd->bkgtj", grouped, key, precision="highest") + log_count
        used = jnp.broadcast_to(is_used, (batch, num_heads, key_blocks)).reshape(batch, kv_heads, -1, 1, key_blocks)
        logits = jnp.where(used, logits, -jnp.inf)
        maximum = jax.lax.stop_gradient(logits.max(-1))
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(maximum), 0, maximum)[..., None])
        accumulator = jnp.einsum("bkgtj,bjkd->bkgtd", weight, value, precision="highest")

        def join(array: jax.Array) -> jax.Array:  # [batch, kv_heads, group, t, ...] -> [batch, t, heads, ...]
            return jnp.moveaxis(array, 3, 1).reshape(batch, query_block_size, num_heads, *array.shape[4:])

        return Partial(join(maximum), join(weight.sum(-1)), join(accumulator))

    blocks = split_blocks(query, query_block_size).swapaxes(0, 1), jnp.moveaxis(is_used, 2, 0)
    heads_logits = batch * num_heads * query_block_size * key_blocks
    partial = jax.lax.map(attend_block, blocks, batch_size=max(1, _LOGITS_PER_STEP // heads_logits))

    def unsplit(array: jax.Array) -> jax.Array:  # [query_blocks, batch, t, ...] -> [batch, queries, ...]
        array = array.swapaxes(0, 1)
        return array.reshape(batch, -1, *array.shape[3:])[:, :num_queries]

    return jax.tree.map(unsplit, partial)


def means(query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap, *, level: int, scale: float) -> Partial:
    """Attention, in the blocks of `level`, to means of `level` consecutive keys and values, each counting that often.

    Logits are scale q k_n + log(number of keys), not causal; the last mean of a ragged row runs over the keys it has.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`; so is value.
      levels: the choice; its key_block_size is a multiple of level.
      level: the level of the map that is attended here.
      scale: factor of the logits.
    """
    log_count = jnp.log(block_lengths(key.shape[1], level))
    key, value = (block_mean(array, level).astype(query.dtype) for array in (key, value))
    levels = LevelMap(levels.levels, levels.query_block_size, levels.key_block_size // level)
    return attend_levels(
        query,
        key,
        value,
        levels,
        whole_rows(query, key, block_size=levels.key_block_size, is_causal=False),
        scale=scale,
        level=level,
        key_log_weight=jnp.broadcast_to(log_count[None, :, None], (*key.shape[:2], 1)),
    )
