"""Gradients of attention for choices made per query, on a GPU of any kind: in Triton, without atomics.

Compiled and interpreted only: nothing here has run on a GPU yet.

With P = exp(scale Q K^T - L), delta = sum(dO O) - dL and dS = scale P (dO V^T - delta): dQ = dS K, dK = dS^T Q,
dV = P^T dO. Source: FlashAttention-2 (arXiv 2307.08691), section 2.

Tiling. Chunks of rows and tiles of pairs as in `forward`. Three kernels, or two where a program has a whole block.

dK and dV. Grid (part of `key_size` keys of a block, key/value head). A program keeps its keys and values and both
gradients, [key_size, head_dim] in float32, in registers, and walks the tiles of its block, which follow one another: it
gathers their rows (query, gradient of the output, log-sum-exp, delta), computes P and dS again, and adds dS^T Q and
P^T dO. At the end it adds the sums to what earlier chunks left. Where its part is the whole block, it has all that
the dQ of a pair is made of: it also leaves dS K at the place of the pair, in the dtype of the queries.

dQ of pairs, for blocks of more than `key_size` keys. Grid (tile, key/value head of the chunk): the shape of the forward
kernel. A program gathers the rows of its tile, walks the keys of its block, computes P and dS once more, adds up dS K,
and leaves it in the same place.

Sum. Grid (group of rows, key/value head): adds up what the pairs of a row left, and writes dQ where it belongs.

Sums have a fixed order, that of the schedule: the same bits in every run. dK and dV pass from chunk to chunk in
float32, or in the dtype of the keys where one chunk holds all rows of a head.

Memory. Registers of the first kernel: two accumulators and two products [key_size, backward_tile_size]. Global memory:
inputs, outputs, partial dQ of a chunk.

Speed. Bound by memory. No kernel adds to memory that another program may touch. The price of that, for blocks of more
than `key_size` keys: seven products instead of five, for P and dS are computed twice, and queries and gradients of
outputs are gathered twice. At the sizes named in `forward`: 35 GB and 3.9 TFLOP, by arithmetic 7.2 ms on an H200
(`docs/gpu-roofline.md`), of which doing things twice costs 2.1 ms. A `key_size` of 128 saves that; at head_dim 128 its
accumulators leave room, without spills, for tiles of 32 pairs, or of 64 with one stage, and for one program a
multiprocessor, which may be too few to hide the gathering. Which is faster is not known.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Arrays, Blocks, Results
from pallas_kernels.config import TRITON, TritonConfig
from pallas_kernels.gpu import plain
from pallas_kernels.gpu.chunks import (
    Chunk,
    Plan,
    find_block,
    find_keys,
    find_tiles,
    for_chunks,
    load_pairs,
    make_plan,
    rows_program,
)
from pallas_kernels.gpu.tiles import (
    ceil_div,
    divide,
    load_numbers,
    load_rows,
    loop,
    padded_head_dim,
    plgpu,
    refuses,
    store_rows,
)
from pallas_kernels.numerics import LOG2_E, NN, NT, TN, product


def attend_backward(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    results: Results,
    cotangents: Results,
    *,
    scale: float,
    config: TritonConfig = TRITON,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attend_forward` for query, key and value. Has not run on a GPU yet.

    Args:
      arrays, indices, blocks, scale, config, interpret: as given to `attend_forward`.
      results: what it gave.
      cotangents: the gradients of these.

    Returns:
      Gradients of query, key and value, like them. Zero for a query without blocks.

    Raises:
      NotImplementedError: as `attend_forward`.
    """
    (query, key, value), (output, log_sum_exp), (d_output, d_log_sum_exp) = arrays, results, cotangents
    if (reason := refuses(query)) is not None:
        raise NotImplementedError(reason)
    config = config.for_rows(padded_head_dim(query.shape[-1]), query.dtype.itemsize)
    plan = make_plan(
        query,
        key,
        indices,
        num_blocks=blocks.num_blocks,
        block_size=blocks.block_size,
        scale=scale,
        tile_size=config.backward_tile_size,
        arrays=4,
        config=config,
    )
    delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1) - d_log_sum_exp
    log2_sum = jnp.where(jnp.isneginf(log_sum_exp), 0, log_sum_exp * LOG2_E)  # [batch, queries, heads]
    numbers = blocks.block_start.reshape(-1), blocks.block_length.reshape(-1), blocks.stop.reshape(-1)
    rows = (
        query.reshape(-1, plan.head_dim),
        d_output.astype(query.dtype).reshape(-1, plan.head_dim),
        log2_sum.reshape(-1),
        delta.reshape(-1),
    )
    keys = key.reshape(-1, plan.head_dim), value.reshape(-1, plan.head_dim)

    def differentiate_chunk(chunk: Chunk, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = gradients
        operands = (*numbers, *rows, *keys)
        d_key, d_value, *partial = _differentiate_keys(chunk, operands, (d_key, d_value), plan, config, interpret)
        d_pairs = partial[0] if partial else _differentiate_pairs(chunk, operands, plan, config, interpret)
        return add_up(chunk, d_pairs, d_query, plan, config, interpret), d_key, d_value

    sums = key.dtype if plan.row_chunks == 1 else jnp.float32
    empty = (
        jnp.zeros(rows[0].shape, query.dtype),
        *(jnp.zeros(array.shape, sums) for array in keys),
    )
    d_query, d_key, d_value = for_chunks(plan, indices, config.backward_tile_size, differentiate_chunk, empty)
    d_key, d_value = (array.astype(key.dtype).reshape(key.shape) for array in (d_key, d_value))
    return d_query.reshape(query.shape), d_key, d_value


def _differentiate_pairs(
    chunk: Chunk, operands: tuple[jax.Array, ...], plan: Plan, config: TritonConfig, interpret: bool
) -> jax.Array:
    """dQ of every pair, `[chunk_heads * chunk_pairs, head_dim]`, without the rows of no pair."""
    query = operands[3]
    schedule = chunk.schedule
    return pl.pallas_call(
        functools.partial(_pairs_kernel, plan=plan, key_size=plan.key_size(config)),
        out_shape=jax.ShapeDtypeStruct((plan.chunk_heads * plan.chunk_pairs, plan.head_dim), query.dtype),
        grid=(schedule.block.shape[1], plan.chunk_heads),
        compiler_params=plgpu.CompilerParams(num_warps=config.attend_warps, num_stages=config.num_stages),
        name="attend_d_query",
        interpret=interpret,
    )(chunk.origin, schedule.num_tiles, schedule.block, schedule.pair, *operands)


def _pairs_kernel(
    origin_ref: Any,  # [2]
    num_tiles_ref: Any,  # [chunk_heads]
    block_ref: Any,  # [chunk_heads, tiles]
    pair_ref: Any,  # [chunk_heads, tiles, tile_size]
    start_ref: Any,  # [batch * blocks]
    length_ref: Any,  # [batch * blocks]
    key_stop_ref: Any,  # [batch * queries]
    query_ref: Any,  # [batch * queries * heads, head_dim]
    d_output_ref: Any,  # [batch * queries * heads, head_dim]
    sum_ref: Any,  # [batch * queries * heads], log2 of the sum of the weights
    delta_ref: Any,  # [batch * queries * heads]
    key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    value_ref: Any,  # [batch * keys * kv_heads, head_dim]
    d_query_ref: Any,  # [chunk_heads * chunk_pairs, head_dim]
    *,
    plan: Plan,
    key_size: int,
) -> None:
    tile, head = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < num_tiles_ref[head])
    def _() -> None:
        pairs = load_pairs(origin_ref, pair_ref, key_stop_ref, head, tile, plan)
        block = find_block(origin_ref, start_ref, length_ref, head, block_ref[head, tile], plan)
        place, is_real = pairs.rows.place, pairs.rows.is_real
        query = load_rows(query_ref, place, is_real, plan.columns)
        d_output = load_rows(d_output_ref, place, is_real, plan.columns)
        log2_sum = load_numbers(sum_ref, place, is_real)  # [tile_size]
        delta = load_numbers(delta_ref, place, is_real)

        def add(step: jax.Array, d_query: jax.Array) -> jax.Array:
            keys = find_keys(block, step, key_size, plan)
            key = load_rows(key_ref, keys.rows, keys.is_real, plan.columns)
            value = load_rows(value_ref, keys.rows, keys.is_real, plan.columns)
            logits = product(query, key, NT) * (plan.scale * LOG2_E)  # [tile_size, key_size]
            is_seen = keys.place[None, :] < pairs.key_stop[:, None]
            probability = jnp.where(is_seen, jnp.exp2(logits - log2_sum[:, None]), 0)
            d_logits = probability * (product(d_output, value, NT) - delta[:, None]) * plan.scale
            return d_query + product(d_logits.astype(key.dtype), key, NN)

        num_keys = jnp.minimum(block.length, pairs.key_stop.max() - block.start)
        empty = jnp.zeros((place.shape[0], plan.columns), jnp.float32)
        store_rows(d_query_ref, pairs.place, is_real, loop(0, ceil_div(num_keys, key_size), add, empty))


