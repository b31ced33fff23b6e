"""Causal dense attention with a cache: the ceiling that sparse decoding is compared with, and what models mix it with.

The law is that of `decode.moba`, with softmax attention over the whole row. A step reads all max_length tokens.
"""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_scale
from sparse_attn.decode.cache import (
    Cache,
    CacheOptions,
    append,
    check_query,
    count_new,
    empty_fields,
    mark_lost,
    prepare_new,
)
from sparse_attn.layout import zero_padding
from sparse_attn.sharding import over_explicit_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCache(Cache):
    """The cache of one dense layer; others of its attributes stand in `Cache`.

    Attributes:
      key: `[batch, max_length, kv_heads, head_dim]`, after the convolution.
      value: `[batch, max_length, kv_heads, value_head_dim]`.
    """


def init_dense_cache(
    batch_size: int,
    max_length: int,
    num_key_value_heads: int,
    head_dim: int,
    **options: Unpack[CacheOptions],
) -> DenseCache:
    """A cache without tokens; arguments and errors are those of `init_moba_cache`."""
    shape = (batch_size, max_length, num_key_value_heads)
    fields = empty_fields(shape, batch_size, max_length, num_key_value_heads, head_dim, **options)
    return DenseCache(**fields)


def extend_dense_cache(
    cache: DenseCache,
    key: jax.Array,
    value: jax.Array,
    *,
    key_conv_kernel: jax.Array | None = None,
    num_new: ArrayLike | None = None,
) -> DenseCache:
    """The cache with new tokens behind those that it holds; all is as in `extend_moba_cache`."""
    key, value = map(jnp.asarray, (key, value))
    num_new = prepare_new(cache, key, value, key_conv_kernel, num_new, (cache.key[:, 0], cache.value[:, 0]))

    def extend(
        key: jax.Array, value: jax.Array, cache: DenseCache, kernel: jax.Array | None, num_new: jax.Array
    ) -> DenseCache:
        extended, key = append(cache, key, kernel, num_new)
        position = cache.length[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)  # [batch, tokens]
        position = jnp.where(position < extended.length[:, None], position, cache.max_length)  # the latter are dropped

        def write(row: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
            return row.at[position].set(new, mode="drop", unique_indices=True)

        new_key, new_value = (
            jax.vmap(write)(row, new, position) for row, new in ((cache.key, key), (cache.value, value))
        )
        return dataclasses.replace(extended, key=new_key, value=new_value)

    operands, axes = (key, value, cache, key_conv_kernel, num_new), ("b.k", "b.k", cache.axes(), ".k", "b")
    return over_explicit_axes(extend, operands, axes, cache.axes())


def dense_cached_attention(
    query: jax.Array, cache: DenseCache, *, num_new: ArrayLike | None = None, scale: float | None = None
) -> jax.Array:
    """softmax(scale q K^T) V of the last tokens of every row, each over all tokens up to itself.

    Args:
      query: `[batch, tokens, heads, head_dim]`, of the cache's dtype; heads is a multiple of kv_heads. Query t of a row
        stands at position length - num_new + t.
      cache: with the keys and values of these tokens.
      num_new: int `[batch]`, as in `extend_dense_cache`.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array `[batch, tokens, heads, value_head_dim]` of query's dtype: zeros behind the real tokens, NaN for a token
      that found no room.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    query = jnp.asarray(query)
    check_query(query, cache.key[:, 0])
    check_scale(scale)
    num_new = count_new(num_new, query)

    def call(query: jax.Array, cache: DenseCache, num_new: jax.Array) -> jax.Array:
        position = (cache.length - num_new)[:, None] + jnp.arange(query.shape[1])  # [batch, tokens]
        is_seen = jnp.arange(cache.max_length) <= position[..., None]  # [batch, tokens, keys]
        return attend_seen(query, cache, is_seen, num_new, scale)

    return over_explicit_axes(call, (query, cache, num_new), ("b.h", cache.axes(), "b"), "b.h")


def attend_seen(
    query: jax.Array, cache: Cache, is_seen: jax.Array, num_new: jax.Array, scale: float | None
) -> jax.Array:
    """Attention to the tokens of a cache with key and value `[batch, keys, kv_heads, x]` that are seen.

    Args:
      is_seen: bool `[batch, tokens, keys]`.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else float(scale)
    accurate = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, num_queries, cache.key.shape[2], -1, head_dim)
    # Axes: b batch, t queries, s keys, k key/value heads, g query heads of one, d head_dim.
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, cache.key, preferred_element_type=accurate) * scale
    logits = jnp.where(is_seen[:, None, None], logits, jnp.finfo(accurate).min)
    weights = jax.nn.softmax(logits).astype(cache.value.dtype)
    output = jnp.einsum("bkgts,bskd->btkgd", weights, cache.value, preferred_element_type=accurate)
    output = zero_padding(output.reshape(batch, num_queries, num_heads, -1), num_new)
    return mark_lost(output, cache.length, num_new, cache.max_length).astype(query.dtype)
