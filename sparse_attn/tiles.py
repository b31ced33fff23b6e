"""Exact attention where all queries of a tile chose the same key blocks: query-tile-major, in plain XLA.

On a TPU the kernels of `pallas_kernels/tpu` take over, as far as they can do the call.

Every query tile walks the list of its own blocks with a running maximum (online softmax): one step is a dense
[query_block_size, head_dim] x [head_dim, key_block_size] product for each of a few tiles at once. No sort and no
partial results: this is the cheaper order of work when the choice was made per tile, as in most prefill systems, and
the wrong one when every token chose for itself (`sparse_attn.xla`).

The backward pass recomputes the probabilities from the log-sum-exp and walks the same lists; dK and dV are added up
block by block in the order of the tiles, so the same bits come out twice on a CPU.

Names of einsum axes: c tiles of a step, t queries of a tile, m keys of a block, d head_dim.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_attn.loops import heads_per_step, loop_bound, map_heads
from sparse_attn.merge import Partial, as_partial
from sparse_attn.selection import LevelMap
from sparse_attn.visibility import NOWHERE, Visibility, visible_blocks, zero_unseen

_LOGITS_PER_STEP = 2**17  # bounds the logits of a step, so that they stay in the second-level cache


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one call."""

    query_block_size: int
    key_block_size: int
    tiles_per_step: int
    heads_per_step: int
    scale: float


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
    log_weight: jax.Array  # [key_blocks, m]


