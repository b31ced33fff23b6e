"""Exact attention where all queries of a tile chose the same key blocks, in plain XLA.

Every query tile walks the list of its own blocks with a running maximum (online softmax): one step is a dense
[query_block_size, head_dim] x [head_dim, key_block_size] product for each of a few tiles at once. No sort and no
partial results: this is the cheaper order of work when the choice was made per tile, as in most prefill systems, and
the wrong one when every token chose for itself (`sparse_attn.attend.per_query`).

The backward pass recomputes the probabilities from the log-sum-exp and walks the same lists; dK and dV are added up
block by block in the order of the tiles, so the same bits come out twice on a CPU.

Names of einsum axes: c tiles of a step, t queries of a tile, m keys of a block, d head_dim.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import NOWHERE, Arrays, Results
from sparse_attn.attend.choice import PerTile
from sparse_attn.attend.derivatives import output_gradient
from sparse_attn.attend.partial import Partial
from sparse_attn.loops import heads_per_step, loop_bound, map_heads
from sparse_attn.sharding import vary_alike


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What bounds the steps of the loops.

    Attributes:
      logits_per_step: bounds the logits of a step, so that they stay in the second-level cache.
      elements_per_step: bounds the heads side by side, see `heads_per_step`.
    """

    logits_per_step: int = 2**17
    elements_per_step: int = 2**20


def forward(arrays: Arrays, choice: PerTile, scale: float, sizes: Sizes) -> Results:
    """Output and log-sum-exp, float32."""
    query, key, _ = arrays
    plan = _make_plan(query, key, choice, scale, sizes)
    attend_head = functools.partial(_attend_head, plan=plan)
    operands = _split_tiles(query, choice, key.shape[2], plan), _split_keys(arrays, choice, plan)
    output, log_sum_exp = map_heads(attend_head, operands, plan.heads_per_step)
    return _join_tiles(output, query.shape, plan), _join_tiles(log_sum_exp[..., None], query.shape, plan)[..., 0]


