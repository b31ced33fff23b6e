"""Makes the geometry of a call: where every block lies among the keys, and which keys every query may see.

Keys are put in *block order*: grouped by segment, in sequence order inside a segment, padding last. A block is then a
run of at most `block_size` consecutive keys, blocks restart at every segment, and everything that a query may see is
one interval of keys. Contiguous sequences, ragged tails, padded batches and packed segments differ only in the numbers.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import NOWHERE, Blocks
from sparse_attn.checks import WHOLE_ROWS, Sequences


def make_blocks(
    query: jax.Array, key: jax.Array, sequences: Sequences = WHOLE_ROWS, *, block_size: int, is_causal: bool
) -> tuple[Blocks, jax.Array | None]:
    """Lays out a batch. Only the shapes of query and key count.

    With n_q queries and n_k keys in a segment, the query of rank r (from 0) stands at the key of rank r + n_k - n_q:
    causal positions align at the end (S5). It may see the keys up to there if causal, else all n_k.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`.
      sequences: lengths of rows and ids of segments. By default a row is one whole sequence.
      block_size: keys in a block.
      is_causal: whether a query sees only keys up to its own position.

    Returns:
      The blocks, and the original index of the key at each place, int32 `[batch, keys]`; None if they are in order.
    """
    (batch_size, num_queries), num_keys = query.shape[:2], key.shape[1]
    query_seq_lengths, key_value_seq_lengths, query_segment_ids, key_value_segment_ids = sequences
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
    blocks = Blocks(
        start=key_start,
        stop=key_start + visible,
        position=None,
        block_start=block_start,
        block_length=block_length,
        first_block=first_block,
        last_block=first_block + (visible - 1) // block_size,
        block_size=block_size,
        num_keys=num_keys,
        is_packed=key_order is not None,
    )
    return blocks, key_order


def whole_rows(query: jax.Array, key: jax.Array, *, block_size: int, is_causal: bool) -> Blocks:
    """The blocks of rows that are one whole sequence each; arguments as of `make_blocks`."""
    return make_blocks(query, key, block_size=block_size, is_causal=is_causal)[0]


def order_keys(array: jax.Array, key_order: jax.Array | None) -> jax.Array:
    """Keys or values `[batch, keys, heads, head_dim]` in block order."""
    if key_order is None:
        return array
    return jnp.take_along_axis(array, key_order[:, :, None, None], axis=1)


def zero_padding(array: jax.Array, seq_lengths: jax.Array | None) -> jax.Array:
    """Zeros behind the real tokens of `[batch, sequence, heads, head_dim]`, so that NaN there cannot spread."""
    if seq_lengths is None:
        return array
    is_real = jnp.arange(array.shape[1])[None, :] < seq_lengths[:, None]  # [batch, sequence]
    return jnp.where(is_real[..., None, None], array, 0)


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


def visible_tiles(blocks: Blocks, query_block_size: int) -> jax.Array:
    """Pairs of query tile and key block in which some query may see some key, judged by the ends of their positions.

    bool `[batch, kv_heads or 1, query_blocks, key_blocks]`, for rows without segments. Exact where the positions of a
    key block and those that its queries see have no gaps; otherwise it may count a pair too many, never one too few.
    """
    start, stop, position = blocks.start, blocks.stop, blocks.key_position()

    def ends(array: jax.Array, is_there: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
        """Least and largest number of each block, `[batch, tokens, x]` -> `[batch, blocks, x]`."""
        fill = ((0, 0), (0, -array.shape[1] % block_size), (0, 0))
        is_there = jnp.pad(is_there, fill).reshape(array.shape[0], -1, block_size, array.shape[2])
        array = jnp.pad(array, fill).reshape(is_there.shape)
        return jnp.where(is_there, array, NOWHERE).min(2), jnp.where(is_there, array, -1).max(2)

    is_seeing = (start < stop)[..., None]  # [batch, queries, 1]
    first, _ = ends(start[..., None], is_seeing, query_block_size)  # [batch, query_blocks, 1]
    _, last = ends(stop[..., None] - 1, is_seeing, query_block_size)
    nearest, farthest = ends(position, position < NOWHERE, blocks.block_size)  # [batch, key_blocks, kv_heads or 1]
    nearest, farthest = (array.swapaxes(1, 2)[:, :, None, :] for array in (nearest, farthest))
    return (nearest <= last[:, None]) & (first[:, None] <= farthest)
