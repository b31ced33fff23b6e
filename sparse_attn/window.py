"""Causal sliding-window attention in plain JAX, in memory linear in the sequence."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import (
    check_attention,
    check_integers,
    check_positive,
    check_self_attention,
    takes_no_batch,
)
from sparse_attn.loops import at_most
from sparse_attn.sharding import over_explicit_axes

if TYPE_CHECKING:  # the cache stands on this file
    from sparse_attn.decode.cache import CacheOptions
    from sparse_attn.decode.window import WindowCache


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How a row is cut.

    Attributes:
      min_chunk: queries of a chunk, at least. Shorter chunks make products too small to be fast, longer ones waste work
        on keys out of sight. Measured on a CPU.
      max_queries: queries of a chunk attended at once. Bounds the logits alive at 2 * max_queries * sequence a head,
        whatever the window.
    """

    min_chunk: int = 32
    max_queries: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """`sliding_window_attention` as a value.

    Attributes:
      window_size: keys that a query sees, itself included, at least 1.
    """

    window_size: int

    def __post_init__(self) -> None:
        check_positive("window_size", self.window_size)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """`sliding_window_attention`; seq_lengths say nothing new, for padding comes after every real token."""
        del seq_lengths
        return sliding_window_attention(query, key, value, window_size=self.window_size, segment_ids=segment_ids)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        num_key_value_heads: int,
        head_dim: int,
        **options: Unpack["CacheOptions"],
    ) -> "WindowCache":
        """`sparse_attn.decode.init_window_cache`."""
        from sparse_attn.decode.window import init_window_cache

        sizes = (batch_size, max_length, num_key_value_heads, head_dim)
        return init_window_cache(*sizes, window_size=self.window_size, **options)

    def attend_cached(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: "WindowCache",
        *,
        key_conv_kernel: jax.Array | None = None,
        num_new: ArrayLike | None = None,
    ) -> tuple[jax.Array, "WindowCache"]:
        """`sparse_attn.decode.window_cached_attention`."""
        from sparse_attn.decode.window import window_cached_attention

        return window_cached_attention(query, key, value, cache, key_conv_kernel=key_conv_kernel, num_new=num_new)


# The logit of a key out of sight. Finite, so that no gradient meets inf - inf; every query sees at least itself.
_OUT_OF_SIGHT = -1e30