def backward(
    arrays: Arrays, choice: PerTile, results: Results, cotangents: Results, scale: float, sizes: Sizes
) -> Arrays:
    """As in `sparse_attn.attend.per_query`."""
    query, key, value = arrays
    plan = _make_plan(query, key, choice, scale, sizes)
    d_output, delta = output_gradient(arrays, results, cotangents)
    log_sum_exp = jnp.where(jnp.isneginf(results[1]), 0, results[1])
    rows = [_split_queries(x, key.shape[2], plan) for x in (d_output, log_sum_exp[..., None], delta[..., None])]
    operands = _split_tiles(query, choice, key.shape[2], plan), _split_keys(arrays, choice, plan)
    inputs = (*operands, rows[0], rows[1][..., 0], rows[2][..., 0])
    differentiate_head = functools.partial(_differentiate_head, plan=plan)
    d_query, d_key, d_value = map_heads(differentiate_head, inputs, plan.heads_per_step)

    def join_keys(gradient: jax.Array, like: jax.Array) -> jax.Array:  # [batch * kv_heads, key_blocks, m, x] -> like
        batch, num_keys, kv_heads, size = like.shape
        gradient = gradient.reshape(batch, kv_heads, -1, size)[:, :, :num_keys]
        return gradient.swapaxes(1, 2).astype(like.dtype)

    d_query = _join_tiles(d_query, query.shape, plan).astype(query.dtype)
    return d_query, join_keys(d_key, key), join_keys(d_value, value)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one call."""

    query_block_size: int
    key_block_size: int
    tiles_per_step: int
    heads_per_step: int
    scale: float


def _make_plan(query: jax.Array, key: jax.Array, choice: PerTile, scale: float, sizes: Sizes) -> _Plan:
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query_block, key_block = choice.query_block_size, choice.blocks.block_size
    tiles = -(-num_queries // query_block) * num_heads // kv_heads
    tiles_per_step = max(1, min(sizes.logits_per_step // (query_block * key_block), tiles))
    elements = tiles_per_step * query_block * max(key_block, head_dim)
    heads = heads_per_step(batch * kv_heads, elements, sizes.elements_per_step)
    return _Plan(query_block, key_block, tiles_per_step, heads, scale)


class _Tiles(NamedTuple):
    """The query tiles of one key/value head of one batch row, those of all its query heads in a row."""

    query: jax.Array  # [tiles, t, d]
    start: jax.Array  # [tiles, t]
    stop: jax.Array  # [tiles, t]
    block: jax.Array  # [tiles, key_blocks], chosen ids first
    length: jax.Array  # [tiles], chosen blocks


class _Keys(NamedTuple):
    """The key blocks of one key/value head of one batch row."""

    key: jax.Array  # [key_blocks, m, d]
    value: jax.Array  # [key_blocks, m, d]
    position: jax.Array  # [key_blocks, m]
    log_weight: jax.Array | None  # [key_blocks, m]


def _split_queries(array: jax.Array, kv_heads: int, plan: _Plan) -> jax.Array:
    """`[batch, queries, heads, x]` to `[batch * kv_heads, tiles, t, x]`, zeros behind the last query and tile."""
    batch, num_queries, _, size = array.shape
    array = jnp.pad(array, ((0, 0), (0, -num_queries % plan.query_block_size), (0, 0), (0, 0)))
    array = array.swapaxes(1, 2).reshape(batch * kv_heads, -1, plan.query_block_size, size)
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % plan.tiles_per_step), (0, 0), (0, 0)))


def _join_tiles(array: jax.Array, shape: tuple[int, ...], plan: _Plan) -> jax.Array:
    """Undoes `_split_queries`: `[batch * kv_heads, steps, tiles_per_step, t, x]` to `[batch, queries, heads, x]`.

    Args:
      array: tiles by steps, of which the last may reach beyond the last tile.
      shape: that of the query; its last axis does not count.
      plan: sizes.
    """
    batch, num_queries, num_heads, _ = shape
    query_blocks = -(-num_queries // plan.query_block_size)
    group = num_heads * batch // array.shape[0]
    array = array.reshape(array.shape[0], -1, *array.shape[3:])[:, : group * query_blocks]  # the tiles there are
    array = array.reshape(batch, num_heads, -1, array.shape[-1])  # [batch, heads, queries and filling, x]
    return array[:, :, :num_queries].swapaxes(1, 2)


def _split_tiles(query: jax.Array, choice: PerTile, kv_heads: int, plan: _Plan) -> _Tiles:
    batch, num_queries, num_heads, _ = query.shape
    reach = jnp.stack([choice.blocks.start, choice.blocks.stop], axis=-1)[:, :, None]  # [batch, queries, 1, 2]
    reach = _split_queries(jnp.broadcast_to(reach, (batch, num_queries, num_heads, 2)), kv_heads, plan)
    chosen = choice.chosen.reshape(batch * kv_heads, -1, choice.chosen.shape[-1])  # [.., tiles, key_blocks]
    chosen = jnp.pad(chosen, ((0, 0), (0, -chosen.shape[1] % plan.tiles_per_step), (0, 0)))
    return _Tiles(
        query=_split_queries(query, kv_heads, plan),
        start=reach[..., 0],
        stop=reach[..., 1],
        block=jnp.argsort(~chosen, axis=-1, stable=True).astype(jnp.int32),
        length=chosen.sum(-1, dtype=jnp.int32),
    )


def _split_keys(arrays: Arrays, choice: PerTile, plan: _Plan) -> _Keys:
    """One entry for each key/value head of each batch row."""
    (_, key, value), log_weight = arrays, choice.key_log_weight
    batch, num_keys, kv_heads, _ = key.shape

    def split(array: jax.Array, fill: int = 0) -> jax.Array:  # [batch, keys, kv_heads or 1, x]
        array = jnp.broadcast_to(array, (batch, num_keys, kv_heads, array.shape[-1])).swapaxes(1, 2)
        array = array.reshape(batch * kv_heads, num_keys, -1)
        array = jnp.pad(array, ((0, 0), (0, -num_keys % plan.key_block_size), (0, 0)), constant_values=fill)
        return array.reshape(batch * kv_heads, -1, plan.key_block_size, array.shape[-1])

    return _Keys(
        key=split(key),
        value=split(value),
        position=split(choice.blocks.key_position()[..., None], NOWHERE)[..., 0],
        log_weight=None if log_weight is None else split(log_weight[..., None])[..., 0],
    )


def _load(step: jax.Array, tiles: _Tiles, keys: _Keys, plan: _Plan) -> tuple[jax.Array, ...]:
    """The blocks `[c]` at place `step` of the lists, their keys and values `[c, m, d]`, and the logits `[c, t, m]`."""
    block = tiles.block[:, step]
    key, value, position = keys.key[block], keys.value[block], keys.position[block]
    logits = plan.scale * _product("ctd,cmd->ctm", tiles.query, key)
    if keys.log_weight is not None:
        logits += keys.log_weight[block][:, None]
    position = position[:, None, :]
    is_seen = (tiles.start[..., None] <= position) & (position < tiles.stop[..., None])
    is_seen &= (step < tiles.length)[:, None, None]
    return block, key, value, jnp.where(is_seen, logits, -jnp.inf)


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Einsum that accumulates in float32, or float64 for float64."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _chunks(tree: Any, plan: _Plan) -> Any:
    """Cuts the leading axis of tiles into steps: `[steps, tiles_per_step, ...]`."""
    return jax.tree.map(lambda array: array.reshape(-1, plan.tiles_per_step, *array.shape[1:]), tree)


def _attend_head(tiles: _Tiles, keys: _Keys, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Output `[steps, c, t, d]` and log-sum-exp `[steps, c, t]`, float32."""
    dtype = jnp.promote_types(tiles.query.dtype, jnp.float32)

    def attend_chunk(tiles: _Tiles) -> tuple[jax.Array, jax.Array]:
        def extend(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            maximum, total, accumulator = carry
            _, _, value, logits = _load(step, tiles, keys, plan)
            new_maximum = jnp.maximum(maximum, logits.max(-1))
            reference = jnp.where(jnp.isneginf(new_maximum), 0, new_maximum)
            weight = jnp.exp(logits - reference[..., None])
            decay = jnp.exp(maximum - reference)
            product = _product("ctm,cmd->ctd", weight.astype(value.dtype), value)
            return new_maximum, decay * total + weight.sum(-1), decay[..., None] * accumulator + product

        shape = tiles.query.shape[:2]
        accumulator = jnp.zeros((*shape, keys.value.shape[-1]), dtype)
        empty = jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), accumulator
        empty = vary_alike(empty, tiles)
        partial = Partial(*jax.lax.fori_loop(0, loop_bound(tiles.length.max()), extend, empty))
        return partial.output(), partial.log_sum_exp()

    return jax.lax.map(attend_chunk, _chunks(tiles, plan))


