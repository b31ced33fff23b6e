"""What one shard knows of the blocks of a whole sequence: which of them it holds, and their means.

A block that straddles shards is several *pieces*: its mean is the sum of theirs, and each shard attends its own. Blocks
that many ask for can be copied to every device, in front of its own keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import NOWHERE, Blocks
from sparse_attn.attend.choice import PerQuery
from sparse_attn.attend.route import block_means
from sparse_attn.checks import Sequences
from sparse_attn.layout import make_blocks
from sparse_attn.parallel.communication import AxisName
from sparse_attn.parallel.layout import Layout, unshard_sequence
from sparse_attn.sharding import vary_alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """The blocks of the whole row as one shard sees them. A place counts along the whole row, in block order.

    Attributes:
      stop: int32 `[batch, tokens]`, the place behind the last key that each local query sees.
      first_block: int32 `[batch, tokens]`, number of the first block that each local query sees.
      last_block: likewise the last one, its own.
      block_length: int32 `[batch, blocks]`, keys of each block, on all shards together.
      first_place: int32 `[batch, blocks, shards]`, the place of a block's first key on each shard, NOWHERE for none.
      key_place: int32 `[batch, tokens]`, places of the local keys, rising.
      piece_start: int32 `[batch, pieces]`, index of a piece's first key among the local keys.
      piece_length: int32 `[batch, pieces]`, its keys, 0 where there is no such piece.
      piece_of_block: int32 `[batch, blocks]`, the piece of each block that local queries attend, -1 for none.
      piece_for_visitors: likewise for queries of other shards, who attend copied blocks at home.
      block_size: keys in a full block.
      is_whole: whether every block lies on one shard: pieces are full blocks, one after the other.
    """

    stop: jax.Array
    first_block: jax.Array
    last_block: jax.Array
    block_length: jax.Array
    first_place: jax.Array
    key_place: jax.Array
    piece_start: jax.Array
    piece_length: jax.Array
    piece_of_block: jax.Array
    piece_for_visitors: jax.Array
    block_size: int = dataclasses.field(metadata={"static": True})
    is_whole: bool = dataclasses.field(metadata={"static": True})

    def pieces(self, num_queries: int, stop: jax.Array | int) -> Blocks:
        """The geometry of some queries over the local keys; stop is `[batch, queries]`, an index among these."""
        batch, num_pieces = self.piece_start.shape
        zero = jnp.zeros((batch, num_queries), jnp.int32)
        return Blocks(
            start=zero,
            stop=zero + stop,
            position=None,
            block_start=self.piece_start,
            block_length=self.piece_length,
            first_block=zero,
            last_block=zero + num_pieces - 1,
            block_size=self.block_size,
            num_keys=self.key_place.shape[1],
            is_packed=not self.is_whole,
        )

    def local_choice(self, indices: jax.Array) -> PerQuery:
        """What the local queries attend here of the blocks they chose, `[batch, heads, tokens, top_k]`."""
        return self._choice(_look_up(self.piece_of_block, indices, -1), self.stop)

    def choice(self, lists: jax.Array, stop: jax.Array | None) -> PerQuery:
        """What visitors attend here.

        Args:
          lists: `[batch, heads, queries, top_k]`, blocks of the whole row, -1 for none.
          stop: int32 `[batch, queries]`, the place behind the last key each sees; None: they see all keys here.
        """
        return self._choice(_look_up(self.piece_for_visitors, lists, -1), stop)

    def _choice(self, piece: jax.Array, stop: jax.Array | None) -> PerQuery:
        num_queries, num_keys = piece.shape[2], self.key_place.shape[1]
        blocks = self.pieces(num_queries, num_keys if stop is None else _search(self.key_place, stop))
        is_seen = _look_up(self.piece_start, piece, num_keys) < blocks.stop[:, None, :, None]
        return PerQuery(jnp.where(is_seen, piece, -1), blocks)


def gather_sequence(array: jax.Array, axis_name: AxisName, layout: Layout) -> jax.Array:
    """All shards of `[batch, tokens, ...]` along a mesh axis, in the order of the sequence."""
    array = jax.lax.all_gather(array, axis_name, axis=1, tiled=True)
    return unshard_sequence(array, num_shards=jax.lax.axis_size(axis_name), layout=layout)


def lay_out(
    segment_ids: jax.Array | None,
    shape: tuple[int, int],
    *,
    axis_name: AxisName,
    layout: Layout,
    block_size: int,
    num_blocks: int,
) -> tuple[Shard, jax.Array | None, jax.Array | None]:
    """The shard of this device; the order of its keys; and where there are no more blocks than num_blocks.

    Args:
      segment_ids: `[batch, tokens]`, of the shard.
      shape: batch and tokens of a shard.

    Returns:
      The shard; the index of the local key at each place, int32 `[batch, tokens]`, None if they are in order; bool
      `[batch, 1, 1, 1]`, None if there cannot be more.
    """
    batch, num_tokens = shape
    shards, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    position = layout.positions(here, num_tokens, shards)  # [tokens]
    block, holder = jnp.arange(num_blocks, dtype=jnp.int32), jnp.arange(shards, dtype=jnp.int32)
    is_whole = segment_ids is None and num_tokens % block_size == 0
    key_order = is_possible = piece_of_block = None
    if segment_ids is None:
        stop, first_block, last_block = position + 1, jnp.zeros_like(position), position // block_size
        start, key_place = block * block_size, position  # [blocks]
        block_length = jnp.minimum(shards * num_tokens - start, block_size)
        if is_whole:
            blocks_of_stripe = layout.stripe_of(num_tokens) // block_size
            stripe = block // blocks_of_stripe
            first_place = jnp.where((stripe % shards)[:, None] == holder, start[:, None], NOWHERE)
            piece_of_block = stripe // shards * blocks_of_stripe + block % blocks_of_stripe
            piece_of_block = jnp.where(stripe % shards == here, piece_of_block, -1)
            piece_start = jnp.arange(num_tokens // block_size, dtype=jnp.int32) * block_size
            piece_length = jnp.full_like(piece_start, block_size)
        else:  # stripes hold whole blocks, so these shards are contiguous
            begin = jnp.maximum(start[:, None], holder * num_tokens)  # [blocks, shards]
            end = jnp.minimum((start + block_length)[:, None], (holder + 1) * num_tokens)
            first_place = jnp.where(begin < end, begin, NOWHERE)
    else:
        ids = gather_sequence(segment_ids, axis_name, layout)  # [batch, sequence]
        row = jnp.zeros((*ids.shape, 1, 1))
        blocks, order = make_blocks(row, row, Sequences(None, None, ids, ids), block_size=block_size, is_causal=True)
        assert order is not None
        is_possible = (blocks.block_length > 0).sum(1)[:, None, None, None] <= num_blocks
        stop, first_block, last_block = (x[:, position] for x in (blocks.stop, blocks.first_block, blocks.last_block))
        start, block_length = blocks.block_start[:, :num_blocks], blocks.block_length[:, :num_blocks]
        every_place = jnp.arange(ids.shape[1], dtype=jnp.int32)
        nowhere = jnp.full((num_blocks, shards), NOWHERE, jnp.int32)
        first_place = jax.vmap(lambda block, shard: nowhere.at[block, shard].min(every_place, mode="drop"))(
            blocks.block_of_key(), layout.shard_of(order, num_tokens, shards)
        )
        place = jax.vmap(lambda order: jnp.zeros_like(order).at[order].set(every_place, unique_indices=True))(order)
        key_place = place[:, position]
        key_order = jnp.argsort(key_place, axis=1)
        key_place = jnp.take_along_axis(key_place, key_order, axis=1)

    def for_each_row(array: jax.Array, rank: int = 2) -> jax.Array:
        return jnp.broadcast_to(array, (batch, *array.shape[1 - rank :]))

    start, block_length, key_place = map(for_each_row, (start, block_length, key_place))
    if piece_of_block is None:
        piece_start = _search(key_place, start)
        piece_length = _search(key_place, start + block_length) - piece_start
        piece_of_block = jnp.where(piece_length > 0, block, -1)
    shard = Shard(
        stop=for_each_row(stop),
        first_block=for_each_row(first_block),
        last_block=for_each_row(last_block),
        block_length=block_length,
        first_place=for_each_row(first_place, 3),
        key_place=key_place,
        piece_start=for_each_row(piece_start),
        piece_length=for_each_row(piece_length),
        piece_of_block=for_each_row(piece_of_block),
        piece_for_visitors=for_each_row(piece_of_block),
        block_size=block_size,
        is_whole=is_whole,
    )
    return shard, key_order, is_possible


def all_means(key: jax.Array, shard: Shard, axis_name: AxisName, layout: Layout) -> jax.Array:
    """Mean key of every block of the whole row, float32 (float64 for float64) `[batch, blocks, kv_heads, head_dim]`."""
    pieces = shard.pieces(1, 0)
    if shard.is_whole:
        of_blocks = layout if layout.stripe is None else Layout(layout.stripe // shard.block_size)
        return gather_sequence(block_means(key, pieces), axis_name, of_blocks)
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    add_up = functools.partial(jax.ops.segment_sum, num_segments=pieces.num_blocks, indices_are_sorted=True)
    total = jax.lax.psum(jax.vmap(add_up)(key, pieces.block_of_key()), axis_name)
    return total / jnp.maximum(shard.block_length, 1)[..., None, None]


def find_hottest(indices: jax.Array, shard: Shard, number: int, axis_name: AxisName) -> jax.Array:
    """The blocks that queries on other shards chose most often, int32 `[batch, number]`, the same on every device."""
    batch, num_blocks = shard.piece_of_block.shape
    is_remote = (indices >= 0) & (_look_up(shard.piece_of_block, indices, 0) < 0)
    block = jnp.where(is_remote, indices, num_blocks).reshape(batch, -1)
    count = jax.vmap(lambda block: jnp.zeros(num_blocks, jnp.int32).at[block].add(1, mode="drop"))(block)
    return jax.lax.top_k(jax.lax.psum(count, axis_name), number)[1]


def with_copies(array: jax.Array, hottest: jax.Array, shard: Shard, axis_name: AxisName) -> jax.Array:
    """Local keys or values `[batch, tokens, kv_heads, x]` behind copies of the hottest blocks."""
    batch, num_tokens, *rest = array.shape
    piece = _look_up(shard.piece_of_block, hottest, -1)[..., None, None, None]  # [batch, number, 1, 1, 1]
    blocks = array.reshape(batch, num_tokens // shard.block_size, shard.block_size, *rest)
    copies = jnp.where(piece < 0, 0, jnp.take_along_axis(blocks, jnp.maximum(piece, 0), axis=1))
    copies = vary_alike(jax.lax.psum(copies, axis_name), array)
    return jnp.concatenate([copies.reshape(batch, -1, *rest), array], axis=1)


def know_copies(shard: Shard, hottest: jax.Array) -> Shard:
    """The shard with copies of whole blocks in front of its keys: nobody travels for these blocks."""
    batch, number = hottest.shape
    num_pieces = number + shard.piece_start.shape[1]
    start = jnp.broadcast_to(jnp.arange(num_pieces, dtype=jnp.int32) * shard.block_size, (batch, num_pieces))
    piece = jnp.where(shard.piece_of_block < 0, -1, shard.piece_of_block + number)
    row, copy = jnp.arange(batch)[:, None], jnp.arange(number, dtype=jnp.int32)
    return dataclasses.replace(
        shard,
        first_place=shard.first_place.at[row, hottest].set(NOWHERE),
        key_place=jnp.pad(shard.key_place, ((0, 0), (number * shard.block_size, 0)), constant_values=-1),  # seen by all
        piece_start=start,
        piece_length=jnp.full_like(start, shard.block_size),
        piece_of_block=piece.at[row, hottest].max(copy),
        piece_for_visitors=piece.at[row, hottest].set(-1),
    )


def _look_up(table: jax.Array, ids: jax.Array, none: int) -> jax.Array:
    """Entries of `[batch, n]` for ids `[batch, ...]`, `none` for those of -1."""
    entries = jax.vmap(lambda table, ids: table[jnp.maximum(ids, 0)])(table, ids)
    return jnp.where(ids < 0, none, entries)


def _search(rising: jax.Array, numbers: jax.Array) -> jax.Array:
    """How many entries of `[batch, n]` are less than each number `[batch, m]`; int32."""
    return jax.vmap(jnp.searchsorted)(rising, numbers).astype(jnp.int32)
