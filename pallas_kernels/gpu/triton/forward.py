"""Attention for choices made per query, on a GPU of any kind: one key block after another, in Triton.

Compiled and interpreted only: nothing here has run on a GPU yet.

Tiling. The (row, block) pairs of a chunk of rows (`chunks`) are sorted by block and cut into tiles of `tile_size` pairs
of one block (`pallas_kernels.schedule`). Two kernels follow.

Attend. Grid (tile, key/value head of the chunk); a program behind the last tile in use ends at once. A program gathers
the queries of its tile, row by row, straight from `[batch, queries, heads, head_dim]`, and walks the keys of its block,
`key_size` at a time: logits q k^T, a running maximum, exp2, p v. It stops at the last key that one of its queries sees.
What comes out goes to the place of the pair: a partial output in the dtype of the queries, [pairs, head_dim], and its
log-sum-exp. A head_dim or a block that is no power of two is padded inside the tile, by masks.

Merge. Grid (group of rows, key/value head of the chunk). A program reads the partial results of each row, one choice
after another, weighs them by their log-sum-exp and writes the output to its place in `[batch, queries, heads,
head_dim]`, and the log-sum-exp of the whole.

Memory. Registers: an accumulator [tile_size, head_dim] in float32, logits [tile_size, key_size]. Shared memory: queries
[tile_size, head_dim], `num_stages` parts of keys and of values; 96 KiB at head_dim 128 in 16 bits. Global memory:
inputs, outputs, and the partial results of one chunk, at most 3/16 of those as a rule; nothing is copied into another
order, and keys are never repeated.

Speed. Bound by memory. At 64K tokens, 32 heads of 128, top_k 8, in bfloat16: 4.3 GB of queries gathered (few hit the L2
cache), 4.3 GB of partial outputs written and read again, 1.2 TFLOP. By arithmetic at the peaks of an H200, 2.0 ms to
attend and 1.0 ms to merge (`docs/gpu-roofline.md`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Arrays, Blocks
from pallas_kernels.config import TRITON, TritonConfig
from pallas_kernels.gpu import plain
from pallas_kernels.gpu.chunks import (
    Chunk,
    Plan,
    find_block,
    find_keys,
    for_chunks,
    load_pairs,
    make_plan,
    rows_program,
)
from pallas_kernels.gpu.tiles import (
    ceil_div,
    load_numbers,
    load_rows,
    loop,
    padded_head_dim,
    plgpu,
    refuses,
    store_numbers,
    store_rows,
)
from pallas_kernels.numerics import LN_2, LOG2_E, NN, NT, OUT_OF_SIGHT, product


def attend_forward(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    *,
    scale: float,
    config: TritonConfig = TRITON,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of every query over the blocks it chose: softmax(scale q k^T) v.

    A query sees the keys of its blocks that stand before `blocks.stop`. Partial outputs are kept in query's dtype, all
    else is float32. Source: FlashMoBA (arXiv 2511.11571), section 4. Has not run on a GPU yet.

    Args:
      arrays: query, float32, bfloat16 or float16, head_dim up to 256; key and value, of its dtype, in block order.
      indices: int32 `[batch, heads, queries, top_k]`, ids of blocks, none twice in a list; -1 for none. Every block
        listed has a key that the query sees.
      blocks: the geometry of the call.
      scale: factor of the logits.
      config: sizes inside the kernels.
      interpret: whether to run on a CPU, interpreted.

    Returns:
      Output like query, and the natural log-sum-exp of the logits, float32 `[batch, queries, heads]`. Zero and -inf for
      a query without blocks.

    Raises:
      NotImplementedError: a dtype or head_dim that the kernels cannot do.
    """
    query = arrays[0]
    plan, attend = attend_chunks(arrays, indices, blocks, scale=scale, config=config, interpret=interpret)
    config = config.for_rows(plan.columns, query.dtype.itemsize)

    def attend_chunk(chunk: Chunk, outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return merge(chunk, *attend(chunk), *outputs, plan, config, interpret)

    num_rows = query.size // plan.head_dim
    empty = jnp.zeros((num_rows, plan.head_dim), query.dtype), jnp.zeros(num_rows, jnp.float32)
    output, log_sum_exp = for_chunks(plan, indices, config.tile_size, attend_chunk, empty)
    return output.reshape(query.shape), log_sum_exp.reshape(query.shape[:3])


def attend_chunks(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    *,
    scale: float,
    config: TritonConfig,
    interpret: bool = False,
) -> tuple[Plan, Callable[[Chunk], tuple[jax.Array, jax.Array]]]:
    """The first half of `attend_forward`, whose arguments it takes: the plan, and what attends a chunk of it.

    Returns:
      The plan, and a function from a chunk to partial outputs `[chunk_heads * chunk_pairs, head_dim]` and their log2 of
      the sum of exp2 `[chunk_heads * chunk_pairs]`. Entries of no pair hold anything.
    """
    query, key, value = arrays
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
        tile_size=config.tile_size,
        arrays=2,
        config=config,
    )
    rows, keys, values = (array.reshape(-1, plan.head_dim) for array in (query, key, value))
    numbers = blocks.block_start.reshape(-1), blocks.block_length.reshape(-1), blocks.stop.reshape(-1)
    return plan, lambda chunk: _attend(chunk, *numbers, rows, keys, values, plan, config, interpret)


