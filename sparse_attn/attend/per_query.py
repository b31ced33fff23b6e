"""The sparse path in plain XLA: cost and memory follow the chosen blocks, not the square of the sequence.

Pairs (query, chosen block) are sorted by block and cut into tiles (`pallas_kernels.schedule`). A loop takes a few tiles
at a time: gathers their queries, slices their blocks, does one small dense attention each and puts the result at its
pair. Each query then merges its pairs. The loop ends with the last tile in use, so that the room the tables keep for
the worst case costs no time; but an accelerator must not ask the host after every step, so there steps are few and
large and, but for packed rows, of known number (`Sizes.step_bytes`). Queries are worked through in chunks: the results
of one chunk's pairs, `[chunk * top_k, head_dim]`, are the largest array alive beside inputs and outputs.

The backward pass recomputes the probabilities from the log-sum-exp. dK and dV add up tile after tile; dQ is found for
each pair and summed over a query's pairs. Nothing is added in an order that could change from run to run on a CPU; on a
GPU XLA adds up dK and dV in no fixed order.

Names of einsum axes: t pairs of a tile, m keys of a block, d head_dim, i tiles of a step.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Arrays, Results
from pallas_kernels.schedule import Schedule, make_schedule
from sparse_attn.attend.choice import PerQuery
from sparse_attn.attend.derivatives import output_gradient
from sparse_attn.attend.partial import merge_stacked
from sparse_attn.loops import at_least, divisor, for_each, heads_per_step, loop_bound, map_heads
from sparse_attn.sharding import vary_alike


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What bounds the steps of the loops. Found by measurement on two CPU cores (float32, head_dim 64).

    Attributes:
      tile_sizes: pairs of a tile, the largest first that leaves few slots empty; the largest overall wastes slots,
        smaller ones starve the product.
      pairs_per_step: bounds the gathered queries of a step.
      logits_per_step: bounds the logits of a step, so that they stay in the second-level cache.
      rows_per_chunk: queries times heads of a group that are in work at a time, at least.
      elements_per_step: bounds the heads side by side, see `heads_per_step`.
      step_bytes: if given, takes the place of the four bounds above: memory of a step beside inputs and outputs, by
        estimate. Steps are as few as that allows, and rows without segments have loops of known length.
    """

    tile_sizes: tuple[int, ...] = (64, 32, 16, 8)
    pairs_per_step: int = 2048
    logits_per_step: int = 65536
    rows_per_chunk: int = 4096
    elements_per_step: int = 2**20
    step_bytes: int | None = None


def forward(arrays: Arrays, choice: PerQuery, scale: float, sizes: Sizes) -> Results:
    """Output, float32, and log-sum-exp."""
    query, key, _ = arrays
    plan = _make_plan(arrays, choice, scale, sizes, is_backward=False)
    heads, keys = _split_heads(arrays, choice, plan)
    attend_head = functools.partial(_attend_head, keys=keys, plan=plan)
    output, log_sum_exp = map_heads(attend_head, (heads,), plan.heads_per_step)
    kv_heads = key.shape[2]
    output = _join_rows(output, query.shape, kv_heads)  # [batch, queries, heads, value_head_dim]
    return output, _join_rows(log_sum_exp[..., None], query.shape, kv_heads)[..., 0]


