"""Tokens to blocks: where every block lies among the keys, and which keys every query may see.

Keys are put in *block order*: grouped by segment, in sequence order inside a segment, padding last. A block is then a
run of at most `block_size` consecutive keys, blocks restart at every segment, and everything that a query may see is
one interval of keys. Contiguous sequences, ragged tails, padded batches and packed segments differ only in the numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks of keys and the reach of queries, per batch row. All arrays int32.

    Attributes:
      key_order: `[batch, keys]`, original index of the key at each place in block order; None if they are in order.
      block_start: `[batch, blocks]`, place of a block's first key.
      block_length: `[batch, blocks]`, keys in the block, 0 where there is no such block.
      key_start: `[batch, queries]`, place of the first key that the query may see.
      key_stop: `[batch, queries]`, one past the last; equal to key_start for a query with nothing to attend to.
      first_block: `[batch, queries]`, the block that holds key_start.
      last_block: `[batch, queries]`, the block that holds key_stop - 1 (causal: the query's own block);
        first_block - 1 for a query with nothing to attend to.
      block_size: keys in a full block.
      num_keys: keys in a batch row, padding included.
    """

    key_order: jax.Array | None
    block_start: jax.Array
    block_length: jax.Array
    key_start: jax.Array
    key_stop: jax.Array
    first_block: jax.Array
    last_block: jax.Array
    block_size: int = dataclasses.field(metadata={"static": True})
    num_keys: int = dataclasses.field(metadata={"static": True})

    @property
    def num_blocks(self) -> int:
        """Upper bound of the number of blocks in a batch row."""
        return self.block_start.shape[1]

    def order_keys(self, keys: jax.Array) -> jax.Array:
        """Puts keys or values `[batch, keys, heads, head_dim]` in block order."""
        if self.key_order is None:
            return keys
        return jnp.take_along_axis(keys, self.key_order[:, :, None, None], axis=1)

    def block_of_key(self) -> jax.Array:
        """Block of every place in block order, int32 `[batch, keys]`; padding counts to the last block before it.

        Example: blocks of 2 keys over segments of 3 and 2 keys: `[0, 0, 1, 2, 2]`.
        """
        place = jnp.arange(self.num_keys, dtype=jnp.int32)
        if self.key_order is None:
            return jnp.broadcast_to(place // self.block_size, (self.block_start.shape[0], self.num_keys))
        find = jax.vmap(lambda start: jnp.searchsorted(start, place, side="right"))
        return find(self.block_start).astype(jnp.int32) - 1


def make_layout(
    num_queries: int,
    num_keys: int,
    *,
    batch_size: int,
    block_size: int,
    is_causal: bool,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
) -> Layout:
    """Lays out a batch.

    With n_q queries and n_k keys in a segment, the query of rank r (from 0) stands at the key of rank r + n_k - n_q:
    causal positions align at the end (S5). It may see the keys up to there if causal, else all n_k.

    Args:
      num_queries: queries in a batch row, padding included.
      num_keys: keys in a batch row, padding included.
      batch_size: rows.
      block_size: keys in a block.
      is_causal: whether a query sees only keys up to its own position.
      query_seq_lengths: int `[batch]`, real queries in a row; the rest is padding. None: all are real.
      key_value_seq_lengths: int `[batch]`, the same for keys.
      query_segment_ids: int `[batch, queries]`. Tokens of equal id form one segment. None: the row is one segment.
      key_value_segment_ids: int `[batch, keys]`, the same for keys.
    """
    query_lengths = _lengths(query_seq_lengths, batch_size, num_queries)
    key_lengths = _lengths(key_value_seq_lengths, batch_size, num_keys)
    if query_segment_ids is None:
        key_order = None
        block_start = jnp.arange(-(-num_keys // block_size), dtype=jnp.int32)[None, :] * block_size  # [1, blocks]
        block_length = jnp.clip(key_lengths[:, None] - block_start, 0, block_size)  # [batch, blocks]
        block_start = jnp.broadcast_to(block_start, block_length.shape)
        rank = jnp.broadcast_to(jnp.arange(num_queries, dtype=jnp.int32), (batch_size, num_queries))
        segment_queries, segment_keys = query_lengths[:, None], key_lengths[:, None]  # [batch, 1]
        key_start = first_block = jnp.zeros_like(rank)  # [batch, queries]
    else:
        assert key_value_segment_ids is not None
        dtype = jnp.promote_types(query_segment_ids.dtype, key_value_segment_ids.dtype)
        lay_out = jax.vmap(lambda *row: _segment_row(*row, block_size=block_size))
        (key_order, block_start, block_length, rank, segment_queries, segment_keys, key_start, first_block) = lay_out(
            query_segment_ids.astype(dtype), key_value_segment_ids.astype(dtype), query_lengths, key_lengths
        )
    visible = rank + 1 + segment_keys - segment_queries if is_causal else jnp.broadcast_to(segment_keys, rank.shape)
    is_real = jnp.arange(num_queries)[None, :] < query_lengths[:, None]  # [batch, queries]
    visible = jnp.where(is_real, jnp.maximum(visible, 0), 0)
    return Layout(
        key_order=key_order,
        block_start=block_start,
        block_length=block_length,
        key_start=key_start,
        key_stop=key_start + visible,
        first_block=first_block,
        last_block=first_block + (visible - 1) // block_size,
        block_size=block_size,
        num_keys=num_keys,
    )


def _lengths(seq_lengths: jax.Array | None, batch_size: int, num_tokens: int) -> jax.Array:
    """Real tokens of each row, int32 `[batch]`."""
    if seq_lengths is None:
        return jnp.full((batch_size,), num_tokens, jnp.int32)
    return jnp.clip(seq_lengths.astype(jnp.int32), 0, num_tokens)


def _sort_by_segment(segment_ids: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stable order of tokens by segment, padding last.

    Args:
      segment_ids: `[tokens]`, of any integer dtype.
      length: scalar, real tokens.

    Returns:
      The ids in that order, padding as the largest integer, and the original indices, int32. Both `[tokens]`.
    """
    index = jnp.arange(segment_ids.size, dtype=jnp.int32)
    is_padding = index >= length
    last = jnp.array(jnp.iinfo(segment_ids.dtype).max, segment_ids.dtype)
    ids = jnp.where(is_padding, last, segment_ids)
    _, ids, order = jax.lax.sort((is_padding, ids, index), num_keys=2, is_stable=True)
    return ids, order


def _find_segment(sorted_ids: jax.Array, length: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First place and one past the last place of each id among the real tokens. int32, shaped like ids."""
    start = jnp.searchsorted(sorted_ids, ids, side="left").astype(jnp.int32)
    stop = jnp.searchsorted(sorted_ids, ids, side="right").astype(jnp.int32)
    return jnp.minimum(start, length), jnp.minimum(stop, length)


def _segment_row(
    query_ids: jax.Array, key_ids: jax.Array, query_length: jax.Array, key_length: jax.Array, *, block_size: int
) -> tuple[jax.Array, ...]:
    """The layout of one packed row; ids `[tokens]`, lengths scalar.

    Every segment of n keys has ceil(n / block_size) blocks. How many there are is known at run time only, so
    the tables hold the worst case, one block a key; nothing as large as a block hangs on an entry.
    """
    num_keys, num_queries = key_ids.size, query_ids.size
    sorted_ids, key_order = _sort_by_segment(key_ids, key_length)
    place = jnp.arange(num_keys, dtype=jnp.int32)
    segment_start, _ = _find_segment(sorted_ids, key_length, sorted_ids)  # [keys]
    opens_block = (place < key_length) & ((place - segment_start) % block_size == 0)
    block_of_key = jnp.cumsum(opens_block, dtype=jnp.int32) - 1  # [keys]
    (block_start,) = jnp.nonzero(opens_block, size=num_keys, fill_value=num_keys)
    block_length = jnp.zeros(num_keys, jnp.int32).at[block_of_key].add(place < key_length, mode="drop")

    sorted_query_ids, query_order = _sort_by_segment(query_ids, query_length)
    rank_in_order = jnp.arange(num_queries, dtype=jnp.int32)
    rank = jnp.zeros(num_queries, jnp.int32).at[query_order].set(rank_in_order, unique_indices=True)
    query_start, query_stop = _find_segment(sorted_query_ids, query_length, query_ids)
    key_start, key_stop = _find_segment(sorted_ids, key_length, query_ids)
    first_block = block_of_key[jnp.minimum(key_start, num_keys - 1)]
    return (
        key_order,
        block_start.astype(jnp.int32),
        block_length,
        rank - query_start,
        query_stop - query_start,
        key_stop - key_start,
        key_start,
        first_block,
    )