def _attend(
    chunk: Chunk,
    block_start: jax.Array,
    block_length: jax.Array,
    key_stop: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    plan: Plan,
    config: TritonConfig,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """What `attend_chunks` returns, for one chunk."""
    num_pairs = plan.chunk_heads * plan.chunk_pairs
    schedule = chunk.schedule
    return pl.pallas_call(
        functools.partial(_attend_kernel, plan=plan, key_size=plan.key_size(config)),
        out_shape=[
            jax.ShapeDtypeStruct((num_pairs, plan.head_dim), query.dtype),
            jax.ShapeDtypeStruct((num_pairs,), jnp.float32),
        ],
        grid=(schedule.block.shape[1], plan.chunk_heads),
        compiler_params=plgpu.CompilerParams(num_warps=config.attend_warps, num_stages=config.num_stages),
        name="attend_tiles",
        interpret=interpret,
    )(
        chunk.origin,
        schedule.num_tiles,
        schedule.block,
        schedule.pair,
        block_start,
        block_length,
        key_stop,
        query,
        key,
        value,
    )


def _attend_kernel(
    origin_ref: Any,  # [2]
    num_tiles_ref: Any,  # [chunk_heads]
    block_ref: Any,  # [chunk_heads, tiles]
    pair_ref: Any,  # [chunk_heads, tiles, tile_size]
    start_ref: Any,  # [batch * blocks]
    length_ref: Any,  # [batch * blocks]
    key_stop_ref: Any,  # [batch * queries]
    query_ref: Any,  # [batch * queries * heads, head_dim]
    key_ref: Any,  # [batch * keys * kv_heads, head_dim]
    value_ref: Any,  # [batch * keys * kv_heads, head_dim]
    output_ref: Any,  # [chunk_heads * chunk_pairs, head_dim]
    sum_ref: Any,  # [chunk_heads * chunk_pairs]
    *,
    plan: Plan,
    key_size: int,
) -> None:
    tile, head = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < num_tiles_ref[head])
    def _() -> None:
        pairs = load_pairs(origin_ref, pair_ref, key_stop_ref, head, tile, plan)
        block = find_block(origin_ref, start_ref, length_ref, head, block_ref[head, tile], plan)
        query = load_rows(query_ref, pairs.rows.place, pairs.rows.is_real, plan.columns)

        def attend(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            accumulator, largest, total = state
            keys = find_keys(block, step, key_size, plan)
            key = load_rows(key_ref, keys.rows, keys.is_real, plan.columns)
            value = load_rows(value_ref, keys.rows, keys.is_real, plan.columns)
            logits = product(query, key, NT) * (plan.scale * LOG2_E)
            logits = jnp.where(keys.place[None, :] < pairs.key_stop[:, None], logits, OUT_OF_SIGHT)
            new_largest = jnp.maximum(largest, logits.max(1))
            factor = jnp.exp2(largest - new_largest)
            weight = jnp.exp2(logits - new_largest[:, None])
            accumulator = accumulator * factor[:, None] + product(weight.astype(value.dtype), value, NN)
            return accumulator, new_largest, total * factor + weight.sum(1)

        tile_size = pairs.place.shape[0]
        num_keys = jnp.minimum(block.length, pairs.key_stop.max() - block.start)
        empty = (
            jnp.zeros((tile_size, plan.columns), jnp.float32),
            jnp.full((tile_size,), OUT_OF_SIGHT, jnp.float32),
            jnp.zeros((tile_size,), jnp.float32),
        )
        accumulator, largest, total = loop(0, ceil_div(num_keys, key_size), attend, empty)
        store_rows(output_ref, pairs.place, pairs.rows.is_real, accumulator / total[:, None])
        store_numbers(sum_ref, pairs.place, pairs.rows.is_real, largest + jnp.log2(total))


def merge(
    chunk: Chunk,
    partial_output: jax.Array,
    partial_sum: jax.Array,
    output: jax.Array,
    log_sum_exp: jax.Array,
    plan: Plan,
    config: TritonConfig,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Output `[batch * queries * heads, head_dim]` and log-sum-exp, with the rows of the chunk written in place."""
    if plgpu is None:
        return plain.merge(chunk, partial_output, partial_sum, output, log_sum_exp, plan)
    return pl.pallas_call(
        functools.partial(_merge_kernel, plan=plan, merge_rows=config.merge_rows),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (output, log_sum_exp)],
        grid=(ceil_div(plan.chunk_rows, config.merge_rows), plan.chunk_heads),
        input_output_aliases={4: 0, 5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=config.num_stages),
        name="merge_partials",
        interpret=interpret,
    )(chunk.origin, chunk.indices, partial_output, partial_sum, output, log_sum_exp)


def _merge_kernel(
    origin_ref: Any,  # [2]
    indices_ref: Any,  # [chunk_heads * chunk_pairs]
    partial_output_ref: Any,  # [chunk_heads * chunk_pairs, head_dim]
    partial_sum_ref: Any,  # [chunk_heads * chunk_pairs]
    _output_ref: Any,  # the outputs as they were
    _log_sum_exp_ref: Any,
    output_ref: Any,  # [batch * queries * heads, head_dim]
    log_sum_exp_ref: Any,  # [batch * queries * heads]
    *,
    plan: Plan,
    merge_rows: int,
) -> None:
    first_pair, rows = rows_program(origin_ref, merge_rows, plan)

    def add(choice: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        accumulator, largest, total = state
        pair = first_pair + choice
        is_pair = load_numbers(indices_ref, pair, rows.is_real, other=-1) >= 0
        log_sum = load_numbers(partial_sum_ref, pair, is_pair, other=OUT_OF_SIGHT)
        part = load_rows(partial_output_ref, pair, is_pair, plan.columns).astype(jnp.float32)
        new_largest = jnp.maximum(largest, log_sum)
        factor = jnp.exp2(largest - new_largest)
        weight = jnp.where(is_pair, jnp.exp2(log_sum - new_largest), 0)
        return accumulator * factor[:, None] + weight[:, None] * part, new_largest, total * factor + weight

    empty = (
        jnp.zeros((merge_rows, plan.columns), jnp.float32),
        jnp.full((merge_rows,), OUT_OF_SIGHT, jnp.float32),
        jnp.zeros((merge_rows,), jnp.float32),
    )
    accumulator, largest, total = loop(0, plan.top_k, add, empty)
    is_empty = total == 0
    safe_total = jnp.where(is_empty, 1, total)
    store_rows(output_ref, rows.place, rows.is_real, accumulator / safe_total[:, None])
    log_sum_exp = jnp.where(is_empty, -jnp.inf, (largest + jnp.log2(safe_total)) * LN_2)
    store_numbers(log_sum_exp_ref, rows.place, rows.is_real, log_sum_exp)
