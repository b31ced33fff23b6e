"""Attention of a few queries to the chosen blocks of a cache: gathered, or by dense masks.

Arguments and results are those of `derivatives.decode`. Names of einsum axes: r rows (query, head of the group), c
chosen blocks, m keys of a block, d head_dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Arrays
from sparse_attn import reference


def attend(arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float) -> jax.Array:
    """Reads the chosen blocks alone. Returns float32 (float64 for float64)."""
    query, key, value = arrays
    batch, num_queries, num_heads, _ = query.shape
    kv_heads = key.shape[1]
    stop = jnp.broadcast_to(_stop(length, num_new, num_queries)[:, None], (batch, num_heads, num_queries))

    def split(array: jax.Array) -> jax.Array:  # [batch, heads, queries, ...] -> [batch, kv_heads, rows, ...]
        return array.reshape(batch, kv_heads, -1, *array.shape[3:])

    rows = (split(query.swapaxes(1, 2)), split(indices), split(stop))

    def attend_head(
        query: jax.Array, indices: jax.Array, stop: jax.Array, key: jax.Array, value: jax.Array
    ) -> jax.Array:
        accumulator = jnp.promote_types(query.dtype, jnp.float32)
        block, block_size = jnp.maximum(indices, 0), key.shape[1]
        place = block[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)[None, None]  # [r, c, m]
        is_seen = (indices >= 0)[..., None] & (place < stop[:, None, None])

        def take(array: jax.Array) -> jax.Array:  # [blocks, m, d] -> [r, c, m, d]
            return array.at[block].get(mode="promise_in_bounds")

        logits = scale * jnp.einsum("rcmd,rd->rcm", take(key), query, preferred_element_type=accumulator)
        logits = jnp.where(is_seen, logits, -jnp.inf)
        largest = logits.max((1, 2), keepdims=True)
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest))
        total = weight.sum((1, 2))[:, None]
        output = jnp.einsum("rcm,rcmd->rd", weight.astype(value.dtype), take(value), preferred_element_type=accumulator)
        return output / jnp.where(total == 0, 1, total)

    output = jax.vmap(jax.vmap(attend_head))(*rows, key, value)  # [batch, kv_heads, rows, value_head_dim]
    return output.reshape(batch, num_heads, num_queries, -1).swapaxes(1, 2)


def attend_dense(arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float) -> jax.Array:
    """The same by `reference.masked_attention`."""
    query, *cached = arrays
    batch, kv_heads, num_blocks, block_size, _ = cached[0].shape
    num_keys = num_blocks * block_size
    is_chosen = (indices[..., None] == jnp.arange(num_blocks).reshape(1, 1, 1, 1, -1)).any(-2).repeat(block_size, -1)
    place = jnp.arange(num_keys)[None, None, None]
    mask = is_chosen & (place < _stop(length, num_new, query.shape[1])[:, None, :, None])
    key, value = (array.reshape(batch, kv_heads, num_keys, -1).swapaxes(1, 2) for array in cached)
    return reference.masked_attention(query, key, value, mask, scale=scale)[0]


def _stop(length: jax.Array, num_new: jax.Array, num_queries: int) -> jax.Array:
    """Keys that every query sees, int32 `[batch, queries]`, 0 for padding."""
    token = jnp.arange(num_queries, dtype=jnp.int32)[None]
    return jnp.where(token < num_new[:, None], (length - num_new)[:, None] + token + 1, 0)
