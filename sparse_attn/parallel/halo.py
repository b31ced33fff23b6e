"""What looks back a few tokens only: each stripe of a shard gets the tokens just before it from its neighbours."""

import functools

import jax
import jax.numpy as jnp

from sparse_attn.checks import check_attention, check_integers, check_positive, check_self_attention
from sparse_attn.keys import causal_key_convolution, check_convolution
from sparse_attn.parallel.communication import AxisName
from sparse_attn.parallel.layout import CONTIGUOUS, Layout
from sparse_attn.sharding import own_promotion
from sparse_attn.window import attend_window


def causal_key_convolution_sharded(
    key: jax.Array,
    kernel: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    axis_name: AxisName,
    layout: Layout = CONTIGUOUS,
) -> jax.Array:
    """`causal_key_convolution` of keys whose sequence is split over a mesh axis; call it inside `jax.shard_map`.

    Every stripe receives the width - 1 keys before it, by `ppermute`.

    Args:
      key: `[batch, local_tokens, kv_heads, head_dim]`, floating point, the shard of this device.
      kernel: `[width, kv_heads, head_dim]`, floating point, the same on every device.
      segment_ids: int `[batch, local_tokens]`, the shard's part of packed documents.
      axis_name: the mesh axis, or outer and inner axis, that splits the sequence.
      layout: which tokens lie on which shard.

    Returns:
      The shard of the result, of key's shape and dtype.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or a shard holds no whole number of stripes.
    """
    key, kernel = map(jnp.asarray, (key, kernel))
    check_convolution(key, kernel)
    segment_ids = check_integers("segment_ids", segment_ids, key.shape[:2])
    halo = kernel.shape[0] - 1
    with own_promotion():
        extend = functools.partial(_with_halo, halo=halo, axis_name=axis_name, layout=layout)
        keys, ids = extend(key), None if segment_ids is None else extend(segment_ids)
        return causal_key_convolution(keys, kernel, ids)[:, halo:].reshape(key.shape)


def sliding_window_attention_sharded(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: AxisName,
    window_size: int,
    layout: Layout = CONTIGUOUS,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """`sliding_window_attention` of a sequence that is split over a mesh axis; call it inside `jax.shard_map`.

    Every stripe receives the window_size - 1 keys and values before it, by `ppermute`: once for each stripe that these
    reach back, so windows should not be much longer than stripes.

    Args:
      query: `[batch, local_tokens, heads, head_dim]`, floating point, the shard of this device.
      key: `[batch, local_tokens, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: `[batch, local_tokens, kv_heads, value_head_dim]`, of query's dtype.
      axis_name: the mesh axis, or outer and inner axis, that splits the sequence.
      window_size: keys that a query sees, itself included, at least 1.
      layout: which tokens lie on which shard.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      segment_ids: int `[batch, local_tokens]`, the shard's part of packed documents.

    Returns:
      Array `[batch, local_tokens, heads, value_head_dim]` of query's dtype: the shard of the output.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or a shard holds no whole number of stripes.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    scale = check_attention(query, key, value, scale, own_head_dim=True)
    check_self_attention(query, key)
    check_positive("window_size", window_size)
    segment_ids = check_integers("segment_ids", segment_ids, query.shape[:2])
    batch, num_tokens = query.shape[:2]
    shards, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    halo = min(window_size, shards * num_tokens) - 1
    with own_promotion():
        extend = functools.partial(_with_halo, halo=halo, axis_name=axis_name, layout=layout)
        keys, values, ids = extend(key), extend(value), None if segment_ids is None else extend(segment_ids)
        stripe = keys.shape[1] - halo
        queries = query.reshape(-1, stripe, *query.shape[2:])
        queries = jnp.pad(queries, ((0, 0), (halo, 0), (0, 0), (0, 0)))  # these rows come to nothing
        start = (jnp.arange(num_tokens // stripe) * shards + here) * stripe  # [stripes]
        absent = jnp.tile(jnp.maximum(halo - start, 0), batch)
        output = attend_window(queries, keys, values, ids, window_size=window_size, scale=scale, num_absent=absent)
        return output[:, halo:].reshape(batch, num_tokens, *output.shape[2:])


def _with_halo(array: jax.Array, *, halo: int, axis_name: AxisName, layout: Layout) -> jax.Array:
    """Every stripe behind the tokens before it: `[batch, tokens, ...]` -> `[batch * stripes, halo + stripe, ...]`.

    Zeros stand for tokens before the sequence.
    """
    batch, num_tokens = array.shape[:2]
    shards, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    stripe = layout.stripe_of(num_tokens, f" along mesh axis {axis_name!r} of size {shards}")
    own = array.reshape(batch, -1, stripe, *array.shape[2:])  # [batch, stripes, stripe, ...]
    num_stripes = own.shape[1]
    parts, missing, hop = [own], halo, 1
    while missing and hop < num_stripes * shards:  # the end of the stripe `hop` stripes back
        tail = own[:, :, max(stripe - missing, 0) :]
        shift = hop % shards
        if shift:
            tail = jax.lax.ppermute(tail, axis_name, [(shard, (shard + shift) % shards) for shard in range(shards)])
        place = jnp.arange(num_stripes) - hop // shards - (here < shift)
        place = jnp.where(place < 0, num_stripes, place)
        parts.insert(0, jnp.take(tail, place, axis=1, mode="fill", fill_value=0))
        missing, hop = missing - tail.shape[2], hop + 1
    rows = jnp.concatenate(parts, axis=2)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (missing, 0)) + ((0, 0),) * (rows.ndim - 3))
    return rows.reshape(batch * num_stripes, halo + stripe, *array.shape[2:])