def add_up(
    chunk: Chunk, partial: jax.Array, d_query: jax.Array, plan: Plan, config: TritonConfig, interpret: bool
) -> jax.Array:
    """dQ `[batch * queries * heads, head_dim]` with the rows of the chunk written in place."""
    if plgpu is None:
        return plain.add_up(chunk, partial, d_query, plan)
    return pl.pallas_call(
        functools.partial(_add_up_kernel, plan=plan, merge_rows=config.merge_rows),
        out_shape=jax.ShapeDtypeStruct(d_query.shape, d_query.dtype),
        grid=(ceil_div(plan.chunk_rows, config.merge_rows), plan.chunk_heads),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=config.num_stages),
        name="add_up_d_query",
        interpret=interpret,
    )(chunk.origin, chunk.indices, partial, d_query)


def _add_up_kernel(
    origin_ref: Any,  # [2]
    indices_ref: Any,  # [chunk_heads * chunk_pairs]
    partial_ref: Any,  # [chunk_heads * chunk_pairs, head_dim]
    _d_query_ref: Any,  # the gradient as it was
    d_query_ref: Any,  # [batch * queries * heads, head_dim]
    *,
    plan: Plan,
    merge_rows: int,
) -> None:
    first_pair, rows = rows_program(origin_ref, merge_rows, plan)

    def add(choice: jax.Array, total: jax.Array) -> jax.Array:
        pair = first_pair + choice
        is_pair = load_numbers(indices_ref, pair, rows.is_real, other=-1) >= 0
        return total + load_rows(partial_ref, pair, is_pair, plan.columns).astype(jnp.float32)

    total = loop(0, plan.top_k, add, jnp.zeros((merge_rows, plan.columns), jnp.float32))
    store_rows(d_query_ref, rows.place, rows.is_real, total)