def _differentiate_head(
    tiles: _Tiles, keys: _Keys, d_output: jax.Array, log_sum_exp: jax.Array, delta: jax.Array, plan: _Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query `[steps, c, t, d]` and of key and value `[key_blocks, m, d]`, float32."""
    dtype = log_sum_exp.dtype

    def differentiate_chunk(carry: Any, chunk: tuple) -> tuple[Any, jax.Array]:
        tiles, d_output, log_sum_exp, delta = chunk

        def extend(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_key, d_value, d_query = carry
            block, key, value, logits = _load(step, tiles, keys, plan)
            probability = jnp.exp(logits - log_sum_exp[..., None])
            d_probability = _product("ctd,cmd->ctm", d_output, value)
            d_logits = (plan.scale * probability * (d_probability - delta[..., None])).astype(key.dtype)
            probability = probability.astype(key.dtype)
            return (
                d_key.at[block].add(_product("ctm,ctd->cmd", d_logits, tiles.query)),
                d_value.at[block].add(_product("ctm,ctd->cmd", probability, d_output)),
                d_query + _product("ctm,cmd->ctd", d_logits, key),
            )

        empty = vary_alike(jnp.zeros(tiles.query.shape, dtype), tiles)
        *carry, d_query = jax.lax.fori_loop(0, loop_bound(tiles.length.max()), extend, (*carry, empty))
        return tuple(carry), d_query

    empty = vary_alike(tuple(jnp.zeros(array.shape, dtype) for array in (keys.key, keys.value)), keys)
    chunks = _chunks((tiles, d_output, log_sum_exp, delta), plan)
    (d_key, d_value), d_query = jax.lax.scan(differentiate_chunk, empty, chunks)
    return d_query, d_key, d_value