def backward(
    arrays: Arrays, choice: PerQuery, results: Results, cotangents: Results, scale: float, sizes: Sizes
) -> Arrays:
    """With P = exp(logits - log_sum_exp), dS = P (dO V^T - delta): dQ = dS K, dK = dS^T Q, dV = P^T dO."""
    query, key, value = arrays
    plan = _make_plan(arrays, choice, scale, sizes, is_backward=True)
    kv_heads = key.shape[2]
    d_output, delta = output_gradient(arrays, results, cotangents)
    rows = [_split_rows(x, kv_heads, plan) for x in (d_output, results[1][..., None], delta[..., None])]
    heads, keys = _split_heads(arrays, choice, plan)
    inputs = (heads, rows[0], rows[1][..., 0], rows[2][..., 0])
    differentiate_head = functools.partial(_differentiate_head, keys=keys, plan=plan)
    d_query, d_key, d_value = map_heads(differentiate_head, inputs, plan.heads_per_step)

    def join_keys(gradient: jax.Array, like: jax.Array) -> jax.Array:  # [batch * kv_heads, keys, x]
        batch, num_keys, _, size = like.shape
        gradient = gradient[:, :num_keys].reshape(batch, kv_heads, num_keys, size)
        return gradient.swapaxes(1, 2).astype(like.dtype)

    return _join_rows(d_query, query.shape, kv_heads), join_keys(d_key, key), join_keys(d_value, value)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one call. A row of a chunk is one query of one head: (query, head of the group), query-major."""

    block_size: int
    chunk_rows: int
    num_chunks: int
    tile_size: int
    tiles_per_step: int
    num_steps: int | None  # of a chunk; None: as many as there are tiles for
    heads_per_step: int
    is_packed: bool  # whether the keys behind a short block belong to another segment
    scale: float


class _Head(NamedTuple):
    """What one key/value head of one batch row attends with; indices of a chunk's rows are counted from its start."""

    query: jax.Array  # [chunks, chunk_rows, head_dim]
    indices: jax.Array  # [chunks, chunk_rows, top_k]
    key_stop: jax.Array  # [chunks, chunk_rows]
    head: jax.Array  # scalar, which of the heads in _Keys
    block_start: jax.Array  # [blocks]
    block_length: jax.Array  # [blocks]


class _Keys(NamedTuple):
    """The keys and values of all heads, for a loop over heads to read in place; `keys` counts some padding."""

    key: jax.Array  # [batch * kv_heads, keys, head_dim], in block order, zeros behind the end
    value: jax.Array  # [batch * kv_heads, keys, value_head_dim]


class _Tiles(NamedTuple):
    """The tiles of one step, loaded."""

    pair: jax.Array  # [i, t]
    row: jax.Array  # [i, t], chunk_rows where the tile is not full
    start: jax.Array  # [i, 1], place of the block's first key
    query: jax.Array  # [i, t, d]
    key: jax.Array  # [i, m, d]
    value: jax.Array  # [i, m, d]
    logits: jax.Array  # [i, t, m], -inf where masked