def _differentiate_keys(
    chunk: Chunk,
    operands: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array],
    plan: Plan,
    config: TritonConfig,
    interpret: bool,
) -> list[jax.Array]:
    """dK and dV `[batch * keys * kv_heads, head_dim]` with what the chunk adds to them, in place.

    Where a program has a whole block, also what `_differentiate_pairs` gives.
    """
    schedule = chunk.schedule
    key_size = plan.key_size(config)
    parts = ceil_div(plan.block_size, key_size)
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in gradients]
    if parts == 1:
        pairs = plan.chunk_heads * plan.chunk_pairs, plan.head_dim
        results.append(jax.ShapeDtypeStruct(pairs, operands[3].dtype))

    first_operand = 3 + len(operands)
    return pl.pallas_call(
        functools.partial(_keys_kernel, plan=plan, key_size=key_size, parts=parts),
        out_shape=results,
        grid=(plan.num_blocks * parts, plan.chunk_heads),
        input_output_aliases={first_operand: 0, first_operand + 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=config.attend_warps, num_stages=config.num_stages),
        name="attend_d_key_value",
        interpret=interpret,
    )(
        chunk.origin,
        find_tiles(schedule, plan.num_blocks),
        schedule.pair,
        *operands,
        *gradients,
    )


def _keys_kernel(
    origin_ref: Any,  # [2]
    bounds_ref: Any,  # [chunk_heads, blocks + 1], first tile of each block
    pair_ref: Any,  # [chunk_heads, tiles, tile_size]
    start_ref: Any,  # [batch * blocks]
    length_ref: Any,  # [batch * blocks]
    key_stop_ref: Any,  # [batch * queries]
    query_ref: Any,  # [batch * queries * heads, head_dim]
    d_output_ref: Any,  # [batch * queries * heads, head_dim]
    sum_ref: Any,  # [batch * queries * heads], log2 of the sum of the weights
    delta_ref: Any,  # [batch * queries * heads]
    key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    value_ref: Any,  # [batch * keys * kv_heads, head_dim]
    d_key_before_ref: Any,  # the gradients as they were
    d_value_before_ref: Any,
    d_key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    d_value_ref: Any,  # [batch * keys * kv_heads, head_dim]
    *d_query_refs: Any,  # [chunk_heads * chunk_pairs, head_dim], if the part is the whole block
    plan: Plan,
    key_size: int,
    parts: int,
) -> None:
    program, head = pl.program_id(0), pl.program_id(1)
    number, part = divide(program, parts)
    begin, end = bounds_ref[head, number], bounds_ref[head, number + 1]

    @pl.when(begin < end)
    def _() -> None:
        block = find_block(origin_ref, start_ref, length_ref, head, number, plan)
        keys = find_keys(block, part, key_size, plan)
        key = load_rows(key_ref, keys.rows, keys.is_real, plan.columns)
        value = load_rows(value_ref, keys.rows, keys.is_real, plan.columns)

        def add(tile: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_key, d_value = sums
            pairs = load_pairs(origin_ref, pair_ref, key_stop_ref, head, tile, plan)
            place, is_real = pairs.rows.place, pairs.rows.is_real
            query = load_rows(query_ref, place, is_real, plan.columns)
            d_output = load_rows(d_output_ref, place, is_real, plan.columns)
            log2_sum = load_numbers(sum_ref, place, is_real)  # [tile_size]
            delta = load_numbers(delta_ref, place, is_real)
            logits = product(key, query, NT) * (plan.scale * LOG2_E)  # [key_size, tile_size]
            is_seen = keys.place[:, None] < pairs.key_stop[None, :]
            probability = jnp.where(is_seen, jnp.exp2(logits - log2_sum[None, :]), 0)
            d_logits = probability * (product(value, d_output, NT) - delta[None, :]) * plan.scale
            d_logits = d_logits.astype(query.dtype)
            for ref in d_query_refs:
                store_rows(ref, pairs.place, is_real, product(d_logits, key, TN))
            d_key += product(d_logits, query, NN)
            return d_key, d_value + product(probability.astype(query.dtype), d_output, NN)

        before = tuple(
            load_rows(ref, keys.rows, keys.is_real, plan.columns).astype(jnp.float32)
            for ref in (d_key_before_ref, d_value_before_ref)
        )
        d_key, d_value = loop(begin, end, add, before)
        store_rows(d_key_ref, keys.rows, keys.is_real, d_key)
        store_rows(d_value_ref, keys.rows, keys.is_real, d_value)
