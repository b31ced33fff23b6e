"""Attention of new tokens to the chosen blocks of a cache: gathered if they are few, else as in any other call.

Arguments are those of `derivatives.decode`. Names of einsum axes: r rows (query, head of the group), c chosen blocks, m
keys of a block, d head_dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Arrays, Blocks
from sparse_attn.attend.choice import PerQuery


def attend(arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float) -> jax.Array:
    """Reads the chosen blocks alone, those of each row for itself. Returns float32 (float64 for float64)."""
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

        # The keys come first, for XLA would transpose them otherwise.
        logits = scale * jnp.einsum("rcmd,rd->rcm", take(key), query, preferred_element_type=accumulator)
        logits = jnp.where(is_seen, logits, -jnp.inf)
        largest = logits.max((1, 2), keepdims=True)
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest))
        total = weight.sum((1, 2))[:, None]
        output = jnp.einsum("rcm,rcmd->rd", weight.astype(value.dtype), take(value), preferred_element_type=accumulator)
        return output / jnp.where(total == 0, 1, total)

    output = jax.vmap(jax.vmap(attend_head))(*rows, key, value)  # [batch, kv_heads, rows, value_head_dim]
    return output.reshape(batch, num_heads, num_queries, -1).swapaxes(1, 2)


def in_rows(arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array) -> tuple[Arrays, PerQuery]:
    """The same call with the cache as `[batch, keys, kv_heads, head_dim]`, as backends take keys elsewhere."""
    query, key, value = arrays
    num_blocks, block_size = key.shape[2:4]
    blocks = geometry(length, num_new, query.shape[1], num_blocks, block_size)

    def join(array: jax.Array) -> jax.Array:
        return array.reshape(*array.shape[:2], -1, array.shape[4]).swapaxes(1, 2)

    return (query, join(key), join(value)), PerQuery(indices, blocks)


def geometry(length: jax.Array, num_new: jax.Array, num_queries: int, num_blocks: int, block_size: int) -> Blocks:
    """The blocks of cached rows of `length` `[batch]` tokens, whose last num_new `[batch]` ones are the queries."""
    stop = _stop(length, num_new, num_queries)
    stop = jnp.where(stop <= num_blocks * block_size, stop, 0)
    block_start = jnp.arange(num_blocks, dtype=jnp.int32)[None] * block_size
    block_length = jnp.clip(length[:, None] - block_start, 0, block_size)  # [batch, blocks]
    return Blocks(
        start=jnp.zeros_like(stop),
        stop=stop,
        position=None,
        block_start=jnp.broadcast_to(block_start, block_length.shape),
        block_length=block_length,
        first_block=jnp.zeros_like(stop),
        last_block=(stop - 1) // block_size,
        block_size=block_size,
        num_keys=num_blocks * block_size,
        is_packed=False,
    )


def _stop(length: jax.Array, num_new: jax.Array, num_queries: int) -> jax.Array:
    """Keys that every query sees, int32 `[batch, queries]`, 0 for padding."""
    token = jnp.arange(num_queries, dtype=jnp.int32)[None]
    return jnp.where(token < num_new[:, None], (length - num_new)[:, None] + token + 1, 0)
