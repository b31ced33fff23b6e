"""Causal sliding-window attention in plain JAX, in memory linear in the sequence."""

import jax
import jax.numpy as jnp

# Shorter chunks make products too small to be fast, longer ones waste work on keys out of sight. Measured on a CPU.
_MIN_CHUNK = 32
# Queries of a chunk attended at once. Bounds the logits alive at 2 * 256 * sequence a head, whatever the window.
_MAX_QUERIES = 256
# The logit of a key out of sight. Finite, so that no gradient meets inf - inf; every query sees at least itself.
_OUT_OF_SIGHT = -1e30


def sliding_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window_size: int,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Causal attention to the last `window_size` tokens: query t sees keys t - window_size + 1 ... t.

    softmax(scale q K^T) V over those keys. The row is cut into chunks of about window_size tokens; the queries of a
    chunk attend the keys of their own and of the end of the previous chunk, so time and memory grow with
    sequence * window_size and sequence. A window as long as the sequence is causal attention.

    Args:
      query: `[batch, sequence, heads, head_dim]`, floating point.
      key: `[batch, sequence, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key, of query's dtype.
      window_size: keys that a query sees, itself included, at least 1.
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      segment_ids: int `[batch, sequence]`, for packed sequences: tokens see only tokens of equal id. Distances are
        counted along the row, so a segment should be contiguous.

    Returns:
      Array of query's shape and dtype. Logits and softmax are float32 (float64 stays float64).

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    _check(query, key, value, window_size, segment_ids)
    batch, num_tokens, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale

    lookback = min(window_size, num_tokens) - 1  # keys before a chunk that its first query sees
    chunk = min(max(lookback, _MIN_CHUNK), num_tokens)
    num_parts = -(-chunk // _MAX_QUERIES)  # of a chunk's queries, attended one after the other
    part = -(-chunk // num_parts)
    chunk = part * num_parts
    lookback = 0 if chunk >= num_tokens else lookback
    num_chunks = -(-num_tokens // chunk)

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
    key_exists = jnp.arange(num_chunks)[:, None] * chunk + key_place >= 0  # [chunks, lookback + chunk]
    segments = None if segment_ids is None else cut(segment_ids)
    key_segments = None if segments is None else with_lookback(segments)

    def attend(first: jax.Array | int, query: jax.Array, segments: jax.Array | None) -> jax.Array:
        """The queries `[batch, chunks, part, kv_heads, group, d]` at `first` and after in every chunk."""
        logits = jnp.einsum("bntkgd,bnskd->bnkgts", query, key, preferred_element_type=accurate) * scale
        distance = ((first + jnp.arange(part))[:, None] - key_place)[None]  # [1, part, lookback + chunk]
        is_seen = ((distance >= 0) & (distance < window_size) & key_exists[:, None])[None]  # [1, chunks, part, ...]
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
    return output.reshape(batch, num_chunks * chunk, num_heads, head_dim)[:, :num_tokens]


def _check(query: jax.Array, key: jax.Array, value: jax.Array, window_size: int, segment_ids: jax.Array | None) -> None:
    if query.ndim != 4 or 0 in query.shape or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"query must be floating point [batch, sequence, heads, head_dim] and not empty, got "
            f"{query.dtype}{query.shape}"
        )
    for name, array in {"key": key, "value": value}.items():
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {name}.dtype={array.dtype}")
        heads = array.shape[2] if array.ndim == 4 else 0
        if heads == 0 or array.shape != (*query.shape[:2], heads, query.shape[3]) or query.shape[2] % heads:
            raise ValueError(
                f"{name} must be [{query.shape[0]}, {query.shape[1]}, kv_heads, {query.shape[3]}] with kv_heads a "
                f"divisor of query's {query.shape[2]} heads, got {name}.shape={array.shape}"
            )
    if value.shape != key.shape:
        raise ValueError(f"value must be shaped like key {key.shape}, got value.shape={value.shape}")
    if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
        raise ValueError(f"window_size must be an int of at least 1, got window_size={window_size!r}")
    if segment_ids is not None and (
        segment_ids.shape != query.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise ValueError(
            f"segment_ids must be an integer array of shape {query.shape[:2]}, got "
            f"{segment_ids.dtype}{segment_ids.shape}"
        )