def _make_plan(arrays: Arrays, choice: PerQuery, scale: float, sizes: Sizes, is_backward: bool) -> _Plan:
    query, key, _ = arrays
    blocks, (batch, _, num_queries, top_k) = choice.blocks, choice.indices.shape
    kv_heads, head_dim = key.shape[2:]
    group = query.shape[2] // kv_heads
    full_blocks = blocks.max_choices
    numbers = batch, num_queries, top_k, full_blocks
    if sizes.step_bytes is not None and all(isinstance(number, int) for number in numbers):  # none is symbolic
        return _plan_few_steps(arrays, choice, scale, sizes, sizes.step_bytes, is_backward)
    # At least two of the largest tiles a block and chunk on average, so that half-empty tiles stay few.
    rows = at_least(sizes.rows_per_chunk, 2 * sizes.tile_sizes[0] * full_blocks // top_k)
    if isinstance(num_queries, int):
        num_chunks = -(-num_queries * group // rows)
        chunk_rows = -(-num_queries // num_chunks) * group
    else:  # of symbolic size
        chunk_rows = -(-rows // group) * group
        num_chunks = -(-num_queries * group // chunk_rows)
    tile_size = sizes.tile_sizes[0]
    if isinstance(full_blocks, int):
        pairs_per_block = chunk_rows * top_k // full_blocks
        tile_size = next((size for size in sizes.tile_sizes if 2 * size <= pairs_per_block), sizes.tile_sizes[-1])
    heads = heads_per_step(batch * kv_heads, chunk_rows * top_k * head_dim, sizes.elements_per_step)
    tiles_per_step = sizes.logits_per_step // (tile_size * blocks.block_size), sizes.pairs_per_step // tile_size
    return _Plan(
        block_size=blocks.block_size,
        chunk_rows=chunk_rows,
        num_chunks=num_chunks,
        tile_size=tile_size,
        tiles_per_step=max(min(tiles_per_step) // heads, 1),
        num_steps=None,
        heads_per_step=heads,
        is_packed=blocks.is_packed,
        scale=scale,
    )


def _plan_few_steps(
    arrays: Arrays, choice: PerQuery, scale: float, sizes: Sizes, step_bytes: int, is_backward: bool
) -> _Plan:
    """Whole heads side by side, in one step where the memory allows."""
    (query, key, value), blocks = arrays, choice.blocks
    batch, _, num_queries, top_k = choice.indices.shape
    kv_heads, full_blocks = key.shape[2], blocks.max_choices
    group = query.shape[2] // kv_heads
    columns, item = key.shape[3] + value.shape[3], query.dtype.itemsize
    exact = jnp.promote_types(query.dtype, jnp.float32).itemsize
    # Results of a pair, and its place in the schedule; of a slot, its rows of Q (and dO), its results and a table (or
    # two) over the keys, exact and rounded; a tile's keys and values (and their gradients).
    tables = 2 if is_backward else 1
    pair_bytes = exact * value.shape[3] + 32
    slot_bytes = item * columns + exact * value.shape[3] + tables * (exact + item) * blocks.block_size
    tile_bytes = blocks.block_size * columns * (item + exact * is_backward)

    def plan_chunk(num_chunks: int) -> tuple[int, int, int, int]:
        """Rows of a chunk, pairs of a tile, tiles of a chunk at most or, if packed, by estimate, and bytes."""
        rows = -(-num_queries // num_chunks) * group
        fits = (size for size in sizes.tile_sizes if 2 * size <= rows * top_k // full_blocks)
        tile_size = next(fits, sizes.tile_sizes[-1])
        tiles = rows * top_k // tile_size + min(full_blocks, rows * top_k)
        return rows, tile_size, tiles, rows * top_k * pair_bytes + tiles * (tile_size * slot_bytes + tile_bytes)

    num_chunks = 1
    while True:
        rows, tile_size, tiles, total = plan_chunk(num_chunks)
        fewer = -(-num_queries // (2 * num_chunks)) * group
        if total <= step_bytes or fewer * top_k < 2 * sizes.tile_sizes[0] * full_blocks:
            break  # else smaller chunks, but for tiles half empty
        num_chunks *= 2
    tiles_per_step = -(-tiles // -(-total // step_bytes))
    return _Plan(
        block_size=blocks.block_size,
        chunk_rows=rows,
        num_chunks=num_chunks,
        tile_size=tile_size,
        tiles_per_step=tiles_per_step,
        num_steps=None if blocks.is_packed else -(-tiles // tiles_per_step),
        heads_per_step=divisor(batch * kv_heads, step_bytes // total),
        is_packed=blocks.is_packed,
        scale=scale,
    )


def _split_rows(array: jax.Array, kv_heads: int, plan: _Plan) -> jax.Array:
    """`[batch, queries, heads, x]` to `[batch * kv_heads, chunks, chunk_rows, x]`, zeros behind the last query."""
    batch, num_queries, _, size = array.shape
    array = array.reshape(batch, num_queries, kv_heads, -1, size).swapaxes(1, 2)
    array = array.reshape(batch * kv_heads, -1, size)
    array = jnp.pad(array, ((0, 0), (0, plan.num_chunks * plan.chunk_rows - array.shape[1]), (0, 0)))
    return array.reshape(batch * kv_heads, plan.num_chunks, plan.chunk_rows, size)


def _join_rows(array: jax.Array, shape: tuple[int, ...], kv_heads: int) -> jax.Array:
    """Undoes `_split_rows` for an array that was `[batch, queries, heads, x]` of that shape, x aside."""
    batch, num_queries, num_heads, _ = shape
    group, size = num_heads // kv_heads, array.shape[-1]
    array = array.reshape(batch, kv_heads, -1, size)[:, :, : num_queries * group]
    array = array.reshape(batch, kv_heads, num_queries, group, size)
    return array.swapaxes(1, 2).reshape(batch, num_queries, num_heads, size)


def _split_heads(arrays: Arrays, choice: PerQuery, plan: _Plan) -> tuple[_Head, _Keys]:
    """One entry for each key/value head of each batch row, along a new leading axis [batch * kv_heads]."""
    (query, key, value), blocks = arrays, choice.blocks
    batch, num_keys, kv_heads, _ = key.shape
    num_heads = query.shape[2]
    # The last block is read whole; in packed rows it may start anywhere.
    whole_blocks = -(-num_keys // plan.block_size) * plan.block_size
    padding = plan.block_size if plan.is_packed else whole_blocks - num_keys

    def split_keys(array: jax.Array) -> jax.Array:
        array = array.swapaxes(1, 2).reshape(batch * kv_heads, num_keys, -1)
        return jnp.pad(array, ((0, 0), (0, padding), (0, 0)))

    # Ids are shifted by one so that padding means "none".
    indices = blocks.reachable(choice.indices).swapaxes(1, 2)  # [batch, queries, heads, top_k]
    key_stop = jnp.broadcast_to(blocks.stop[..., None, None], (*query.shape[:2], num_heads, 1))
    heads = _Head(
        query=_split_rows(query, kv_heads, plan),
        indices=_split_rows(indices + 1, kv_heads, plan) - 1,
        key_stop=_split_rows(key_stop, kv_heads, plan)[..., 0],
        head=jnp.arange(batch * kv_heads, dtype=jnp.int32),
        block_start=jnp.repeat(blocks.block_start, kv_heads, axis=0),
        block_length=jnp.repeat(blocks.block_length, kv_heads, axis=0),
    )
    return heads, _Keys(split_keys(key), split_keys(value))


def _load_tiles(step: jax.Array, schedule: Schedule, chunk: _Head, keys: _Keys, plan: _Plan) -> _Tiles:
    """Gathers the queries and blocks of one step's tiles; `chunk` is a head with the rows of one chunk."""
    first = step * plan.tiles_per_step
    pair = jax.lax.dynamic_slice_in_dim(schedule.pair, first, plan.tiles_per_step)  # [i, t]
    block = jax.lax.dynamic_slice_in_dim(schedule.block, first, plan.tiles_per_step)  # [i]
    row = pair // chunk.indices.shape[-1]
    start = chunk.block_start[block][:, None]  # [i, 1]
    place = start + jnp.arange(plan.block_size)[None, :]  # [i, m]
    key, value = (_take_windows(array, chunk.head, start, plan) for array in keys)  # [i, m, d]
    if plan.is_packed:  # another segment's keys, whatever they hold, must not even meet a probability of zero
        in_block = place < start + chunk.block_length[block][:, None]
        key, value = (jnp.where(in_block[..., None], array, 0) for array in (key, value))
    query = _take_rows(chunk.query, row)  # [i, t, d]
    logits = plan.scale * _product("itd,imd->itm", query, key)
    key_stop = _take_rows(chunk.key_stop, row)  # [i, t], 0 where the tile is not full
    is_seen = place[:, None, :] < key_stop[..., None]  # [i, t, m]
    if plan.is_packed:
        is_seen &= in_block[:, None, :]
    logits = jnp.where(is_seen, logits, -jnp.inf)
    return _Tiles(pair, row, start, query, key, value, logits)


def _schedule(chunk: _Head, plan: _Plan) -> Schedule:
    return make_schedule(
        chunk.indices,
        num_blocks=chunk.block_start.size,
        tile_size=plan.tile_size,
        tiles_per_step=plan.tiles_per_step,
    )


def _num_steps(schedule: Schedule, plan: _Plan) -> int | jax.Array:
    if plan.num_steps is not None:
        return plan.num_steps
    return loop_bound(-(-schedule.num_tiles // plan.tiles_per_step))


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Einsum that accumulates in float32, or float64 for float64."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _take_rows(array: jax.Array, row: jax.Array) -> jax.Array:
    """Rows of `[chunk_rows, ...]`, zeros for those past the end."""
    return array.at[row].get(mode="fill", fill_value=0)


def _set_pairs(array: jax.Array, pair: jax.Array, new: jax.Array) -> jax.Array:
    """Writes `[i, t, ...]` to the pairs `[i, t]` of `[pairs, ...]`; those past the end are dropped."""
    return array.at[pair].set(new, mode="drop", unique_indices=True)


def _take_windows(array: jax.Array, head: jax.Array, start: jax.Array, plan: _Plan) -> jax.Array:
    """`[i, m, d]`: of one head of `[heads, keys, d]`, block_size rows from each start `[i, 1]` on."""
    place = jnp.concatenate([jnp.broadcast_to(head, start.shape), start], axis=1)  # [i, 2]
    dimensions = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return jax.lax.gather(array, place, dimensions, (1, plan.block_size, array.shape[2]), mode="promise_in_bounds")


def _add_windows(array: jax.Array, start: jax.Array, new: jax.Array) -> jax.Array:
    """Adds `[i, m, d]` to the rows of `[keys, d]` from each start `[i, 1]` on."""
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    return jax.lax.scatter_add(array, start, new, dimensions, indices_are_sorted=True, mode="promise_in_bounds")


def _attend_head(head: _Head, keys: _Keys, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Output `[chunks, chunk_rows, value_head_dim]` and log-sum-exp `[chunks, chunk_rows]`, float32."""
    head_dim = keys.value.shape[-1]
    accumulator = jnp.promote_types(head.query.dtype, jnp.float32)

    def attend_chunk(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query, indices, key_stop = rows
        chunk = head._replace(query=query, indices=indices, key_stop=key_stop)
        top_k = indices.shape[-1]
        num_pairs = plan.chunk_rows * top_k
        schedule = _schedule(chunk, plan)

        def attend_tiles(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            outputs, log_sum_exps = carry
            tiles = _load_tiles(step, schedule, chunk, keys, plan)
            largest = tiles.logits.max(-1, keepdims=True)  # [i, t, 1]
            largest = jnp.where(jnp.isneginf(largest), 0, largest)
            weight = jnp.exp(tiles.logits - largest)
            total = weight.sum(-1, keepdims=True)
            output = _product("itm,imd->itd", weight.astype(tiles.value.dtype), tiles.value)
            output = output / jnp.where(total == 0, 1, total)
            return (
                _set_pairs(outputs, tiles.pair, output),
                _set_pairs(log_sum_exps, tiles.pair, (largest + jnp.log(total))[..., 0]),
            )

        empty = jnp.zeros((num_pairs, head_dim), accumulator), jnp.full(num_pairs, -jnp.inf, accumulator)
        empty = vary_alike(empty, rows)
        outputs, log_sum_exps = for_each(_num_steps(schedule, plan), attend_tiles, empty)
        return merge_stacked(outputs.reshape(-1, top_k, head_dim), log_sum_exps.reshape(-1, top_k), axis=1)

    return jax.lax.map(attend_chunk, (head.query, head.indices, head.key_stop))


def _differentiate_head(
    head: _Head, d_output: jax.Array, log_sum_exp: jax.Array, delta: jax.Array, keys: _Keys, plan: _Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value; d_output `[chunks, chunk_rows, value_head_dim]`, the rest one number a row."""
    accumulator = log_sum_exp.dtype

    def differentiate_chunk(carry: tuple[jax.Array, jax.Array], inputs: tuple) -> tuple[tuple, jax.Array]:
        query, indices, key_stop, d_output, log_sum_exp, delta = inputs
        chunk = head._replace(query=query, indices=indices, key_stop=key_stop)
        top_k = indices.shape[-1]
        schedule = _schedule(chunk, plan)
        safe_log_sum_exp = jnp.where(jnp.isneginf(log_sum_exp), 0, log_sum_exp)  # [chunk_rows]

        def differentiate_tiles(step: jax.Array, carry: tuple) -> tuple:
            d_key, d_value, d_queries = carry
            tiles = _load_tiles(step, schedule, chunk, keys, plan)
            dtype = tiles.value.dtype
            probability = jnp.exp(tiles.logits - _take_rows(safe_log_sum_exp, tiles.row)[..., None])
            d_out = _take_rows(d_output, tiles.row)  # [i, t, d]
            d_probability = _product("itd,imd->itm", d_out, tiles.value)
            d_logits = probability * (d_probability - _take_rows(delta, tiles.row)[..., None])
            d_logits = (plan.scale * d_logits).astype(dtype)
            d_key = _add_windows(d_key, tiles.start, _product("itm,itd->imd", d_logits, tiles.query))
            d_value = _add_windows(d_value, tiles.start, _product("itm,itd->imd", probability.astype(dtype), d_out))
            return d_key, d_value, _set_pairs(d_queries, tiles.pair, _product("itm,imd->itd", d_logits, tiles.key))

        d_queries = vary_alike(jnp.zeros((plan.chunk_rows * top_k, query.shape[-1]), accumulator), query)
        *carry, d_queries = for_each(_num_steps(schedule, plan), differentiate_tiles, (*carry, d_queries))
        d_query = d_queries.reshape(plan.chunk_rows, top_k, -1).sum(1)
        return tuple(carry), d_query.astype(query.dtype)

    empty = vary_alike(tuple(jnp.zeros(array.shape[1:], accumulator) for array in keys), keys)
    chunks = (head.query, head.indices, head.key_stop, d_output, log_sum_exp, delta)
    (d_key, d_value), d_query = jax.lax.scan(differentiate_chunk, empty, chunks)
    return d_query, d_key, d_value
