"""Chunks of queries: what the forward and the backward kernels share.

A *row* is one query of one head, counted per key/value head of a batch row: head of the group times queries + query, so
that the choices `[batch, heads, queries, top_k]` are cut into rows without moving them. A *chunk* is a run of rows of
one or several key/value heads. A pair is a row and one of the blocks it chose; the kernels of a chunk give each pair a
partial result, `[pairs of the chunk, head_dim]`, the largest array besides inputs and outputs. Its size is bounded by
the number of rows in a chunk. Everything else is read and written where it lies, `[batch, tokens, heads, head_dim]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.config import MosaicConfig, TritonConfig
from pallas_kernels.gpu.tiles import (
    SMALLEST_SIDE,
    ceil_div,
    divide,
    iota,
    load_numbers,
    loop,
    padded_head_dim,
    power_of_two,
)
from pallas_kernels.schedule import Schedule, make_schedule

_LEAST_CHUNK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call.

    Attributes:
      batch, queries, keys, heads, kv_heads, head_dim, top_k, num_blocks, block_size: of the call.
      chunk_heads: key/value heads in a chunk.
      chunk_rows: rows of each of them.
      scale: factor of the logits.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    num_blocks: int
    block_size: int
    chunk_heads: int
    chunk_rows: int
    scale: float

    @property
    def rows(self) -> int:
        """Rows of a key/value head."""
        return self.queries * self.heads // self.kv_heads

    @property
    def row_chunks(self) -> int:
        """Chunks of the rows of a key/value head."""
        return ceil_div(self.rows, self.chunk_rows)

    @property
    def chunk_pairs(self) -> int:
        """Pairs of a key/value head in a chunk."""
        return self.chunk_rows * self.top_k

    @property
    def columns(self) -> int:
        """Columns of a tile of queries, keys or values."""
        return padded_head_dim(self.head_dim)

    def key_size(self, config: TritonConfig) -> int:
        """Keys that a program takes at a time."""
        return min(config.key_size, power_of_two(self.block_size, SMALLEST_SIDE))


def make_plan(
    query: jax.Array | jax.ShapeDtypeStruct,
    key: jax.Array | jax.ShapeDtypeStruct,
    indices: jax.Array | jax.ShapeDtypeStruct,
    *,
    num_blocks: int,
    block_size: int,
    scale: float,
    tile_size: int,
    arrays: int,
    config: TritonConfig | MosaicConfig,
) -> Plan:
    """Chooses the chunks: whole heads, several if they fit, so that blocks have many pairs; else parts of one head.

    Args:
      query, key, indices, num_blocks, block_size, scale: of the call.
      tile_size: pairs of a tile.
      arrays: how many arrays like query, and as many like key, the call takes and gives.
      config: sizes inside the kernels.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    _, num_keys, kv_heads, _ = key.shape
    top_k = indices.shape[-1]
    rows = num_queries * num_heads // kv_heads
    budget = config.chunk_bytes
    if budget is None:
        whole = arrays * (query.size + key.size) * query.dtype.itemsize
        budget = max(whole * 3 // 16 - 4 * indices.size, whole // 16, _LEAST_CHUNK_BYTES)
    rows_that_fit = budget // (top_k * (head_dim * query.dtype.itemsize + 16))  # 16: log-sum-exp, pair, room to sort
    if config.chunk_bytes is None:  # two tiles a block on average, so that half-empty tiles stay few
        rows_that_fit = max(rows_that_fit, 2 * tile_size * ceil_div(num_keys, block_size) // top_k)
    row_chunks = ceil_div(rows, max(rows_that_fit, 1))
    most_heads = max(rows_that_fit // rows, 1)
    return Plan(
        batch=batch,
        queries=num_queries,
        keys=num_keys,
        heads=num_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        top_k=top_k,
        num_blocks=num_blocks,
        block_size=block_size,
        chunk_heads=max(n for n in range(1, batch * kv_heads + 1) if batch * kv_heads % n == 0 and n <= most_heads),
        chunk_rows=ceil_div(rows, row_chunks),
        scale=scale,
    )


class Chunk(NamedTuple):
    """One chunk; the arrays that the kernels take.

    Attributes:
      origin: int32 `[2]`, number of its first key/value head (of batch * kv_heads) and of its first row.
      indices: int32 `[chunk_heads * chunk_rows * top_k]`, -1 for no pair.
      schedule: its pairs in tiles; a leading axis `[chunk_heads]` on all arrays.
    """

    origin: jax.Array
    indices: jax.Array
    schedule: Schedule


def for_chunks(plan: Plan, indices: jax.Array, tile_size: int, body: Callable[[Chunk, Any], Any], carry: Any) -> Any:
    """`carry = body(chunk, carry)` for every chunk; indices `[batch, heads, queries, top_k]`."""
    indices = indices.reshape(plan.batch * plan.kv_heads, plan.rows, plan.top_k)
    padding = plan.row_chunks * plan.chunk_rows - plan.rows
    if padding:
        indices = jnp.pad(indices, ((0, 0), (0, padding), (0, 0)), constant_values=-1)

    def step(number: jax.Array, carry: Any) -> Any:
        head, row = divide(number, plan.row_chunks)
        head, row = head * plan.chunk_heads, row * plan.chunk_rows
        chosen = lax.dynamic_slice(indices, (head, row, jnp.int32(0)), (plan.chunk_heads, plan.chunk_rows, plan.top_k))
        schedule = jax.vmap(lambda ids: make_schedule(ids, num_blocks=plan.num_blocks, tile_size=tile_size))(chosen)
        return body(Chunk(jnp.stack([head, row]), chosen.reshape(-1), schedule), carry)

    num_chunks = plan.batch * plan.kv_heads // plan.chunk_heads * plan.row_chunks
    return loop(0, num_chunks, step, carry)


def find_tiles(schedule: Schedule, num_blocks: int) -> jax.Array:
    """Number of the first tile of each block among those of its head, and one past the last: `[heads, blocks + 1]`."""

    def find(block: jax.Array, num_tiles: jax.Array) -> jax.Array:  # [tiles], scalar -> [blocks + 1]
        block = jnp.where(jnp.arange(block.size) < num_tiles, block, num_blocks)
        return jnp.searchsorted(block, jnp.arange(num_blocks + 1)).astype(jnp.int32)

    return jax.vmap(find)(schedule.block, schedule.num_tiles)


class Rows(NamedTuple):
    """Some rows of a chunk, in a kernel; each int32 `[n]` but for is_real.

    Attributes:
      is_real: bool, whether there is such a row.
      place: its number in arrays `[batch * queries * heads]`; one past the last where there is no such row.
      token: its query's number in arrays `[batch * queries]`.
    """

    is_real: jax.Array
    place: jax.Array
    token: jax.Array


def find_rows(origin_ref: Any, head: jax.Array, row: jax.Array, is_real: jax.Array, plan: Plan) -> Rows:
    """Where rows lie in memory.

    Args:
      origin_ref: as `Chunk.origin`.
      head: scalar, number of the key/value head in the chunk.
      row: int32 `[n]`, numbers of rows in the chunk.
      is_real: bool `[n]`.
    """
    head = origin_ref[0] + head
    row = origin_ref[1] + row
    group = plan.heads // plan.kv_heads
    batch_row, kv_head = divide(head, plan.kv_heads)
    head_of_group, query = divide(row, plan.queries)
    token = batch_row * plan.queries + query
    is_real &= row < plan.rows
    place = token * plan.heads + kv_head * group + head_of_group
    # Numbers behind the last row would be places of others: an interpreted masked store writes old values there.
    return Rows(is_real, jnp.where(is_real, place, plan.batch * plan.queries * plan.heads), token)


class Pairs(NamedTuple):
    """The pairs of a tile, in a kernel: where their results go, where their rows lie and what those see."""

    place: jax.Array  # int32 [tile_size], in arrays [chunk_heads * chunk_pairs]
    rows: Rows
    key_stop: jax.Array  # int32 [tile_size]; 0 where there is no pair


def load_pairs(
    origin_ref: Any, pair_ref: Any, key_stop_ref: Any, head: jax.Array, tile: jax.Array, plan: Plan
) -> Pairs:
    """Loads a tile of the schedule; pair_ref `[chunk_heads, tiles, tile_size]`, key_stop_ref `[batch * queries]`."""
    pair = pair_ref[head, tile]
    rows = find_rows(origin_ref, head, divide(pair, plan.top_k)[0], pair < plan.chunk_pairs, plan)
    return Pairs(head * plan.chunk_pairs + pair, rows, load_numbers(key_stop_ref, rows.token, rows.is_real))


class Block(NamedTuple):
    """A key block, in a kernel; scalars."""

    first_row: jax.Array  # the row of its first key in arrays [batch * keys * kv_heads]
    start: jax.Array  # place of its first key in the sequence
    length: jax.Array


def find_block(
    origin_ref: Any, start_ref: Any, length_ref: Any, head: jax.Array, block: jax.Array, plan: Plan
) -> Block:
    """Where a block lies; start_ref and length_ref `[batch * blocks]`."""
    head = origin_ref[0] + head
    batch_row, kv_head = divide(head, plan.kv_heads)
    start = start_ref[batch_row * plan.num_blocks + block]
    length = length_ref[batch_row * plan.num_blocks + block]
    return Block((batch_row * plan.keys + start) * plan.kv_heads + kv_head, start, length)


class Keys(NamedTuple):
    """A part of a block's keys, in a kernel; each `[key_size]`."""

    rows: jax.Array  # int32, in arrays [batch * keys * kv_heads]
    is_real: jax.Array  # bool, whether the key is in the block
    place: jax.Array  # int32, in the sequence; none that a query sees where there is no key


def find_keys(block: Block, step: Any, key_size: int, plan: Plan) -> Keys:
    """The keys number step * key_size and following of a block."""
    rank = step * key_size + iota(key_size)
    is_real = rank < block.length
    return Keys(
        block.first_row + rank * plan.kv_heads,
        is_real,
        jnp.where(is_real, block.start + rank, jnp.iinfo(jnp.int32).max),
    )


def rows_program(origin_ref: Any, merge_rows: int, plan: Plan) -> tuple[jax.Array, Rows]:
    """The rows of a program of the grid (groups of merge_rows rows, chunk_heads).

    Returns:
      Number of each row's first pair in arrays `[chunk_heads * chunk_pairs]`, int32 `[merge_rows]`; and the rows.
    """
    row, head = pl.program_id(0) * merge_rows + iota(merge_rows), pl.program_id(1)
    rows = find_rows(origin_ref, head, row, row < plan.chunk_rows, plan)
    return (head * plan.chunk_rows + row) * plan.top_k, rows