def attend_tiles(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    levels: LevelMap,
    visibility: Visibility,
    *,
    scale: float,
    level: int = 1,
    key_log_weight: jax.Array | None = None,
) -> Partial:
    """Softmax attention of every query over the visible keys of the blocks that its tile has at `level`.

    logits = scale q k + key_log_weight. Gradients flow to query, key and value; softmax and sums are float32.
    Source: FlashAttention-2 (arXiv 2307.08691), sections 2 and 3, over a list of blocks.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
      value: shaped like key.
      levels: the choice; its sizes must cover the queries and keys.
      visibility: which keys a query may see inside chosen blocks.
      scale: factor of the logits.
      level: the level of the map that is attended here.
      key_log_weight: float32 `[batch, keys, kv_heads]`, natural logarithm of how many times a key counts; no gradient.

    Raises:
      ValueError: levels does not fit the arrays.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    query_block, key_block = levels.query_block_size, levels.key_block_size
    expected = (batch, num_heads, -(-num_queries // query_block), -(-num_keys // key_block))
    if levels.levels.shape != expected:
        raise ValueError(
            f"levels must be [batch, heads, query_blocks, key_blocks] = {expected}, got {levels.levels.shape}"
        )
    query, key, value = zero_unseen(query, key, value, visibility)
    chosen = (levels.levels == level) & visible_blocks(visibility, query_block, key_block).repeat(
        num_heads // visibility.position.shape[2], axis=1
    )
    if jax.default_backend() == "tpu" and key_log_weight is None:
        from sparse_attn import pallas  # here, so that the library does without Pallas where there are no kernels

        with contextlib.suppress(NotImplementedError):
            return as_partial(
                *pallas.attend_tiles(query, key, value, chosen, visibility, query_block, key_block, scale)
            )
    tiles_per_step = max(1, min(_LOGITS_PER_STEP // (query_block * key_block), expected[2] * num_heads // kv_heads))
    heads = heads_per_step(batch * kv_heads, tiles_per_step * query_block * max(key_block, head_dim))
    plan = _Plan(query_block, key_block, tiles_per_step, heads, scale)
    if key_log_weight is None:
        key_log_weight = jnp.zeros((batch, num_keys, 1), jnp.float32)
    return as_partial(*_attend(query, key, value, chosen, visibility, jax.lax.stop_gradient(key_log_weight), plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    chosen: jax.Array,
    visibility: Visibility,
    key_log_weight: jax.Array,
    plan: _Plan,
) -> tuple[jax.Array, jax.Array]:
    tiles = _split_tiles(query, chosen, visibility, key.shape[2], plan)
    keys = _split_keys(key, value, visibility, key_log_weight, plan)
    attend_head = functools.partial(_attend_head, plan=plan)
    output, log_sum_exp = map_heads(attend_head, (tiles, keys), plan.heads_per_step)
    return (
        _join_tiles(output, query.shape, plan).astype(query.dtype),
        _join_tiles(log_sum_exp[..., None], query.shape, plan)[..., 0],
    )


def _attend_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    chosen: jax.Array,
    visibility: Visibility,
    key_log_weight: jax.Array,
    plan: _Plan,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    output, log_sum_exp = _attend(query, key, value, chosen, visibility, key_log_weight, plan)
    return (output, log_sum_exp), (query, key, value, chosen, visibility, key_log_weight, output, log_sum_exp)


def _attend_backward(plan: _Plan, residuals: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    """With P = exp(logits - log_sum_exp), dS = P (dO V^T - delta): dQ = dS K, dK = dS^T Q, dV = P^T dO.

    delta = sum(dO O) - dL, where dL is the gradient of the log-sum-exp. FlashAttention-2 (arXiv 2307.08691), section 2.
    """
    query, key, value, chosen, visibility, key_log_weight, output, log_sum_exp = residuals
    d_output, d_log_sum_exp = gradients
    dtype = log_sum_exp.dtype
    delta = (d_output.astype(dtype) * output.astype(dtype)).sum(-1) - d_log_sum_exp  # [batch, queries, heads]
    tiles = _split_tiles(query, chosen, visibility, key.shape[2], plan)
    keys = _split_keys(key, value, visibility, key_log_weight, plan)
    log_sum_exp = jnp.where(jnp.isneginf(log_sum_exp), 0, log_sum_exp)
    rows = [_split_queries(x, key.shape[2], plan) for x in (d_output, log_sum_exp[..., None], delta[..., None])]
    differentiate_head = functools.partial(_differentiate_head, plan=plan)
    inputs = (tiles, keys, rows[0], rows[1][..., 0], rows[2][..., 0])
    d_query, d_key, d_value = map_heads(differentiate_head, inputs, plan.heads_per_step)

    def join_keys(gradient: jax.Array) -> jax.Array:  # [batch * kv_heads, key_blocks, m, d] -> like key
        batch, num_keys, kv_heads, head_dim = key.shape
        gradient = gradient.reshape(batch, kv_heads, -1, head_dim)[:, :, :num_keys]
        return gradient.swapaxes(1, 2).astype(key.dtype)

    d_query = _join_tiles(d_query, query.shape, plan).astype(query.dtype)
    return d_query, join_keys(d_key), join_keys(d_value), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _split_queries(array: jax.Array, kv_heads: int, plan: _Plan) -> jax.Array:
    """`[batch, queries, heads, x]` to `[batch * kv_heads, tiles, t, x]`, zeros behind the last query and tile."""
    batch, num_queries, _, size = array.shape
    array = jnp.pad(array, ((0, 0), (0, -num_queries % plan.query_block_size), (0, 0), (0, 0)))
    array = array.swapaxes(1, 2).reshape(batch * kv_heads, -1, plan.query_block_size, size)
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % plan.tiles_per_step), (0, 0), (0, 0)))


def _join_tiles(array: jax.Array, shape: tuple[int, ...], plan: _Plan) -> jax.Array:
    """Undoes `_split_queries` for queries of `shape` (its last axis aside)."""
    batch, num_queries, num_heads, _ = shape
    query_blocks = -(-num_queries // plan.query_block_size)
    array = array.reshape(batch, array.shape[0] // batch, -1, *array.shape[2:])  # [batch, kv_heads, tiles, t, x]
    tiles = num_heads // array.shape[1] * query_blocks
    array = array[:, :, :tiles].reshape(batch, num_heads, -1, array.shape[-1])
    return array[:, :, :num_queries].swapaxes(1, 2)


def _split_tiles(query: jax.Array, chosen: jax.Array, visibility: Visibility, kv_heads: int, plan: _Plan) -> _Tiles:
    batch, num_queries, num_heads, _ = query.shape
    reach = jnp.stack([visibility.start, visibility.stop], axis=-1)[:, :, None]  # [batch, queries, 1, 2]
    reach = _split_queries(jnp.broadcast_to(reach, (batch, num_queries, num_heads, 2)), kv_heads, plan)
    chosen = chosen.reshape(batch * kv_heads, -1, chosen.shape[-1])  # [batch * kv_heads, tiles, key_blocks]
    chosen = jnp.pad(chosen, ((0, 0), (0, -chosen.shape[1] % plan.tiles_per_step), (0, 0)))
    return _Tiles(
        query=_split_queries(query, kv_heads, plan),
        start=reach[..., 0],
        stop=reach[..., 1],
        block=jnp.argsort(~chosen, axis=-1, stable=True).astype(jnp.int32),
        length=chosen.sum(-1, dtype=jnp.int32),
    )


def _split_keys(
    key: jax.Array, value: jax.Array, visibility: Visibility, key_log_weight: jax.Array, plan: _Plan
) -> _Keys:
    """One entry for each key/value head of each batch row."""
    batch, num_keys, kv_heads, _ = key.shape

    def split(array: jax.Array, fill: int = 0) -> jax.Array:  # [batch, keys, kv_heads or 1, x]
        array = jnp.broadcast_to(array, (batch, num_keys, kv_heads, array.shape[-1])).swapaxes(1, 2)
        array = array.reshape(batch * kv_heads, num_keys, -1)
        array = jnp.pad(array, ((0, 0), (0, -num_keys % plan.key_block_size), (0, 0)), constant_values=fill)
        return array.reshape(batch * kv_heads, -1, plan.key_block_size, array.shape[-1])

    return _Keys(
        key=split(key),
        value=split(value),
        position=split(visibility.position[..., None], NOWHERE)[..., 0],
        log_weight=split(key_log_weight[..., None])[..., 0],
    )


def _load(step: jax.Array, tiles: _Tiles, keys: _Keys, plan: _Plan) -> tuple[jax.Array, ...]:
    """The blocks `[c]` at place `step` of the lists, their keys and values `[c, m, d]`, and the logits `[c, t, m]`."""
    block = tiles.block[:, step]
    key, value, position = keys.key[block], keys.value[block], keys.position[block]
    logits = plan.scale * _product("ctd,cmd->ctm", tiles.query, key) + keys.log_weight[block][:, None]
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

        shape = tiles.query.shape
        empty = jnp.full(shape[:2], -jnp.inf, dtype), jnp.zeros(shape[:2], dtype), jnp.zeros(shape, dtype)
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

        empty = jnp.zeros(tiles.query.shape, dtype)
        *carry, d_query = jax.lax.fori_loop(0, loop_bound(tiles.length.max()), extend, (*carry, empty))
        return tuple(carry), d_query

    empty = jnp.zeros(keys.key.shape, dtype)
    chunks = _chunks((tiles, d_output, log_sum_exp, delta), plan)
    (d_key, d_value), d_query = jax.lax.scan(differentiate_chunk, (empty, empty), chunks)
    return d_query, d_key, d_value