@takes_no_batch
def sliding_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window_size: int,
    scale: float | None = None,
    segment_ids: ArrayLike | None = None,
) -> jax.Array:
    """Causal attention to the last `window_size` tokens: query t sees keys t - window_size + 1 ... t.

    softmax(scale q K^T) V over those keys. The row is cut into chunks of about window_size tokens; the queries of a
    chunk attend the keys of their own and of the end of the previous chunk, so time and memory grow with
    sequence * window_size and sequence. A window as long as the sequence is causal attention.

    Args:
      query: `[batch, sequence, heads, head_dim]`, floating point; or all arrays without the batch axis.
      key: `[batch, sequence, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: `[batch, sequence, kv_heads, value_head_dim]`, of query's dtype.
      window_size: keys that a query sees, itself included, at least 1.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      segment_ids: int `[batch, sequence]`, for packed sequences: tokens see only tokens of equal id. Distances are
        counted along the row, so a segment should be contiguous.

    Returns:
      Array `[batch, sequence, heads, value_head_dim]` of query's dtype. Logits and softmax are float32 (float64 stays
      float64).

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    scale = check_attention(query, key, value, scale, own_head_dim=True)
    check_self_attention(query, key)
    check_positive("window_size", window_size)
    segment_ids = check_integers("segment_ids", segment_ids, query.shape[:2])
    attend = functools.partial(attend_window, window_size=window_size, scale=scale)
    return over_explicit_axes(attend, (query, key, value, segment_ids), ("b.h", "b.k", "b.k", "b"), "b.h")


def attend_window(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window_size: int,
    scale: float,
    num_absent: jax.Array | None = None,
    sizes: Sizes = Sizes(),
) -> jax.Array:
    """`sliding_window_attention` of checked arguments, cut into chunks of the given sizes.

    The first num_absent tokens of a row, int `[batch]`, are not there: nobody sees them.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    lookback = at_most(window_size, num_tokens) - 1  # keys before a chunk that its first query sees
    chunk = at_most(max(lookback, sizes.min_chunk), num_tokens)
    num_parts = -(-chunk // sizes.max_queries)  # of a chunk's queries, attended one after the other
    part = -(-chunk // num_parts)
    chunk = part * num_parts
    lookback = 0 if isinstance(num_tokens, int) and chunk >= num_tokens else lookback
    num_chunks = (num_tokens + chunk - 1) // chunk

    def cut(array: jax.Array, fill: int = 0) -> jax.Array:
        """`[batch, sequence, ...]` -> `[batch, chunks, chunk, ...]`, filled up at the end."""
        missing = num_chunks * chunk - num_tokens
        padding = ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2)
        array = jnp.pad(array, padding, constant_values=fill)
        return array.reshape(batch, num_chunks, chunk, *array.shape[2:])

    def with_lookback(chunks: jax.Array) -> jax.Array:
        """`[batch, chunks, chunk, ...]` -> `[batch, chunks, lookback + chunk, ...]`, zeros before the first chunk."""
        if lookback == 0:
            return chunks
        before = jnp.pad(chunks[:, :-1, chunk - lookback :], ((0, 0), (1, 0)) + ((0, 0),) * (chunks.ndim - 2))
        return jnp.concatenate([before, chunks], axis=2)

    key, value = with_lookback(cut(key)), with_lookback(cut(value))  # [batch, chunks, lookback + chunk, kv_heads, d]
    key_place = jnp.arange(-lookback, chunk)[None]  # [1, lookback + chunk], within a chunk
    place = (jnp.arange(num_chunks)[:, None] * chunk + key_place)[None]  # [1, chunks, lookback + chunk]
    key_exists = place >= (0 if num_absent is None else num_absent[:, None, None])  # [batch or 1, chunks, ...]
    segments = None if segment_ids is None else cut(segment_ids)
    key_segments = None if segments is None else with_lookback(segments)

    def attend(first: jax.Array | int, query: jax.Array, segments: jax.Array | None) -> jax.Array:
        """The queries `[batch, chunks, part, kv_heads, group, d]` at `first` and after in every chunk."""
        logits = jnp.einsum("bntkgd,bnskd->bnkgts", query, key, preferred_element_type=accurate) * scale
        distance = ((first + jnp.arange(part))[:, None] - key_place)[None, None]  # [1, 1, part, lookback + chunk]
        is_seen = (distance >= 0) & (distance < window_size) & key_exists[:, :, None]  # [batch or 1, chunks, part, ...]
        if segments is not None and key_segments is not None:
            is_seen &= segments[:, :, :, None] == key_segments[:, :, None]
        logits = jnp.where(is_seen[:, :, None, None], logits, jnp.asarray(_OUT_OF_SIGHT, accurate))
        weights = jax.nn.softmax(logits).astype(value.dtype)
        output = jnp.einsum("bnkgts,bnskd->bntkgd", weights, value, preferred_element_type=accurate)
        return output.astype(query.dtype)

    accurate = jnp.promote_types(query.dtype, jnp.float32)
    query = cut(query).reshape(batch, num_chunks, chunk, kv_heads, num_heads // kv_heads, head_dim)
    if num_parts == 1:
        output = attend(0, query, segments)
    else:

        def split(array: jax.Array) -> jax.Array:
            """`[batch, chunks, chunk, ...]` -> `[parts, batch, chunks, part, ...]`."""
            return jnp.moveaxis(array.reshape(batch, num_chunks, num_parts, part, *array.shape[3:]), 2, 0)

        parts = (jnp.arange(num_parts) * part, split(query), None if segments is None else split(segments))
        output = jax.lax.map(jax.checkpoint(lambda arguments: attend(*arguments)), parts)
        output = jnp.moveaxis(output, 0, 2)
    return output.reshape(batch, num_chunks * chunk, num_heads, -1)[:, :num_tokens]
