"""Exact attention to lists of single keys, gathered query by query: choices of block size 1."""

import jax
import jax.numpy as jnp

from sparse_attn.attend.partial import Partial
from sparse_attn.grammar.describe import split_blocks

_GATHERED_PER_STEP = 2**20  # bounds the elements of the keys gathered at a time


def attend_tokens(query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, *, scale: float) -> Partial:
    """Softmax attention of every query over the keys of its list: softmax(scale q K^T) V.

    Differentiable; holds the keys of a few queries at a time and recomputes them for the backward pass.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`; heads is a multiple of kv_heads.
      value: `[batch, keys, kv_heads, value_head_dim]`.
      indices: int32 `[batch, heads or kv_heads or 1, queries, list]`, places of keys, -1 for none, none twice. One list
        for kv_heads serves all query heads of the group, one for 1 all heads.
      scale: factor of the logits.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads, length = key.shape[2], indices.shape[-1]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    lists = indices.shape[1] if indices.shape[1] % kv_heads == 0 else kv_heads
    indices = jnp.broadcast_to(indices, (batch, lists, num_queries, length))
    key, value = key.swapaxes(1, 2).astype(dtype), value.swapaxes(1, 2).astype(dtype)  # [batch, kv_heads, keys, d]

    @jax.checkpoint
    def attend_step(step: tuple[jax.Array, jax.Array]) -> Partial:
        query, indices = step  # [batch, t, heads, head_dim], [batch, t, lists, list]
        place = jnp.maximum(indices, 0).swapaxes(1, 2).reshape(batch, kv_heads, -1, 1)

        def gather(array: jax.Array) -> jax.Array:  # [batch, kv_heads, keys, d] -> [batch, lists, t, list, d]
            return jnp.take_along_axis(array, place, axis=2).reshape(batch, lists, -1, length, array.shape[-1])

        grouped = query.astype(dtype).reshape(batch, -1, lists, num_heads // lists, head_dim)
        # Axes: l lists, t queries, g query heads of a list, m keys of a list.
        logits = scale * jnp.einsum("btlgd,bltmd->btlgm", grouped, gather(key), precision="highest")
        logits = jnp.where(indices[:, :, :, None] >= 0, logits, -jnp.inf)
        maximum = jax.lax.stop_gradient(logits.max(-1))
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(maximum), 0, maximum)[..., None])
        accumulator = jnp.einsum("btlgm,bltmd->btlgd", weight, gather(value), precision="highest")
        shape = (batch, -1, num_heads)
        accumulator = accumulator.reshape(*shape, value.shape[-1])
        return Partial(maximum.reshape(shape), weight.sum(-1).reshape(shape), accumulator)

    chunk = max(1, min(num_queries, _GATHERED_PER_STEP // (batch * lists * length * head_dim)))
    steps = split_blocks(query, chunk).swapaxes(0, 1), split_blocks(indices.swapaxes(1, 2), chunk).swapaxes(0, 1)
    partial = jax.lax.map(attend_step, steps)

    def join(array: jax.Array) -> jax.Array:  # [steps, batch, t, ...] -> [batch, queries, ...]
        return array.swapaxes(0, 1).reshape(batch, -1, *array.shape[3:])[:, :num_queries]

    return jax.tree.map(join, partial)
