"""Causal sliding-window attention with a cache: a ring of the last tokens, however long the row grows.

The law is that of `decode.moba`, with `sliding_window_attention` over the whole row. Token p stands at p % ring, for
ring = window_size + max_draft. A chunk overwrites keys that its own first queries see; so one function extends and
attends. Few tokens are written first, then attend the ring as it lies; a chunk attends the last window and itself. A
step reads the ring. Positions are the caller's: keys come rotated, absolutely.
"""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_positive, check_scale
from sparse_attn.decode.cache import (
    Cache,
    CacheOptions,
    append,
    check_query,
    empty_fields,
    mark_lost,
    prepare_new,
    take_ring,
    write_ring,
)
from sparse_attn.decode.dense import attend_seen
from sparse_attn.layout import zero_padding
from sparse_attn.sharding import over_explicit_axes
from sparse_attn.window import attend_window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCache(Cache):
    """The cache of one sliding-window layer; others of its attributes stand in `Cache`.

    Attributes:
      key: `[batch, ring, kv_heads, head_dim]`, after the convolution.
      value: `[batch, ring, kv_heads, value_head_dim]`.
      window_size: keys that a query sees, itself included.
    """

    window_size: int = dataclasses.field(metadata={"static": True})

    @property
    def forgets(self) -> bool:
        return super().forgets or self.key.shape[1] < self.max_length


def init_window_cache(
    batch_size: int,
    max_length: int,
    num_key_value_heads: int,
    head_dim: int,
    *,
    window_size: int,
    **options: Unpack[CacheOptions],
) -> WindowCache:
    """A cache without tokens; arguments and errors are those of `init_moba_cache`.

    Memory is taken for window_size + max_draft tokens alone, and `rollback` can take back max_draft tokens.
    """
    check_positive("window_size", window_size)
    shape = (batch_size, min(window_size + options.get("max_draft", 0), max_length), num_key_value_heads)
    fields = empty_fields(shape, batch_size, max_length, num_key_value_heads, head_dim, **options)
    return WindowCache(window_size=int(min(window_size, max_length)), **fields)


def window_cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: WindowCache,
    *,
    key_conv_kernel: jax.Array | None = None,
    num_new: ArrayLike | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, WindowCache]:
    """`sliding_window_attention` of new tokens to those before them, and the cache with the new ones.

    Args:
      query: `[batch, tokens, heads, head_dim]`, of the cache's dtype; heads is a multiple of kv_heads.
      key, value, key_conv_kernel, num_new: the new tokens, as in `extend_moba_cache`.
      cache: the tokens so far.
      scale: factor of the logits. None: 1 / sqrt(head_dim).

    Returns:
      Array `[batch, tokens, heads, value_head_dim]` of query's dtype: zeros behind the real tokens, NaN for a token
      beyond max_length; and the cache.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; outside jit, a row would grow beyond max_length.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    check_query(query, cache.key[:, 0])
    check_scale(scale)
    num_new = prepare_new(cache, key, value, key_conv_kernel, num_new, (cache.key[:, 0], cache.value[:, 0]))
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query must have as many tokens as key, {key.shape[1]}, got query.shape={query.shape}")

    def call(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: WindowCache,
        kernel: jax.Array | None,
        num_new: jax.Array,
    ) -> tuple[jax.Array, WindowCache]:
        extended, key = append(cache, key, kernel, num_new)
        stored = jnp.minimum(num_new, cache.max_length - cache.length)  # [batch]
        new_key, new_value = (
            write_ring(ring, new, cache.length, stored) for ring, new in ((cache.key, key), (cache.value, value))
        )
        extended = dataclasses.replace(extended, key=new_key, value=new_value)
        if query.shape[1] <= cache.key.shape[1] - cache.window_size + 1:
            return _attend_ring(query, extended, num_new, scale), extended
        return _attend_chunk(query, key, value, cache, num_new, scale), extended

    operands = (query, key, value, cache, key_conv_kernel, num_new)
    axes = ("b.h", "b.k", "b.k", cache.axes(), ".k", "b")
    return over_explicit_axes(call, operands, axes, ("b.h", cache.axes()))


def _attend_ring(query: jax.Array, cache: WindowCache, num_new: jax.Array, scale: float | None) -> jax.Array:
    """Attention of the last tokens to the ring that holds them."""
    ring = cache.key.shape[1]
    last = cache.length[:, None] - 1  # [batch, 1]
    held = last - (last - jnp.arange(ring)) % ring  # [batch, ring], the token at each place, negative for none
    distance = (cache.length - num_new)[:, None, None] + jnp.arange(query.shape[1])[:, None] - held[:, None]
    is_seen = (held[:, None] >= 0) & (distance >= 0) & (distance < cache.window_size)  # [batch, tokens, ring]
    return attend_seen(query, cache, is_seen, num_new, scale)


def _attend_chunk(
    query: jax.Array, key: jax.Array, value: jax.Array, cache: WindowCache, num_new: jax.Array, scale: float | None
) -> jax.Array:
    """Attention of new tokens to the window before them and to themselves; the cache does not hold them yet."""
    lookback = cache.window_size - 1
    query = jnp.pad(zero_padding(query, num_new), ((0, 0), (lookback, 0), (0, 0), (0, 0)))
    key, value = (
        jnp.concatenate([take_ring(ring, cache.length, lookback), zero_padding(new, num_new)], axis=1)
        for ring, new in ((cache.key, key), (cache.value, value))
    )
    token = jnp.arange(query.shape[1]) - lookback
    exists = cache.length[:, None] + token >= 0  # [batch, lookback + tokens]
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    output = attend_window(query, key, value, exists, window_size=cache.window_size, scale=scale)[:, lookback:]
    return mark_lost(zero_padding(output, num_new), cache.length + num_new, num_new, cache.max_length)
