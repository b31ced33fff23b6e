"""Gradients of attention for choices made per query, on a TPU: one pass for dQ, dK and dV, without atomics.

Tiling. As in `forward`: a chunk of rows stays in VMEM, the grid walks its (query, block) pairs sorted by block. A step
is one tile of `backward_tile_size` pairs of one page of keys. It fetches its rows (query, gradient of the output,
key_stop, log-sum-exp and delta, all in one row), computes the probabilities again, P = exp(logits - log_sum_exp), and
dS = P (dO V^T - delta). dK += dS^T Q and dV += P^T dO stay in VMEM as long as the page is the same, for the tiles of
a page follow one another; dQ = dS K is added, row by row, to the chunk's rows.

Sums over chunks. dK and dV go in and out through the same memory: the first tile of a page adds to what earlier
chunks left. A page is visited in one run of tiles, so the pipeline never reads what it has yet to write.
The order of all additions is that of the schedule: the same bits in every run.

Memory. VMEM, head_dim 128 in bfloat16, 32768 rows: rows 32 MB, dQ 16 MB; keys, values, dK and dV of two pages, in
and out, 0.6 MB. SMEM as in `forward`.

Speed. Five products instead of two, and twice the words to fetch a row; adding to dQ is half a row of the forward's.
A tile alone waits for the latency of its chain (logits, exp2, dS, products), which 256 pairs hide half of.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Arrays, Blocks, Results
from pallas_kernels.config import PER_QUERY, PerQueryConfig
from pallas_kernels.numerics import LOG2_E, NN, NT, TN, product, result
from pallas_kernels.tpu.per_query import chunks, memory
from pallas_kernels.tpu.per_query.cut_tiles import make_tiles
from pallas_kernels.tpu.per_query.memory import LANES, Tiles


def attend_backward(
    arrays: Arrays,
    indices: jax.Array,
    blocks: Blocks,
    results: Results,
    cotangents: Results,
    *,
    scale: float,
    config: PerQueryConfig = PER_QUERY,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attend_forward` for query, key and value.

    With P = exp(scale Q K^T - L), delta = sum(dO O) - dL and dS = scale P (dO V^T - delta): dQ = dS K, dK = dS^T Q,
    dV = P^T dO. Source: FlashAttention-2 (arXiv 2307.08691), section 2.

    Args:
      arrays, indices, blocks, scale, config, interpret: as given to `attend_forward`.
      results: what it gave.
      cotangents: the gradients of these.

    Returns:
      Gradients of query, key and value, like them. Zero for a query without blocks.

    Raises:
      NotImplementedError: as `attend_forward`.
    """
    (query, key, value), cut = arrays, memory.Cut.of(blocks)
    (output, log_sum_exp), (d_output, d_log_sum_exp) = results, cotangents
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    chunk = memory.refuses(query, blocks) or plan_chunk(query, key, indices.shape[3], blocks, config)
    if isinstance(chunk, str):
        raise NotImplementedError(chunk)
    num_rows = num_queries * num_heads // kv_heads
    lanes = memory.round_up(head_dim, LANES)
    num_chunks = -(-num_rows // chunk.rows)
    split = functools.partial(memory.split_heads, kv_heads=kv_heads, num_chunks=num_chunks, chunk_rows=chunk.rows)
    key_stop = jnp.broadcast_to(blocks.stop[:, :, None, None], (batch, num_queries, num_heads, 1))
    delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1) - d_log_sum_exp
    log2_sum = jnp.where(jnp.isneginf(log_sum_exp), 0, log_sum_exp * LOG2_E)

    def differentiate_head(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        key, value, block_start, block_length, *chunks = arrays

        def differentiate_chunk(
            sums: tuple[jax.Array, jax.Array], arrays: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            indices, *row = arrays  # [top_k, chunk_rows], [chunk_rows, x]
            ids, pieces = memory.make_pieces(indices, block_start, block_length, cut)
            tiles = make_tiles(
                ids,
                pieces,
                tile_size=chunk.tile_size,
                tiles_per_step=1,
                pieces_per_step=config.pieces_per_step,
                interpret=interpret,
            )
            d_query, d_key, d_value = differentiate_tiles(
                memory.pack_rows(*row),
                key,
                value,
                *sums,
                tiles,
                head_dim=head_dim,
                is_aligned=cut.is_aligned,
                scale=scale,
                vmem_bytes=chunk.vmem_bytes,
                interpret=interpret,
            )
            d_query = d_query.reshape(-1, lanes)[: chunk.rows, :head_dim]
            return (d_key, d_value), d_query.astype(query.dtype)

        empty = jnp.zeros((*key.shape[:2], head_dim), jnp.float32)
        (d_key, d_value), d_query = lax.scan(differentiate_chunk, (empty, empty), tuple(chunks))
        return d_query, d_key, d_value

    padded_key = jnp.pad(key, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))
    heads = (
        memory.split_keys(padded_key, cut.page_size),
        memory.split_keys(value, cut.page_size),
        jnp.repeat(blocks.block_start, kv_heads, axis=0),
        jnp.repeat(blocks.block_length, kv_heads, axis=0),
        memory.split_indices(indices, kv_heads, num_chunks, chunk.rows),
        split(query),
        split(d_output.astype(query.dtype)),
        split(key_stop),
        split(log2_sum[..., None]),
        split(delta[..., None]),
    )
    d_query, d_key, d_value = lax.map(jax.custom_batching.sequential_vmap(differentiate_head), heads)
    return (
        memory.join_heads(d_query, batch, num_queries, num_heads),
        memory.join_keys(d_key, batch, num_keys).astype(key.dtype),
        memory.join_keys(d_value, batch, num_keys).astype(value.dtype),
    )


def plan_chunk(
    query: jax.Array, key: jax.Array, top_k: int, blocks: Blocks, config: PerQueryConfig
) -> chunks.Chunk | str:
    """The chunks of `attend_backward`, from shapes; or why there can be none."""
    head_dim, cut = query.shape[-1], memory.Cut.of(blocks)
    lanes = memory.round_up(head_dim, LANES)
    parts = _parts(head_dim, query.dtype)
    return chunks.plan(
        query.shape[1] * query.shape[2] // key.shape[2],
        row_bytes=4 * (LANES * parts + lanes),
        row_multiple=8,
        slot_bytes=4 * (2 * LANES * parts + 8 * cut.page_size + 4 * lanes),
        tile_bytes=12 * 4 * cut.page_size * lanes,
        pairs_per_row=top_k * cut.pieces_per_block,
        num_pieces=blocks.num_blocks * cut.pieces_per_block,
        tile_sizes=(config.backward_tile_size,),
        slots_per_step=1,
        config=config,
    )


def differentiate_tiles(
    rows: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_key: jax.Array,
    d_value: jax.Array,
    tiles: Tiles,
    *,
    head_dim: int,
    is_aligned: bool,
    scale: float,
    vmem_bytes: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk: dQ of its rows, and dK and dV with the chunk's share added.

    Args:
      rows: uint32 `[(chunk_rows + 8) * parts, 128]`, from `memory.pack_rows`: query, d_output, key_stop,
        log_sum_exp * log2(e), delta.
      key: `[pages, page_size, lanes]`, zeros behind head_dim.
      value: `[pages, page_size, head_dim]`.
      d_key: float32 `[pages, page_size, head_dim]`, the sum of the chunks before.
      d_value: like d_key.
      tiles: of the chunk, one a step.
      head_dim: of the queries.
      is_aligned: whether a tile sees no key of its page but those of its block, or zeros.
      vmem_bytes: on-chip memory that the kernel may take.

    Returns:
      dQ, float32 `[(chunk_rows + 8) * lanes / 128, 128]`; dK and dV, like d_key.
    """
    tile_size = tiles.row.shape[2]
    parts, sum_parts = _parts(head_dim, key.dtype), key.shape[2] // LANES
    d_query_shape = rows.shape[0] // parts * sum_parts, LANES
    numbers = pl.BlockSpec((1, 1, tile_size), lambda step, *_: (step, 0, 0), memory_space=pltpu.SMEM)

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda step, *_: (0, 0), pipeline_mode=pl.Buffered(1))

    def page(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *array.shape[1:]), lambda step, page, *_: (page[step], 0, 0))

    return pl.pallas_call(
        functools.partial(_kernel, size=_Size(tile_size, head_dim, key.shape[1], is_aligned, scale)),
        out_shape=(
            result(d_query_shape, jnp.float32, key),
            result(d_key.shape, jnp.float32, key),
            result(d_value.shape, jnp.float32, key),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles.num_steps,),
            in_specs=[
                numbers,
                numbers,
                whole(rows.shape),
                page(key),
                page(value),
                page(d_key),
                page(d_value),
            ],
            out_specs=(whole(d_query_shape), page(d_key), page(d_value)),
            scratch_shapes=[
                pltpu.VMEM((tile_size * parts, LANES), jnp.uint32),
                pltpu.VMEM((tile_size * sum_parts, LANES), jnp.float32),
            ],
        ),
        input_output_aliases={8: 1, 9: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,  # the interpreter checks them in the tests
        ),
        name="attend_backward",
        interpret=interpret,
    )(
        *(tiles.page, tiles.start, tiles.stop),
        *(tiles.row * sum_parts, tiles.row * parts),
        *(rows, key, value, d_key, d_value),
    )


def _parts(head_dim: int, dtype: Any) -> int:
    """Parts of a row: query, gradient of the output, and three numbers."""
    return memory.parts_of(2 * memory.words_of(head_dim, dtype) + 3)


@dataclasses.dataclass(frozen=True)
class _Size:
    """Static sizes of a step."""

    tile_size: int
    head_dim: int
    page_size: int
    is_aligned: bool
    scale: float


def _kernel(
    page_ref: Any,  # SMEM [tiles]
    start_ref: Any,  # SMEM [tiles]
    stop_ref: Any,  # SMEM [tiles]
    sum_ref: Any,  # SMEM [1, 1, pairs]: first part of each slot's row of dQ
    row_ref: Any,  # SMEM [1, 1, pairs]: that of the rows
    rows_ref: Any,  # [(chunk_rows + 8) * parts, 128]
    key_ref: Any,  # [1, page_size, lanes]
    value_ref: Any,  # [1, page_size, head_dim]
    old_d_key_ref: Any,  # [1, page_size, head_dim]
    old_d_value_ref: Any,
    d_query_ref: Any,  # [(chunk_rows + 8) * lanes / 128, 128]
    d_key_ref: Any,
    d_value_ref: Any,
    fetched_ref: Any,  # [pairs * parts, 128]
    result_ref: Any,  # [pairs * lanes / 128, 128]
    *,
    size: _Size,
) -> None:
    tile = pl.program_id(0)
    page, dtype = page_ref[tile], key_ref.dtype
    sum_parts = key_ref.shape[2] // LANES

    @pl.when(tile == 0)
    def _() -> None:
        memory.fill_rows(d_query_ref, jnp.zeros((sum_parts, LANES), jnp.float32))

    @pl.when((tile == 0) | (page != page_ref[jnp.maximum(tile - 1, 0)]))
    def _() -> None:
        d_key_ref[...] = old_d_key_ref[...]
        d_value_ref[...] = old_d_value_ref[...]

    memory.fetch_rows(row_ref, rows_ref, fetched_ref)
    rows = memory.read_rows(fetched_ref, 0, size.tile_size, _parts(size.head_dim, dtype))
    num_words = memory.words_of(size.head_dim, dtype)
    query = memory.from_words(rows, 0, size.head_dim, dtype)  # [pairs, head_dim]
    d_output = memory.from_words(rows, num_words, size.head_dim, dtype)
    key_stop, log_sum_exp, delta = (rows[:, 2 * num_words + i : 2 * num_words + i + 1] for i in range(3))  # [pairs, 1]
    log_sum_exp, delta = (lax.bitcast_convert_type(column, jnp.float32) for column in (log_sum_exp, delta))
    start, stop = start_ref[tile], stop_ref[tile]
    key_stop = lax.bitcast_convert_type(key_stop, jnp.int32)
    is_seen = memory.is_seen(start, stop, key_stop, page, size.page_size)

    key = key_ref[0]  # [page_size, lanes]
    if not size.is_aligned:  # keys of other segments, whatever they hold, must not even meet a zero
        key = memory.clear_outside(key, start, stop, page)
    logits = product(query, key[:, : size.head_dim], NT) * (size.scale * LOG2_E)  # [pairs, page_size]
    d_probability = product(d_output, value_ref[0], NT)
    probability = jnp.where(is_seen, jnp.exp2(logits - log_sum_exp), 0.0)
    d_logits = jnp.where(is_seen, probability * (d_probability - delta) * size.scale, 0.0).astype(dtype)
    d_value_ref[0] += product(probability.astype(dtype), d_output, TN)
    d_key_ref[0] += product(d_logits, query, TN)
    memory.write_rows(result_ref, 0, product(d_logits, key, NN), sum_parts)
    memory.add_rows(sum_ref, result_ref, d_query_ref)
